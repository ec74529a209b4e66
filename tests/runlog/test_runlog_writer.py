import json
import shutil
import warnings
from pathlib import Path
from threading import get_ident
from time import monotonic, sleep

import duckdb
import pyarrow.parquet as pq
import pytest

from unclamp.errors import RunLogError, UnclampWarning
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.runlog.parts import PartName

HEADER = Header(unclamp_version="0.1.0", world_size=2, recipe={"input": "delayed"})


def step(number: int) -> dict[str, list]:
    return {"step": [number], "time_s": [float(number)], "loss": [1.0]}


def event(number: int) -> dict[str, list]:
    return {"step": [number], "kind": ["spike"], "data": ["{}"]}


def status(path: Path) -> str:
    return json.loads((path / "run.json").read_text())["status"]


def test_a_folder_is_a_run_from_the_start(tmp_path: Path):
    with RunLogWriter(tmp_path / "a" / "run", header=HEADER):
        assert status(tmp_path / "a" / "run") == "running"
    assert status(tmp_path / "a" / "run") == "finished"


def test_an_exception_closes_as_failed(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER)
    writer.add("steps", step(0))
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert status(tmp_path) == "failed"
    assert RunLog.open(tmp_path).steps().num_rows == 1


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_an_end_from_outside_closes_as_interrupted(tmp_path: Path, ending: type[BaseException]):
    with pytest.raises(ending), RunLogWriter(tmp_path, header=HEADER):
        raise ending
    assert status(tmp_path) == "interrupted"


def test_close_is_idempotent_and_the_first_status_stays(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER)
    writer.close("interrupted")
    writer.close()
    writer.flush()
    assert status(tmp_path) == "interrupted"


def test_add_after_close_is_refused(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER)
    writer.close()
    with pytest.raises(RunLogError, match="closed"):
        writer.add("steps", step(0))


def test_unknown_status_is_refused(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER)
    with writer, pytest.raises(RunLogError, match="status must be one of"):
        writer.close("done")  # type: ignore[arg-type]


def test_unfit_rows_are_refused_at_the_call(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        with pytest.raises(RunLogError, match="no table 'cast'"):
            writer.add("cast", dict)
        with pytest.raises(RunLogError, match="no column"):
            writer.add("steps", step(0) | {"x": [1]})
    assert writer.failure is None


def test_a_function_is_called_on_another_thread_and_only_once(tmp_path: Path):
    callers: list[int] = []

    def columns() -> dict[str, list]:
        callers.append(get_ident())
        return step(0)

    with RunLogWriter(tmp_path, header=HEADER) as writer:
        writer.add("steps", columns)
        writer.flush()
    assert len(callers) == 1
    assert callers != [get_ident()]


def names_in(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_parts_are_numbered_compressed_merged_and_leave_no_other_file(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60) as writer:
        for number in range(3):
            writer.add("steps", step(number))
            writer.flush()
        names = names_in(tmp_path)
        parts = [f"steps/part-r0-00000{n}.parquet" for n in range(3)]
        assert names == [".writer-r0.json", "run.json", *parts]
        group = pq.ParquetFile(tmp_path / parts[0]).metadata.row_group(0)
    merged = "steps/part-r0-000000-000002.parquet"
    assert names_in(tmp_path) == [".writer-r0.json", "run.json", merged]
    assert group.column(0).compression == "ZSTD"


def test_rows_reach_the_disk_without_a_flush(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER, flush_interval_s=0.05) as writer:
        writer.add("steps", step(0))
        deadline = monotonic() + 5
        while not list(tmp_path.glob("steps/*.parquet")) and monotonic() < deadline:
            sleep(0.01)
        assert RunLog.open(tmp_path).steps().num_rows == 1


def test_a_busy_queue_does_not_put_off_the_flush(tmp_path: Path):
    def slow_columns() -> dict[str, list]:
        sleep(0.005)
        return step(0)

    with RunLogWriter(tmp_path, header=HEADER, flush_interval_s=0.05) as writer:
        for _ in range(50):
            writer.add("steps", slow_columns)
    (part,) = tmp_path.glob("steps/*.parquet")
    name = PartName.parse(part.name)
    assert name is not None
    assert name.last > 0  # several were flushed, and merged at the end


def test_float_columns_carry_no_statistics_that_hide_nan(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        for loss in (1.0, float("nan")):
            writer.add("steps", step(0) | {"loss": [loss]})
    found = duckdb.execute(f"FROM '{tmp_path}/steps/*.parquet' WHERE loss > 5").fetchall()
    assert len(found) == 1


def test_duckdb_reads_the_parts_of_many_runs_from_a_glob(tmp_path: Path):
    cast = {"amax": [1.0], "scale": [2.0], "saturated_error": [0.0], "step": [0], "site": [0]}
    counts = ("elements", "saturated", "underflowed", "nonfinite", "recast", "microsteps")
    for name in ("a", "b/c"):
        with RunLogWriter(tmp_path / name, header=HEADER) as writer:
            writer.add("casts", cast | {count: [1] for count in counts})
    count = duckdb.execute(f"SELECT count(*) FROM '{tmp_path}/**/casts/*.parquet'").fetchone()
    assert count == (2,)


# What is refused


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunLogError, match="is a file"):
        RunLogWriter(tmp_path / "run", header=HEADER)


def test_a_folder_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match="cannot create"):
        RunLogWriter(tmp_path / "file" / "run", header=HEADER)


def test_a_folder_that_holds_a_run_is_refused_and_unharmed(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer:
        writer.add("steps", step(0))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunLogError, match="already holds a run"):
        RunLogWriter(tmp_path, header=HEADER)
    assert (tmp_path / "run.json").read_bytes() == before
    (tmp_path / "run.json").unlink()  # even without its header
    with pytest.raises(RunLogError, match="already holds a run"):
        RunLogWriter(tmp_path, header=HEADER)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_foreign_folder_is_refused(tmp_path: Path, rank: int):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunLogError, match=r"holds \['thesis.tex'\]"):
        RunLogWriter(tmp_path, header=HEADER, rank=rank)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_ranks_writer_never_overwrites_its_own_earlier_parts(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER, rank=1) as writer:
        writer.add("steps", step(0))
    with pytest.raises(RunLogError, match="already holds a run"):
        RunLogWriter(tmp_path, header=HEADER, rank=1)


