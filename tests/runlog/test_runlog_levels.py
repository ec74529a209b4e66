"""Coarser summaries add up to what casts say, whichever of them are there."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from truths.rows import casts_of_step, merge_early, parts_of, step
from unclamp.runlog import Header, RunLog, RunLogWriter, compact, levels
from unclamp.runlog.levels import find_levels, level_for, window_steps
from unclamp.runlog.windows import Windows, source_of

SITES, A_FLUSH, STEPS = 3, 50, 3_200


def write(path: Path, steps: range, **more: Any) -> Path:
    header = Header(unclamp_version="0", run_id=more.pop("run_id", "one"))
    with RunLogWriter(path, header=header, flush_interval_s=1e9, **more) as writer:
        ids = range(writer.first_site, writer.first_site + SITES)
        names = {"site": list(ids), "fqn": [f"m{i}" for i in range(SITES)]}
        same = {"role": "input", "format": "e4m3fn", "scaling": "delayed", "format_max": 448.0}
        writer.add("sites", names | {name: [value] * SITES for name, value in same.items()})
        for number in steps:
            rows = casts_of_step(number, SITES)
            writer.add("steps", step(number))
            writer.add("casts", rows | {"site": rows["site"] + writer.first_site})
            if number % A_FLUSH == A_FLUSH - 1:
                writer.flush()
    return path


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a part full after 100 steps."""
    merge_early(monkeypatch, fan_in=2, full_rows=2 * A_FLUSH * SITES)


def assert_windows_are_those_of_casts(log: RunLog, windows: Windows) -> None:
    """Compare with plain sums over the rows."""
    cut, sums = windows.cut, defaultdict(list)
    for row in log.sql("SELECT casts.*, fqn FROM casts JOIN sites USING (site)").to_pylist():
        sums[row["fqn"], (row["step"] - cut.first) // cut.size].append(row)
    found = windows.rows.to_pylist()
    assert len(found) == len(sums)
    for row in found:
        rows = sums[windows.sites[row["place"]].fqn, row["cell"]]
        errors = [r["saturated_error"] for r in rows]
        assert row["steps"] == len(rows)
        for name in ("microsteps", "elements", "saturated", "underflowed", "nonfinite", "recast"):
            assert row[name] == sum(r[name] for r in rows)
        assert row["clamped"] == sum(r["saturated"] > 0 for r in rows)
        assert row["amax_max"] == max(r["amax"] for r in rows)
        assert row["scaled_amax_max"] == max(r["amax"] * r["scale"] for r in rows)
        assert (row["scale_min"], row["scale_max"]) == (
            min(r["scale"] for r in rows),
            max(r["scale"] for r in rows),
        )
        assert row["saturated_error_sum"] == pytest.approx(sum(errors), rel=1e-12)
        assert row["saturated_error_max"] == max(errors)
        worst = [r["step"] for r in rows if r["saturated_error"] == max(errors) > 0]
        assert row["worst_step"] == min(worst, default=None)


@pytest.mark.usefixtures("early")
def test_windows_of_a_long_run_are_read_from_the_level_that_has_enough_of_them(tmp_path: Path):
    write(tmp_path, range(STEPS))
    assert {level: len(files) for level, files in find_levels(tmp_path).items()} == {1: 8, 2: 2}
    with RunLog.open(tmp_path) as log:
        for most, level, size in (  # fewer than half of them would be too few
            *((2, 2, 1600), (3, 2, 1600), (4, 2, 1600), (5, 1, 800), (8, 1, 400)),
            *((9, 1, 400), (16, 1, 400), (17, 0, 200)),
        ):
            windows = log.windows(most=most)
            assert (windows.cut.level, windows.cut.size) == (level, size)
            assert_windows_are_those_of_casts(log, windows)


@pytest.mark.usefixtures("early")
def test_a_file_counts_only_where_all_parts_in_its_range_are_there(tmp_path: Path):
    write(tmp_path, range(STEPS))
    gone = parts_of(tmp_path, "casts")[5]
    (tmp_path / "casts" / gone).unlink()
    with RunLog.open(tmp_path) as log:
        windows = log.windows(most=2)
        assert windows.cut.level == 2
        assert sum(t.rows for t in windows.totals) == (STEPS - 100) * SITES
        assert_windows_are_those_of_casts(log, windows)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("first", [1_600, 1_650, 2_050, 3_199])
def test_what_a_later_attempt_replaces_is_in_no_window(tmp_path: Path, first: int):
    write(tmp_path, range(STEPS))
    write(tmp_path, range(first, STEPS + 900), run_id="two", resume=True)
    with RunLog.open(tmp_path) as log:
        for most in (2, 9):
            windows = log.windows(most=most)
            assert windows.cut.level > 0
            assert sum(total.rows for total in windows.totals) == (STEPS + 900) * SITES
            assert_windows_are_those_of_casts(log, windows)


@pytest.mark.usefixtures("early")
def test_a_level_that_cannot_be_written_costs_no_row_and_compact_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path, *rows: Any) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(levels, "write_part", fail)
        write(tmp_path, range(STEPS))
    assert find_levels(tmp_path) == {}
    with RunLog.open(tmp_path) as log:
        fine = log.windows(most=2)
        assert fine.cut.level == 0
        assert_windows_are_those_of_casts(log, fine)
    compact(tmp_path, None)
    with RunLog.open(tmp_path) as log:
        coarse = log.windows(most=2)
        assert coarse.cut.level > 0
        assert_windows_are_those_of_casts(log, coarse)
        assert coarse.totals == fine.totals


@pytest.mark.usefixtures("early")
def test_a_reader_that_is_at_it_while_a_compaction_removes_levels_takes_finer_ones(tmp_path: Path):
    write(tmp_path, range(STEPS))
    with RunLog.open(tmp_path) as log:
        source = source_of(log.windows(most=2).cut)
        levels.remove_levels(tmp_path)
        for query in (f"FROM {source.table}", "FROM stored_summaries_1"):
            (found,) = log.sql(f"SELECT sum(steps)::BIGINT AS rows {query}").to_pylist()
            assert found["rows"] == STEPS * SITES
        assert_windows_are_those_of_casts(log, log.windows(most=2))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("old", [slice(None), slice(0, 7)], ids=["all", "some"])
def test_levels_are_made_of_summaries_that_an_earlier_version_wrote(tmp_path: Path, old: slice):
    write(tmp_path, range(STEPS))
    levels.remove_levels(tmp_path)
    later = ["sqnr_row_median_db_min", "sqnr_row_steps"]
    for path in sorted((tmp_path / "summaries").glob("*.parquet"))[old]:
        pq.write_table(pq.read_table(path).drop_columns(later), path)
    compact(tmp_path, None)
    assert {level: len(files) for level, files in find_levels(tmp_path).items()} == {1: 8, 2: 2}
    with RunLog.open(tmp_path) as log:
        windows = log.windows(most=2)
        assert_windows_are_those_of_casts(log, windows)
        assert windows.rows["sqnr_row_steps"][0].as_py() is None  # not known of all


@pytest.mark.parametrize("seed", range(3))
def test_a_level_is_the_highest_that_has_as_many_windows_as_are_asked_for(seed: int):
    for _ in range(200):
        generator = np.random.default_rng(seed)
        steps, most, coarsest = (int(n) for n in generator.integers(1, (10**7, 400, 6)))
        level = level_for(steps, most=most, coarsest=coarsest)
        enough = [n for n in range(coarsest + 1) if steps // window_steps(n) >= most]
        assert level == max(enough, default=0)
