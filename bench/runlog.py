"""A run log of weeks: what writing costs a step, and what reading costs at 168 M rows.

Logs of two sizes are written by the real writer, merges included, with a flush every 20 steps as
at ten steps a second; times of reading are extrapolated from the two to 100,000 steps.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import unclamp
from bench.timing import verdict
from unclamp.nn.convert import find_ledgers
from unclamp.runlog import Columns, Header, RunLog, RunLogWriter

SITES, STEPS_OF_WEEKS = 1680, 100_000
SIZES = (6_000, 24_000)
STEPS_A_FLUSH, PACE_S, ROUNDS = 20, 0.02, 300
PARTS_WAITING = 40
"""Parts of casts that may wait for a merge before the bench waits; a full part has 600 steps."""
COUNTS = "sum(elements) AS elements, sum(saturated) AS saturated, sum(underflowed) AS underflowed"
WORST = f"""
    SELECT site, sum(saturated_error_sum) AS error, max(saturated_error_max) AS error_max,
        max(scaled_amax_max / format_max) AS overshoot, sum(clamped) AS clamped, {COUNTS}
    FROM summaries JOIN sites USING (site) GROUP BY site ORDER BY error DESC LIMIT"""
HEAT = f"""
    SELECT first_step, site, saturated_error_sum, saturated, elements
    FROM summaries WHERE site IN (SELECT site FROM ({WORST} 40))"""


def casts(step: int, generator: np.random.Generator) -> Columns:
    """Return a step's rows: one cast in twenty clamps, scales are powers of two."""
    clamped = generator.random(SITES) < 0.05
    return {
        "step": np.full(SITES, step),
        "site": np.arange(SITES, dtype=np.int32),
        "amax": np.abs(generator.standard_normal(SITES)).astype(np.float32),
        "scale": np.exp2(generator.integers(0, 8, SITES)).astype(np.float32),
        "elements": np.full(SITES, 1 << 24),
        "saturated": clamped * generator.integers(1, 100, SITES),
        "underflowed": generator.integers(0, 1000, SITES),
        "nonfinite": np.zeros(SITES, dtype=np.int64),
        "recast": np.zeros(SITES, dtype=np.int64),
        "saturated_error": clamped * generator.random(SITES) * 1e-3,
        "clamped": clamped,
        "microsteps": np.full(SITES, 4, dtype=np.int32),
    }


def write(
    path: Path, steps: int, *, make: Callable[[int, np.random.Generator], Columns] = casts
) -> float:
    """Write a log as fast as its threads keep up with, merges included; return the seconds."""
    generator = np.random.default_rng(0)
    began = time.perf_counter()
    with RunLogWriter(path, header=Header(unclamp_version="bench"), flush_interval_s=1e9) as writer:
        sites = {"site": range(SITES), "fqn": [f"layers.{i}" for i in range(SITES)]}
        same = {"role": "input", "format": "e4m3fn", "scaling": "delayed", "format_max": 448.0}
        writer.add("sites", sites | {name: [value] * SITES for name, value in same.items()})
        for step in range(steps):
            row = {"step": [step], "time_s": [float(step)], "loss": [generator.random()]}
            writer.add("steps", row)
            writer.add("casts", lambda step=step: make(step, generator))
            if step % STEPS_A_FLUSH == STEPS_A_FLUSH - 1:
                writer.flush()
                while len(list((path / "casts").glob("*.parquet"))) > PARTS_WAITING + step // 600:
                    time.sleep(0.01)
    return time.perf_counter() - began