@pytest.mark.parametrize("metadata", [{"clip": float("inf")}, {"path": Path("x")}])
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, metadata: dict):
    with pytest.raises(RunLogError, match="JSON"):
        RunLogWriter(tmp_path, header=Header(unclamp_version="0.1", metadata=metadata))


def test_unfit_arguments_are_refused(tmp_path: Path):
    with pytest.raises(RunLogError, match=r"rank must be in 0\.\.1, got 2"):
        RunLogWriter(tmp_path, header=HEADER, rank=2)
    with pytest.raises(RunLogError, match="flush_interval_s"):
        RunLogWriter(tmp_path, header=HEADER, flush_interval_s=0)


# What fails in mid-run


def test_a_full_stop_of_the_log_warns_once_and_the_training_goes_on(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60)
    writer.add("steps", step(0))
    writer.flush()
    (tmp_path / "events").write_text("a file where a folder has to be")
    writer.add("events", event(1))
    with pytest.warns(UnclampWarning, match=r"FileExistsError.*1 row of events, everything since"):
        writer.flush()
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        for number in range(2, 5):
            writer.add("steps", step(number))
            writer.flush()
        writer.close()
    assert later == []
    assert isinstance(writer.failure, FileExistsError)
    assert status(tmp_path) == "failed"
    assert RunLog.open(tmp_path).steps()["step"].to_pylist() == [0]


def test_a_run_that_vanishes_stays_away_and_warns_at_close(tmp_path: Path):
    writer = RunLogWriter(tmp_path / "run", header=HEADER, flush_interval_s=60)
    writer.add("steps", step(0))
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UnclampWarning, match="1 row of steps") as caught:
        writer.close()
    assert len(caught) == 1
    assert isinstance(writer.failure, FileNotFoundError)
    assert not (tmp_path / "run").exists()


def test_a_header_that_cannot_be_closed_warns(tmp_path: Path):
    writer = RunLogWriter(tmp_path / "run", header=HEADER)
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UnclampWarning, match=r"the status 'finished' in run\.json"):
        writer.close()


def test_a_function_that_raises_stops_the_log_and_keeps_the_rows_before_it(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60)
    writer.add("steps", step(0))
    writer.add("steps", lambda: step(1) | {"unheard_of": [1]})
    with pytest.warns(UnclampWarning, match="unheard_of"):
        writer.flush()
    writer.add("steps", step(2))
    writer.close()
    assert isinstance(writer.failure, RunLogError)
    assert RunLog.open(tmp_path).steps()["step"].to_pylist() == [0]


def test_a_failure_leaves_no_temporary_file(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60)
    (tmp_path / "steps" / "part-r0-000000.parquet").mkdir(parents=True)  # cannot be replaced
    writer.add("steps", step(0))
    with pytest.warns(UnclampWarning, match="IsADirectoryError"):
        writer.close()
    assert not list(tmp_path.rglob("*.tmp"))
