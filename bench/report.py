"""The page of a run of weeks: seconds to write it, its size, and the worst-sites query.

The log has 1,680 sites and 100,000 steps as the writer leaves them: merged parts of 600 steps
with their summaries. Two such parts are made and repeated with other steps, since writing
168 M rows through the writer would take an hour and give the same files.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bench.timing import verdict
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.runlog.parts import PartName, write_part
from unclamp.runlog.schema import VIEWS, to_arrow
from unclamp.runlog.summary import summary_sql

LAYERS, STEPS = 80, 100_000
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
ROLES = {"input": ("e4m3fn", 448.0), "weight": ("e4m3fn", 448.0), "grad_output": ("e5m2", 57344.0)}
SITES = LAYERS * len(MODULES) * len(ROLES)
PART_STEPS, INSPECT_EVERY = 600, 100
SPIKES = (9_000, 40_200, 77_777)
WORST = """
    SELECT site, sum(saturated_error_sum) AS error, sum(saturated) AS saturated FROM summaries
    GROUP BY site ORDER BY error DESC LIMIT 20"""


def write_log(path: Path, *, steps: int = STEPS) -> Path:
    """Write a run of 1,680 sites as the writer would have left it; three loss spikes."""
    header = Header(unclamp_version="bench", metadata={"model": "80 layers"})
    with RunLogWriter(path, header=header) as writer:
        writer.add("sites", _sites())
        writer.add("steps", _steps(steps))
        text = json.dumps({"sites": [{"fqn": "model.layers.3.mlp.down_proj", "role": "input",
                                      "before": {"scaling": "delayed"},
                                      "after": {"scaling": "dynamic"}}]})  # fmt: skip
        at = steps * 4 // 5
        writer.add("events", {"step": [at], "kind": ["switch"], "data": [text]})
    generator = np.random.default_rng(0)
    kinds = [_part(generator, clamps=clamps) for clamps in (False, True)]
    for number, first in enumerate(range(0, steps, PART_STEPS)):
        casts, summary = kinds[number % 5 == 0]
        name = str(PartName(rank=0, first=number, last=number, is_merged=True))
        for folder in ("casts", "summaries"):
            (path / folder).mkdir(exist_ok=True)
        write_part(path / "casts" / name, _shifted(casts, first, "step"))
        write_part(path / "summaries" / name, _shifted(summary, first, "first_step", "worst_step"))
    return path


def _sites() -> dict[str, Any]:
    rows = [
        (f"model.layers.{layer}.{module}", role, fmt, largest)
        for layer in range(LAYERS)
        for module in MODULES
        for role, (fmt, largest) in ROLES.items()
    ]
    names = ("fqn", "role", "format", "format_max")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    same = {"scaling": "delayed", "granularity": "tensor"}
    return {"site": list(range(SITES)), **columns, **{k: [v] * SITES for k, v in same.items()}}


def _steps(steps: int) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    at = np.arange(steps)
    loss = 2 + 8 * np.exp(-at / 5000) + 0.02 * generator.standard_normal(steps)
    norm = 1 + 0.1 * generator.random(steps)
    for spike in SPIKES:
        if spike < steps:
            loss[spike : spike + 4] *= 1.8
            norm[spike : spike + 2] *= 20
    scalars = [[("tokens", 4e6)]] * steps
    return {"step": at, "loss": loss, "grad_norm": norm, "time_s": at * 2.0,
            "step_ms": np.full(steps, 2000.0), "scalars": scalars}  # fmt: skip


def _part(generator: np.random.Generator, *, clamps: bool) -> tuple[pa.Table, pa.Table]:
    """Return 600 steps of casts, by site, and their summary."""
    rows = SITES * PART_STEPS
    step = np.tile(np.arange(PART_STEPS), SITES)
    site = np.repeat(np.arange(SITES, dtype=np.int32), PART_STEPS)
    largest = np.tile([largest for _, largest in ROLES.values()], SITES // 3)[site]
    clamped = (generator.random(rows) < 1e-3 * (1 + site % 40)) & clamps
    scale = np.exp2(generator.integers(4, 8, SITES))[site].astype(np.float32)
    peak = np.where(clamped, 1 + 9 * generator.random(rows), 0.3 + 0.6 * generator.random(rows))
    inspected = step % INSPECT_EVERY == 0
    sqnr = np.where(inspected, 31 - 10 * clamped + generator.random(rows), np.nan)
    exponents = [(e, 1 << (20 - abs(e + 3))) for e in range(-20, 10)]
    columns = {
        "step": step, "site": site, "amax": (peak * largest / scale).astype(np.float32),
        "scale": scale, "elements": np.full(rows, 1 << 24),
        "saturated": clamped * generator.integers(1, 100, rows),
        "underflowed": generator.integers(0, 1000, rows), "nonfinite": np.zeros(rows, np.int64),
        "recast": np.zeros(rows, np.int64),
        "saturated_error": clamped * generator.random(rows) * 1e-3 * (1 + site % 7),
        "microsteps": np.full(rows, 4, np.int32),
        "sqnr_db": pa.array(sqnr, from_pandas=True),
        "exponents": [exponents if looked else None for looked in inspected.tolist()],
    }  # fmt: skip
    casts = to_arrow("casts", columns, rank=0)
    with duckdb.connect() as connection:
        connection.register("rows_of_a_part", casts)
        summary = connection.sql(f"{summary_sql('rows_of_a_part')} ORDER BY first_step, site")
        return casts, summary.to_arrow_table().cast(VIEWS["summaries"])


def _shifted(rows: pa.Table, steps: int, *columns: str) -> pa.Table:
    for name in columns:
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(
            index,
            rows.schema.field(name),
            pc.call_function("add", [rows.column(name), pa.scalar(steps)]),
        )
    return rows


def measure(path: Path | None = None) -> dict[str, float]:
    """Time `unclamp report` and the query in a log of 100,000 steps; `path` may hold one."""
    folder = Path(tempfile.mkdtemp(prefix="unclamp-bench-"))
    try:
        run = path if path is not None and path.exists() else write_log(path or folder / "run")
        times, query_times = [], []
        for _ in range(3):
            began = time.perf_counter()
            command = [sys.executable, "-m", "unclamp", "report", str(run), "--json"]
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
            with RunLog.open(run) as log:
                log.sql(WORST)
            query_times.append(time.perf_counter() - began)
        size = (run / "report.html").stat().st_size / 2**20
    finally:
        shutil.rmtree(folder)
    page, query = min(times), min(query_times)
    print(f"\n{STEPS} steps of {SITES} sites")
    print(f"unclamp report, start to end: {page:.2f} s  target 3 s: {verdict(page, 3.0)}")
    print(f"worst sites: {query:.2f} s  target 1 s: {verdict(query, 1.0)}")
    print(f"the page: {size:.1f} MiB  target 8 MiB: {verdict(size, 8.0)}")
    return {"report_s": page, "worst_sites_s": query, "page_mib": size}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="the run to read; one is written if there is none"
    )
    measure(parser.parse_args().folder)
