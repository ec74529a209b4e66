"""The worker: in order, through failures, Ctrl-C, forks and the interpreter's end."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patience import PATIENCE_S
from unclamp.worker import Worker


def test_things_are_handled_in_order_and_all_before_it_closes() -> None:
    done: list[int] = []

    def slowly(item: int) -> None:
        time.sleep(0.001)
        done.append(item)

    worker = Worker(slowly, name="test")
    for i in range(50):
        worker.put(i)
    worker.close()
    assert done == list(range(50))
    worker.put(50)  # too late
    worker.close()
    assert done == list(range(50))


def test_without_work_there_is_no_thread() -> None:
    before = threading.active_count()
    worker = Worker(print, name="test")
    assert threading.active_count() == before
    worker.wait()
    worker.close()


def test_waiting_is_for_what_was_put_before() -> None:
    done: list[int] = []
    worker = Worker(done.append, name="test")
    for i in range(20):
        worker.put(i)
        worker.wait()
        assert done == list(range(i + 1))
    worker.close()


def test_calls_that_are_due_come_by_the_clock_when_waited_for_and_at_the_end() -> None:
    calls: list[str] = []
    by_clock = Worker(print, name="test", on_due=lambda: calls.append("due"), interval_s=0.01)
    by_clock._begin()
    deadline = time.monotonic() + 30
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    by_clock.close()
    assert len(calls) >= 4
    told: list[str] = []
    asked = Worker(
        told.append,
        name="test",
        on_begin=lambda: told.append("begin"),
        on_due=lambda: told.append("due"),
    )
    asked.put("one")
    asked.put("two")
    asked.wait()
    asked.put("three")
    asked.close()
    assert told == ["begin", "one", "two", "due", "three", "due"]


def test_a_failure_is_kept_and_the_rest_is_handled() -> None:
    done: list[int] = []

    def handle(item: int) -> None:
        if item == 1:
            raise SystemExit("for this one")
        done.append(item)

    worker = Worker(handle, name="test")
    for i in range(3):
        worker.put(i)
    worker.close()
    assert done == [0, 2]
    assert isinstance(worker.take_failure(), SystemExit)
    assert worker.take_failure() is None


def end_thread(worker: Worker[Callable[[], None]]) -> None:
    """Raise SystemExit in a worker's thread while it waits for work."""
    thread = worker._thread
    assert thread is not None
    assert thread.ident is not None
    ident, error = ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error) == 1
    worker.put(lambda: None)  # wakes it
    thread.join()


def test_a_thread_that_dies_hangs_nobody() -> None:
    worker = Worker[Callable[[], None]](lambda call: call(), name="test")
    worker.put(lambda: None)
    worker.wait()
    assert not worker.has_died
    end_thread(worker)
    assert worker.has_died
    worker.put(lambda: None)
    worker.wait()
    worker.close()
    assert isinstance(worker.take_failure(), SystemExit)


def test_ctrl_c_in_close_can_be_closed_again() -> None:
    done: list[str] = []

    def slow(item: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # while close() waits for this thread
        time.sleep(0.5)
        done.append(item)

    worker = Worker(slow, name="test")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            worker.put("slow")
            worker.close()
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
    worker.close()
    assert done == ["slow"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_work_is_done_and_the_interpreter_ends_though_nobody_closed(tmp_path: Path) -> None:
    done = python(f"""
        import time
        from pathlib import Path
        from unclamp.worker import Worker

        def handle(item):
            time.sleep(0.2)
            Path({str(tmp_path)!r}, item).touch()

        worker = Worker(handle, name="test")
        for item in "abc":
            worker.put(item)
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_fork_has_no_thread_and_waits_for_none() -> None:
    done = python("""
        import os
        from unclamp.worker import Worker

        worker = Worker(lambda item: print(item, flush=True), name="test")
        worker.put("parent")
        worker.wait()
        child = os.fork()
        worker.put("child" if child == 0 else "parent again")
        worker.wait()
        worker.close()
        if child:
            assert os.waitpid(child, 0)[1] == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["parent", "parent again", ""]


def test_an_owner_that_closes_at_exit_closes_alone() -> None:
    done = python("""
        import atexit
        from unclamp.worker import Worker

        def close():
            print("owner", flush=True)
            worker.close()

        worker = Worker(
            lambda item: None, name="test", on_due=lambda: print("due"), closes_at_exit=False
        )
        atexit.register(close)
        worker.put(1)
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["owner", "due"]
