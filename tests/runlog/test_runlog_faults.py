"""What goes wrong under a run log: the training goes on, one warning says what is missing."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from patience import PATIENCE_S
from truths.rows import parts_of, step
from unclamp.errors import UnclampWarning
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.worker import Worker

HEADER = Header(unclamp_version="0.1.0", world_size=2)

TRAIN = """
import os, resource, sys, warnings
warnings.simplefilter("always")
from unclamp.runlog import Header, RunLogWriter
header = Header(unclamp_version="0.1", world_size=2)
writer = RunLogWriter(sys.argv[1], header=header, rank=int(sys.argv[2]), flush_interval_s=60)
def record(step):
    text = os.urandom(40_000).hex() if step else ""
    writer.add("events", {{"step": [step], "kind": ["note"], "data": [text]}})
    writer.add("steps", {{"step": [step], "time_s": [0.0]}})
    writer.flush()
record(0)
{fault}
for step in range(1, 5):
    record(step)
writer.close()
print("trained")
"""
FULL_DISK = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
READ_ONLY = """
if os.getuid() == 0:
    os.setuid(65534)
else:
    for folder in ("", "/events", "/steps"):
        os.chmod(sys.argv[1] + folder, 0o555)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path) / "run"


def train(path: Path, rank: int, fault: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(fault=fault), str(path), str(rank)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    assert done.stderr.count("UnclampWarning") == 1
    return done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_stops_the_log_and_the_log_says_what_is_missing(folder: Path, rank: int):
    if rank == 1:
        RunLogWriter(folder, header=HEADER).close()
    warning = train(folder, rank, FULL_DISK)
    assert "File too large" in warning
    with RunLog.open(folder) as log:
        assert log.events()["step"].to_pylist() == [0]
        assert log.steps()["step"].to_pylist() in ([0], [0, 1])
        assert list(log.missing) == [rank]
        assert log.missing[rank].startswith("1 row of events, everything since 2")
        assert log.missing[rank] in warning or "File too large" in log.missing[rank]
        assert "rows missing" in repr(log)
        assert log.header.status == ("failed" if rank == 0 else "finished")
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_that_becomes_read_only_leaves_what_was_written(folder: Path):
    warning = train(folder, 0, READ_ONLY)
    assert "Permission" in warning
    assert "1 row of steps, 1 row of events, everything since" in warning
    with RunLog.open(folder) as log:
        assert log.steps()["step"].to_pylist() == [0]
        assert log.header.status == "running"  # the header could not be written either
    folder.chmod(0o755)


def end_thread(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, at its next instruction of Python."""
    assert thread.ident is not None
    ident, error = ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error) == 1


def exit_thread() -> dict[str, list]:
    raise SystemExit


def assert_stops_once(writer: RunLogWriter, fault: Callable[[], None], match: str) -> None:
    """Check that after `fault` the writer warns once, hangs nowhere and tells the log."""
    writer.add("steps", step(0))
    writer.flush()
    fault()
    with pytest.warns(UnclampWarning, match=match) as caught:  # noqa: PT031
        for number in range(1, 4):
            writer.add("steps", step(number))
            writer.flush()
        writer.close()
    assert len(caught) == 1
    with RunLog.open(writer.path) as log:
        assert (log.header.status, list(log.missing)) == ("failed", [0])
        assert log.steps()["step"].to_pylist() == [0]


def test_an_exit_in_a_function_stops_the_log(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60)
    assert_stops_once(writer, lambda: writer.add("steps", exit_thread), "SystemExit")


def test_a_thread_that_is_ended_stops_the_log(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60)

    def fault() -> None:
        thread = writer._worker._thread
        assert thread is not None
        end_thread(thread)
        writer._worker._queue.put(threading.Event())  # wakes it, and is never answered
        thread.join()

    assert_stops_once(writer, fault, "SystemExit")


def test_a_thread_that_vanishes_before_it_answers_a_flush_does_not_hang_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Worker, "_work", lambda self: self._queue.get() and self._queue.get())
    writer = RunLogWriter(tmp_path, header=HEADER)
    writer.add("steps", step(0))  # begins the thread
    with pytest.warns(UnclampWarning, match="its thread has ended") as caught:
        writer.flush()
    writer.add("steps", step(0))
    writer.close()
    assert len(caught) == 1
    assert RunLog.open(tmp_path).header.status == "failed"


def test_a_compactor_that_is_ended_stops_no_log(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER)
    worker = writer._compactor._worker
    worker._begin()  # its thread would begin with the first part
    assert worker._thread is not None
    end_thread(worker._thread)
    for number in range(3):
        writer.add("steps", step(number))
        writer.flush()
    with pytest.warns(UnclampWarning, match=r"small parts.*SystemExit") as caught:
        writer.close()
    assert len(caught) == 1
    assert len(parts_of(tmp_path, "steps")) == 3
    assert RunLog.open(tmp_path).header.status == "finished"


def test_ctrl_c_in_close_can_be_closed_again(tmp_path: Path):
    writer = RunLogWriter(tmp_path, header=HEADER, flush_interval_s=60)

    def slow() -> dict[str, list]:
        while not writer._closing:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), 2)  # while close() waits for this thread
        time.sleep(1.0)
        return step(0)

    writer.add("steps", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some libraries take it
    try:
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    finally:
        signal.signal(signal.SIGINT, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.close("interrupted")
    with RunLog.open(tmp_path) as log:
        assert (log.header.status, log.steps().num_rows) == ("interrupted", 1)


def test_rows_added_in_a_forked_process_are_left_out(tmp_path: Path):
    with RunLogWriter(tmp_path, header=HEADER) as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        if (child := os.fork()) == 0:
            writer.add("steps", step(1))
            writer.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        writer.add("steps", step(0))
    assert RunLog.open(tmp_path).steps()["step"].to_pylist() == [0]
