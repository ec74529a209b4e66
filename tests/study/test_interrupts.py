"""Ctrl-C in a study: answered in every phase, with exit code 130 and without a traceback."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrl_c import with_ctrl_c
from patience import PATIENCE_S
from unclamp.runlog import RunLog

STUDY = (
    "scenarios = ['text']\nseeds = [0]\nsteps = 20\n"
    "[data]\nbatch_size = 2\nseq_len = 32\n"
    "[model]\nhidden_size = 32\nintermediate_size = 64\nlayers = 1\nheads = 2\n"
    "[arms.delayed]\nrecipe = 'delayed'\n[arms.dynamic]\nrecipe = 'dynamic'\n"
)
COMPILES = "compiling the CPU kernels"
STOPS = "Interrupted: stopping"


class Study:
    """`unclamp study` in a process group of its own, as a terminal starts it."""

    def __init__(self, *arguments: object, folder: Path, cache: Path | None = None) -> None:
        self.stderr = folder / "stderr.txt"
        environ = (
            dict(os.environ) if cache is None else os.environ | {"NUMBA_CACHE_DIR": str(cache)}
        )
        with self.stderr.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "unclamp", "study", *map(str, arguments)],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=environ,
                start_new_session=True,
                preexec_fn=with_ctrl_c,
            )

    def said(self) -> str:
        return self.stderr.read_text()

    def wait_until_it_says(self, words: str) -> None:
        self.wait_until(lambda: words in self.said())

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def ctrl_c(self, *, to_all: bool) -> None:
        if to_all:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            os.kill(self.process.pid, signal.SIGINT)

    def ends_well(self) -> None:
        assert self.process.wait(timeout=PATIENCE_S) == 130, self.said()
        assert "Traceback" not in self.said()
        assert "leaked" not in self.said()
        self.leaves_no_process()

    def leaves_no_process(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        pytest.fail("processes are left")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


@pytest.mark.parametrize(
    "to_all",
    [
        pytest.param(True, id="group"),
        pytest.param(False, id="parent", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_during_compilation_ends_the_study_and_the_next_one_goes_on(
    to_all: bool, study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    begun = Study("--config", study, "--out", out, folder=tmp_path, cache=tmp_path / "cache")
    begun.wait_until_it_says(COMPILES)
    begun.ctrl_c(to_all=to_all)
    begun.wait_until_it_says(STOPS)
    begun.ends_well()
    # A worker that had come to the end of its compilation would say that it stopped.
    assert "interrupted: text" not in begun.said()
    assert "unfinished ones start over" in begun.said()
    again = Study("--config", study, "--out", out, "--jobs", 1, folder=tmp_path)
    assert again.process.wait(timeout=PATIENCE_S) == 0, again.said()
    for arm in ("delayed", "dynamic"):
        with RunLog.open(out / "text" / arm / "seed-0") as log:
            assert (log.header.status, log.steps().num_rows) == ("finished", 20)


def test_a_second_ctrl_c_ends_it_without_waiting_for_workers(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--config", study, "--out", out, "--jobs", 1)
    begun = Study(*options, folder=tmp_path, cache=tmp_path / "cache")
    begun.wait_until_it_says(COMPILES)
    begun.ctrl_c(to_all=True)
    begun.wait_until_it_says(STOPS)
    begun.ctrl_c(to_all=True)
    begun.ends_well()


def test_ctrl_c_while_workers_start(study: Path, tmp_path: Path) -> None:
    begun = Study("--config", study, "--out", tmp_path / "out", folder=tmp_path)
    begun.wait_until_it_says("unclamp study: 2 runs")
    begun.ctrl_c(to_all=True)
    begun.ends_well()
    assert STOPS in begun.said()
    assert "0 of 2 runs finished" in begun.said()


def test_no_worker_outlives_a_study_that_is_killed(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun = Study("--config", study, "--steps", 5000, "--out", out, folder=tmp_path)
    begun.wait_until((out / "text" / "delayed").is_dir)
    begun.process.kill()
    begun.process.wait(timeout=PATIENCE_S)
    begun.leaves_no_process()


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    begun = Study("--quick", "--out", tmp_path / "out", folder=tmp_path)
    begun.wait_until_it_says("A first look")
    begun.ctrl_c(to_all=True)
    begun.ends_well()
    assert "Interrupted: nothing was trained." in begun.said()
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_a_model_is_fetched_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # which takes a question and says nothing
        hub.settimeout(PATIENCE_S)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        options = ("--hf-model", "no-such/model", "--scenario", "text", "--out", tmp_path / "out")
        begun = Study(*options, folder=tmp_path)
        asked, _ = hub.accept()
        with asked:
            begun.ctrl_c(to_all=True)
            begun.ends_well()
    assert begun.said().split() == ["Interrupted:", "nothing", "was", "trained."]


def test_killing_workers_spares_other_processes(study: Path, tmp_path: Path) -> None:
    code = f"""
        import multiprocessing, threading, time, os, signal
        from pathlib import Path
        from unclamp.study.arms import run_study
        from unclamp.study.config import StudyConfig
        from unclamp.study.pool import Interrupted, Listener
        others = []
        def interrupt(plans, finished):
            def later():
                others.append(multiprocessing.get_context("spawn").Process(
                    target=time.sleep, args=(60,), daemon=True))
                others[0].start()
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.5)
            threading.Timer(0.3, later).start()
        if __name__ == "__main__":
            config = StudyConfig.load({str(study)!r})
            try:
                run_study(config, Path({str(tmp_path / "out")!r}), jobs=2,
                          listener=Listener(on_start=interrupt))
            except Interrupted:
                print("interrupted", others[0].is_alive())
            others[0].kill()
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        preexec_fn=with_ctrl_c,
    )
    assert done.stdout.split() == ["interrupted", "True"], done.stderr


@pytest.mark.parametrize(
    "work",
    [
        "import time; time.sleep(60)",
        "import duckdb; duckdb.sql('SELECT sum(a.range * b.range) FROM range(1000000) a, "
        "range(1000000) b').fetchall()",
        "print('x' * 10, flush=True)\n        while True: print('x' * 1000)",
    ],
    ids=["python", "duckdb", "printing"],
)
def test_a_page_that_is_being_written_is_left_at_once(work: str) -> None:
    code = f"""
        import os, signal, threading
        from unclamp.cli.interrupt import leaving_at_ctrl_c
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with leaving_at_ctrl_c("Interrupted: so it is."):
            {work.replace(chr(10) + "        ", chr(10) + "            ")}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "\nInterrupted: so it is.\n")


def test_where_ctrl_c_is_ignored_it_stays_ignored() -> None:
    code = """
        import os, signal
        from unclamp.cli.interrupt import leaving_at_ctrl_c
        from unclamp.study.pool import CtrlC
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with leaving_at_ctrl_c("Interrupted."):
            os.kill(os.getpid(), signal.SIGINT)
        with CtrlC() as ctrl_c:
            ctrl_c.count()
            os.kill(os.getpid(), signal.SIGINT)
        print(ctrl_c.times, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout.split() == ["0", "True"]
