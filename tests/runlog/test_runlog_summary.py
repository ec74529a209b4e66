"""Summaries say what the casts say, however those lie on disk."""

import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truths.rows import (
    COUNTS,
    assert_summaries_are_those_of_casts,
    cast_row,
    columns,
    merge_early,
    parts_of,
    uncounted_row,
)
from unclamp.errors import UnclampWarning
from unclamp.runlog import VIEWS, Header, RunLog, RunLogWriter, compactor

HEADER = Header(unclamp_version="0.1.0", world_size=3)

floats = st.floats(0, 2.0**40, width=32)
rows = st.fixed_dictionaries(
    {
        "step": st.integers(-101, 301),
        "rank": st.integers(0, 2),
        "site": st.integers(0, 2),
        "amax": floats,
        "scale": floats,
        "saturated_error": st.sampled_from([0.0, 0.25, 0.5]) | st.floats(0, 1),
        "sqnr_db": st.none() | st.just(math.inf) | st.floats(-40, 200),
        **{name: st.integers(0, 2**30) for name in COUNTS},
        "clamped": st.none() | st.booleans(),
    }
) | st.builds(
    uncounted_row,
    st.integers(-101, 301),
    st.integers(0, 2),
    rank=st.integers(0, 2),
    amax=floats,
    scale=floats,
    clamped=st.booleans(),
)


class Disk:
    """Let so many changes by the compactor through; then be as after a power cut."""

    def __init__(self, changes: int) -> None:
        self.left = changes
        self.write, self.remove = compactor.write_part, compactor._remove

    def may_change(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def write_part(self, path: Path, *rows: pa.Table) -> None:
        if not self.may_change():
            raise OSError("power cut")
        self.write(path, *rows)

    def remove_part(self, path: Path) -> None:
        if self.may_change():
            self.remove(path)


def write_and_crash(path: str, batches: list[list[dict[str, Any]]], disk: Disk) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnclampWarning)
        merge_early(patch, fan_in=2, full_rows=5)
        patch.setattr(compactor, "write_part", disk.write_part)
        patch.setattr(compactor, "_remove", disk.remove_part)
        with RunLogWriter(path, header=HEADER) as writer:
            for batch in batches:
                writer.add("casts", columns(batch))
                writer.flush()


@settings(max_examples=25)
@given(st.lists(st.lists(rows, max_size=5), max_size=9), st.integers(0, 40))
def test_summaries_equal_the_aggregate_of_casts_at_every_point_of_a_merge(
    batches: list[list[dict[str, Any]]], changes: int
):
    with TemporaryDirectory() as folder:
        write_and_crash(folder, batches, Disk(changes))
        with RunLog.open(folder) as log:
            written = [row for batch in batches for row in batch]
            key = lambda row: (row["step"], row["rank"], row["site"])  # noqa: E731
            read = log.casts().select(list(written[0]) if written else []).to_pylist()
            assert read == sorted(written, key=key)  # stable: of equal keys the older is first
            assert_summaries_are_those_of_casts(log)


@pytest.mark.parametrize("changes", range(15))
def test_no_crash_in_a_merge_of_merges_loses_or_doubles_rows(tmp_path: Path, changes: int):
    batches = [[cast_row(step, 0), cast_row(step, 1)] for step in range(4)]
    write_and_crash(str(tmp_path), batches, Disk(changes))
    with RunLog.open(tmp_path) as log:
        assert log.casts()["step"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert_summaries_are_those_of_casts(log)
    if changes == 14:  # two merges of two parts, then one of those: nothing was cut off
        assert parts_of(tmp_path, "casts") == ["part-r0-000000-000003.parquet"]
        assert parts_of(tmp_path, "summaries") == ["part-r0-000000-000003.parquet"]


def summary_of(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one summary row, stored as it is after a merge, and equal before one."""
    with RunLogWriter(path, header=HEADER) as writer:
        writer.add("casts", columns(rows))
        writer.flush()
        with RunLog.open(path) as log:
            before = log.summaries()
    with RunLog.open(path) as log:
        assert parts_of(path, "summaries") == ["part-r0-000000-000000.parquet"]
        assert repr(log.summaries().to_pylist()) == repr(before.to_pylist())
        (row,) = log.summaries().to_pylist()
    return row


def test_the_worst_step_is_the_first_of_equals_and_null_without_clamping(tmp_path: Path):
    errors = {7: 0.5, 3: 0.5, 1: 0.25}
    rows = [cast_row(step, 0, saturated_error=error) for step, error in errors.items()]
    assert summary_of(tmp_path / "a", rows)["worst_step"] == 3
    assert summary_of(tmp_path / "b", [cast_row(0, 0)])["worst_step"] is None


def test_exact_casts_have_an_infinite_ratio_that_enters_no_mean(tmp_path: Path):
    rows = [cast_row(s, 0, sqnr_db=v) for s, v in enumerate([math.inf, 20.0, None, 30.0])]
    row = summary_of(tmp_path / "a", rows)
    assert (row["sqnr_db_min"], row["sqnr_db_mean"], row["sqnr_steps"]) == (20.0, 25.0, 2)
    row = summary_of(tmp_path / "b", [cast_row(0, 0, sqnr_db=math.inf)])
    assert (row["sqnr_db_min"], row["sqnr_db_mean"], row["sqnr_steps"]) == (math.inf, None, 0)
    row = summary_of(tmp_path / "c", [cast_row(0, 0)])
    assert (row["sqnr_db_min"], row["sqnr_db_mean"], row["sqnr_steps"]) == (None, None, 0)


def test_nan_is_above_every_number_and_sums_stay_in_int64(tmp_path: Path):
    large = 2**63 - 1
    rows = [cast_row(s, 0, amax=a, elements=large) for s, a in enumerate([math.nan, 1.0])]
    row = summary_of(tmp_path, rows)
    assert math.isnan(row["amax_max"])
    assert row["elements"] == large


@pytest.mark.parametrize(("step", "first_step"), [(99, 0), (100, 100), (-1, -100), (-100, -100)])
def test_windows_begin_at_multiples_of_a_hundred_steps(tmp_path: Path, step: int, first_step: int):
    assert summary_of(tmp_path, [cast_row(step, 0)])["first_step"] == first_step


@pytest.mark.parametrize("step", [-(2**63), 2**63 - 1])
def test_the_last_steps_of_int64_break_nothing(tmp_path: Path, step: int):
    assert summary_of(tmp_path, [cast_row(step, 0)])["steps"] == 1


def test_a_log_without_casts_has_empty_summaries(tmp_path: Path):
    RunLogWriter(tmp_path, header=HEADER).close()
    with RunLog.open(tmp_path) as log:
        assert (log.summaries().num_rows, log.summaries().schema) == (0, VIEWS["summaries"])


def test_a_log_without_stored_summaries_has_them_all_the_same(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        writer.add("casts", columns([cast_row(step, step % 2) for step in range(250)]))
        writer.close("interrupted")  # at once, without a merge, as an older unclamp left it
    assert not (tmp_path / "summaries").exists()
    with RunLog.open(tmp_path) as log:
        assert log.summaries()["first_step"].to_pylist() == [0, 0, 100, 100, 200, 200]
        assert_summaries_are_those_of_casts(log)
