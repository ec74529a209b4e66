"""Rows that the tests of the run log write, and what they must sum to."""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclamp.runlog import SUMMARY_STEPS, VIEWS, RunLog, compactor

COUNTS = ("elements", "saturated", "underflowed", "nonfinite", "recast", "microsteps")
Row = Mapping[str, Any]


def step(number: int) -> dict[str, list]:
    return {"step": [number], "time_s": [float(number)]}


def cast_row(step: int, site: int, **changes: Any) -> dict[str, Any]:
    floats = {"amax": 1.5, "scale": 2.0, "saturated_error": 0.0, "sqnr_db": None}
    return {"step": step, "rank": 0, "site": site} | floats | dict.fromkeys(COUNTS, 1) | changes


def columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def casts_of_step(number: int, sites: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    clamped = generator.random(sites) < 0.3
    return {
        "step": np.full(sites, number),
        "site": np.arange(sites, dtype=np.int32),
        "amax": generator.random(sites).astype(np.float32),
        "scale": np.exp2(generator.integers(0, 8, sites)).astype(np.float32),
        "elements": np.full(sites, 1024),
        "saturated": clamped * generator.integers(1, 9, sites),
        "underflowed": generator.integers(0, 9, sites),
        "nonfinite": np.zeros(sites, dtype=np.int64),
        "recast": np.zeros(sites, dtype=np.int64),
        "saturated_error": clamped * generator.random(sites),
        "microsteps": np.full(sites, 2, dtype=np.int32),
    }


def summarise(casts: Iterable[Row]) -> list[dict[str, Any]]:
    """Sum up rows of casts in plain Python."""
    groups = defaultdict(list)
    for row in casts:
        window = math.floor(row["step"] / SUMMARY_STEPS) * SUMMARY_STEPS
        groups[window, row["rank"], row["site"]].append(row)
    return [_summary(*key, rows=rows) for key, rows in sorted(groups.items())]


def _summary(first_step: int, rank: int, site: int, *, rows: list[Row]) -> dict[str, Any]:
    errors = [row["saturated_error"] for row in rows if row["saturated_error"] is not None]
    most = max(errors, default=None)
    worst = [row["step"] for row in rows if most and row["saturated_error"] == most]
    inspected = [row["sqnr_db"] for row in rows if row["sqnr_db"] is not None]
    finite = [value for value in inspected if math.isfinite(value)]
    by_row = [
        row["sqnr_row_median_db"] for row in rows if row.get("sqnr_row_median_db") is not None
    ]
    return {
        "first_step": first_step,
        "rank": rank,
        "site": site,
        "steps": len(rows),
        **{name: _total(row[name] for row in rows) for name in COUNTS},
        "clamped": sum(_has_clamped(row) for row in rows),
        "amax_max": max(row["amax"] for row in rows),
        "amax_mean": math.fsum(row["amax"] for row in rows) / len(rows),
        "scaled_amax_max": max(row["amax"] * row["scale"] for row in rows),
        "scale_min": min(row["scale"] for row in rows),
        "scale_max": max(row["scale"] for row in rows),
        "saturated_error_sum": math.fsum(errors) if errors else None,
        "saturated_error_max": most,
        "worst_step": min(worst, default=None),
        "sqnr_db_min": min(inspected, default=None),
        "sqnr_db_mean": math.fsum(finite) / len(finite) if finite else None,
        "sqnr_steps": len(finite),
        "uncounted": sum(row["elements"] is None for row in rows),
        "undecided": sum(row.get("clamped") is None and row["saturated"] is None for row in rows),
        "sqnr_row_median_db_min": min(by_row, default=None),
        "sqnr_row_steps": len(by_row),
    }


def _total(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _has_clamped(row: Row) -> bool:
    told = row.get("clamped")
    return bool(row["saturated"]) if told is None else told


def uncounted_row(step: int, site: int, **changes: Any) -> dict[str, Any]:
    """Return a row of which only the largest element is known."""
    nothing = dict.fromkeys(
        ("elements", "saturated", "underflowed", "nonfinite", "saturated_error"), None
    )
    return cast_row(step, site, **nothing, **{"recast": 0, "clamped": False} | changes)


def assert_summaries_are_those_of_casts(log: RunLog, *, unknown: Sequence[str] = ()) -> None:
    """Compare the view with the log's own casts: sums to a rounding, all else exactly.

    Stored summaries of older logs have nothing in the columns that came later, `unknown`.
    """
    expected = summarise(log.casts().to_pylist())
    expected = [row | dict.fromkeys(unknown) for row in expected]
    found = log.summaries()
    assert found.schema == VIEWS["summaries"]
    assert found.num_rows == len(expected)
    rounded = ("amax_mean", "saturated_error_sum", "sqnr_db_mean")
    for row, wanted in zip(found.to_pylist(), expected, strict=True):
        for name in rounded:
            value, exact = row.pop(name), wanted.pop(name)
            assert value == (exact if exact is None else pytest.approx(exact, rel=1e-9))
        assert row == wanted


def as_schema_1(run: Path, *, world_size: int = 1) -> None:
    """Make a run one of schema 1: no rank in sites, a rank's own ids, cadence in metadata."""
    shutil.rmtree(run / "summaries", ignore_errors=True)  # of the ids of now
    header = json.loads((run / "run.json").read_text())
    for field in ("cadence", "observed"):
        del header[field]
    (run / "run.json").write_text(json.dumps(header | {"schema_version": 1}))
    for part in [*run.glob("sites/*.parquet"), *run.glob("casts/*.parquet")]:
        with pq.ParquetFile(part) as file:
            rows = file.read()
        at, column = rows.schema.get_field_index("site"), rows.schema.field("site")
        ids = [site // world_size for site in rows["site"].to_pylist()]
        rows = rows.set_column(at, column, pa.array(ids, column.type))
        pq.write_table(rows.drop_columns("rank") if part.parent.name == "sites" else rows, part)


def merge_early(
    monkeypatch: pytest.MonkeyPatch, *, fan_in: int = 3, full_rows: int = 1_000_000
) -> None:
    """Make parts merge, and fill up, at sizes that a test reaches."""
    monkeypatch.setattr(compactor, "FAN_IN", fan_in)
    monkeypatch.setattr(compactor, "FULL_ROWS", full_rows)


def parts_of(path: Path, table: str) -> list[str]:
    return sorted(part.name for part in (path / table).glob("*.parquet"))