def foreground_ms() -> tuple[float, float]:
    """Return what a recorder adds to a step of 1,680 sites: mean and 99th percentile.

    The step is the ledger's update; between steps the process sleeps, so that the writer's
    thread runs at the time it would.
    """
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(SITES // 3)))
    unclamp.convert(model, unclamp.Recipe())
    (ledger,) = find_ledgers(model)
    ledger.pending.fill_(1.0)
    statistics_of_a_step = ledger.pending.clone()

    def step_ms(record: Callable[[], Any]) -> list[float]:
        times = []
        for _ in range(ROUNDS):
            ledger.pending.copy_(statistics_of_a_step)
            time.sleep(PACE_S)
            began = time.perf_counter()
            ledger.update()
            record()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    without = statistics.median(step_ms(lambda: None))
    with (
        tempfile.TemporaryDirectory() as folder,
        unclamp.Recorder(model, f"{folder}/run", flush_interval_s=0.1) as recorder,
    ):
        times = step_ms(lambda: recorder.step(loss=1.0))
    return statistics.mean(times) - without, float(np.percentile(times, 99)) - without


def read_s(path: Path) -> dict[str, float]:
    """Time what a page asks of a log, each in a log opened anew; the best of five."""

    def page(log: RunLog) -> None:
        log.steps()
        log.sql(HEAT)
        log.sql(f"{WORST} 20")

    reads: dict[str, Callable[[RunLog], Any]] = {
        "open and say what it is": repr,
        "worst sites": lambda log: log.sql(f"{WORST} 20"),
        "heat map of 40 sites": lambda log: log.sql(HEAT),
        "steps": lambda log: log.steps(),
        "a page's data": page,
        "one site's casts": lambda log: log.casts(site=SITES // 2),
        "summaries, all": lambda log: log.summaries(),
    }
    seconds = {}
    for name, read in reads.items():
        times = []
        for _ in range(5):
            began = time.perf_counter()
            with RunLog.open(path) as log:
                read(log)
            times.append(time.perf_counter() - began)
        seconds[name] = min(times)
    return seconds


def measure() -> dict[str, dict[str, float]]:
    """Write two logs, read them, and print what 168 M rows would take."""
    print(f"\na run log of {SITES} sites")
    mean, high = foreground_ms()
    results = {"foreground": {"ms": mean, "p99_ms": high}}
    print(f"foreground, a step: {mean:.3f} ms (p99 {high:.3f})  target 1 ms: {verdict(mean, 1.0)}")
    reads, rate = [], 0.0
    for steps in SIZES:
        folder = Path(tempfile.mkdtemp(prefix="unclamp-bench-"))
        try:
            rate = steps / write(folder / "run", steps)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            files = len(list(folder.rglob("*.parquet")))
            reads.append(read_s(folder / "run"))
        finally:
            shutil.rmtree(folder)
        rows = steps * SITES
        results[f"{rows} rows"] = {"steps_per_s": rate, "bytes_per_row": size / rows, **reads[-1]}
        print(
            f"{rows / 1e6:6.1f} M rows: written at {rate:.0f} steps/s "
            f"({rate * SITES / 1e3:.0f} k rows/s), {size / rows:.1f} bytes/row, {files} parts"
        )
    print(f"writer, steps a second: {rate:.0f}  target at least 10: {verdict(10.0, rate)}")
    targets = {"worst sites": 1.0, "a page's data": 3.0}
    weeks = {}
    for name, (small, large) in {n: (reads[0][n], reads[1][n]) for n in reads[0]}.items():
        slope = (large - small) / (SIZES[1] - SIZES[0])
        weeks[name] = large + slope * (STEPS_OF_WEEKS - SIZES[1])
        aim = targets.get(name)
        end = "" if aim is None else f"  target {aim:.0f} s: {verdict(weeks[name], aim)}"
        print(f"{name:24} {small:6.3f} s  {large:6.3f} s  at 168 M rows {weeks[name]:6.2f} s{end}")
    return results | {"extrapolated to 168 M rows": weeks}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.runlog", description=__doc__)
    parser.add_argument("--months", action="store_true", help="20 and 60 M rows, for 1,680 M")
    parser.add_argument("--folder", type=Path, help="with --months: where logs are kept for later")
    given = parser.parse_args()
    if given.months:
        from bench.months import measure_months  # of what stands here

        measure_months(given.folder)
    else:
        measure()
