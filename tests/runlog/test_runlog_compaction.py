"""Parts become few while a run goes on, and a merge that fails costs nothing."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from truths.rows import (
    assert_summaries_are_those_of_casts,
    casts_of_step,
    merge_early,
    parts_of,
    step,
)
from unclamp.errors import UnclampWarning
from unclamp.runlog import Header, RunLog, RunLogWriter, compactor

HEADER = Header(unclamp_version="0.1.0")


def record(writer: RunLogWriter, steps: range, *, sites: int = 5) -> None:
    for number in steps:
        writer.add("steps", step(number))
        writer.add("casts", casts_of_step(number, sites))
        writer.flush()


def wait_for(condition: Callable[[], Any]) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_parts_are_merged_in_tiers_while_the_run_goes_on(tmp_path: Path, monkeypatch: Any):
    merge_early(monkeypatch, fan_in=3)
    with RunLogWriter(tmp_path, header=HEADER) as writer, RunLog.open(tmp_path) as log:
        record(writer, range(22))
        tiers = [
            "part-r0-000000-000008.parquet",
            "part-r0-000009-000017.parquet",
            "part-r0-000018-000020.parquet",
            "part-r0-000021.parquet",
        ]
        wait_for(lambda: parts_of(tmp_path, "casts") == tiers)
        wait_for(lambda: parts_of(tmp_path, "steps") == tiers)
        wait_for(lambda: parts_of(tmp_path, "summaries") == tiers[:3])
        assert log.steps()["step"].to_pylist() == list(range(22))
        assert log.casts().num_rows == 22 * 5
        assert_summaries_are_those_of_casts(log)
    assert parts_of(tmp_path, "casts") == ["part-r0-000000-000021.parquet"]


def test_full_parts_stay_as_they_are_and_are_never_claimed_by_a_later_merge(
    tmp_path: Path, monkeypatch: Any
):
    merge_early(monkeypatch, fan_in=3, full_rows=40)
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        record(writer, range(3))  # 15 rows: a part of the first level
        record(writer, range(3, 4), sites=50)  # a part that is full by itself
        record(writer, range(4, 12))
    assert parts_of(tmp_path, "casts") == [
        "part-r0-000000-000002.parquet",
        "part-r0-000003-000003.parquet",
        "part-r0-000004-000011.parquet",
    ]
    with RunLog.open(tmp_path) as log:
        assert log.casts().num_rows == 11 * 5 + 50
        assert_summaries_are_those_of_casts(log)


def test_merged_casts_are_ordered_by_clamping_and_site_so_that_few_row_groups_are_read(
    tmp_path: Path,
):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        for number in reversed(range(100)):
            writer.add("casts", casts_of_step(number, 1000))
    (part,) = (tmp_path / "casts").glob("*")
    file = pq.ParquetFile(part)
    read = file.read(columns=["site", "step", "saturated"]).to_pylist()
    assert read == sorted(read, key=lambda r: (r["saturated"] == 0, r["site"], r["step"]))
    groups = [file.metadata.row_group(g).column(2) for g in range(file.metadata.num_row_groups)]
    assert {column.path_in_schema for column in groups} == {"site"}
    # A row group of those that clamped, and one of the others.
    assert sum(c.statistics.min <= 500 <= c.statistics.max for c in groups) == 2 < len(groups)


def test_a_merge_that_fails_is_tried_again_and_leaves_no_trace(tmp_path: Path, monkeypatch: Any):
    merge_early(monkeypatch, fan_in=3)
    monkeypatch.setattr(compactor, "RETRY_S", (0.0, 0.0))
    failures = iter([OSError(errno.ENOSPC, "no space left"), MemoryError()])
    write_part = compactor.write_part

    def fail_twice(path: Path, *rows: Any) -> None:
        for failure in failures:
            raise failure
        write_part(path, *rows)

    monkeypatch.setattr(compactor, "write_part", fail_twice)
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        record(writer, range(6))
    assert writer.failure is None
    with RunLog.open(tmp_path) as log:
        assert (log.header.status, log.missing) == ("finished", {})
        assert log.casts().num_rows == 6 * 5
    assert parts_of(tmp_path, "casts") == ["part-r0-000000-000005.parquet"]


def test_merges_that_never_succeed_leave_the_parts_and_say_so_once(
    tmp_path: Path, monkeypatch: Any
):
    merge_early(monkeypatch, fan_in=3)

    def fail(path: Path, *rows: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(compactor, "write_part", fail)
    writer = RunLogWriter(tmp_path, header=HEADER)
    record(writer, range(7))
    with pytest.warns(UnclampWarning, match=r"small parts.*no space left.*intact") as caught:
        writer.close()
    assert len(caught) == 1
    with RunLog.open(tmp_path) as log:
        assert log.header.status == "finished"
        assert log.steps()["step"].to_pylist() == list(range(7))
        assert_summaries_are_those_of_casts(log)


def test_a_flush_waits_for_no_merge_and_an_interrupted_run_begins_none(
    tmp_path: Path, monkeypatch: Any
):
    merge_early(monkeypatch, fan_in=2)
    begun, may_end = threading.Event(), threading.Event()
    read_parts = compactor.read_parts

    def read_slowly(paths: Any) -> Any:
        begun.set()
        may_end.wait()
        return read_parts(paths)

    monkeypatch.setattr(compactor, "read_parts", read_slowly)
    writer = RunLogWriter(tmp_path, header=HEADER)
    record(writer, range(2))
    assert begun.wait(20)
    record(writer, range(2, 9))  # comes back although the merge does not
    assert len(parts_of(tmp_path, "casts")) == 9
    threading.Timer(0.2, may_end.set).start()
    writer.close("interrupted")
    assert len(parts_of(tmp_path, "casts")) == 9
    with RunLog.open(tmp_path) as log:
        assert log.steps().num_rows == 9


def test_a_folder_name_with_an_equals_sign_adds_no_column(tmp_path: Path):
    with RunLogWriter(tmp_path / "lr=0.1" / "run", header=HEADER) as writer:
        record(writer, range(2))
    with RunLog.open(tmp_path / "lr=0.1" / "run") as log:
        assert log.steps().num_rows == 2
        assert "lr" not in log.sql("FROM casts").column_names


def test_queries_during_merges_see_every_flushed_row_once(tmp_path: Path, monkeypatch: Any):
    merge_early(monkeypatch, fan_in=2)
    with RunLogWriter(tmp_path, header=HEADER) as writer, RunLog.open(tmp_path) as log:
        for number in range(60):
            record(writer, range(number, number + 1))
            (seen,) = log.sql(
                "SELECT count(*) AS casts, count(DISTINCT (step, site)) AS distinct_casts, "
                "(SELECT sum(steps) FROM summaries) AS summed FROM casts"
            ).to_pylist()
            assert seen == dict.fromkeys(("casts", "distinct_casts", "summed"), 5 * (number + 1))
