"""`unclamp spikes --follow`: each spike of a growing file once, and a clean end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ctrl_c import ended, with_ctrl_c
from truths.printed import ONSET, losses
from unclamp.analysis import Curve, Spike, find_spikes
from unclamp.analysis.selections import Choice
from unclamp.cli.following import follow_spikes
from unclamp.errors import AnalysisError

LOSS = losses()
TIMEOUT = 60.0


def lines(first: int, end: int, of: list[float] = LOSS) -> str:
    return "".join(f"step {i} loss {of[i]:.4f}\n" for i in range(first, end))


def find(curve: Curve) -> list[Spike]:
    return find_spikes(curve.series["loss"], steps=curve.steps, series="loss")


class Watch:
    """Follows a file in a thread, and waits for what it has seen."""

    def __init__(self, path: Path) -> None:
        self.stop = threading.Event()
        self.told: list[int] = []
        self.last = -1
        self.curve: Curve | None = None
        self._path = path
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        def see(curve: Curve) -> list[Spike]:
            self.last = int(curve.steps[-1])
            return find(curve)

        self.curve = follow_spikes(
            self._path, Choice(), see, stop=self.stop, every=0.01,
            tell=lambda curve, spike: self.told.append(spike.onset),
        )  # fmt: skip

    def wait_for(self, step: int) -> None:
        until = time.monotonic() + TIMEOUT
        while self.last != step and time.monotonic() < until:
            time.sleep(0.01)
        assert self.last == step

    def end(self) -> Curve:
        self.stop.set()
        self._thread.join(TIMEOUT)
        assert self.curve is not None
        return self.curve


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text(lines(0, ONSET), encoding="utf-8")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_spike_is_told_once_and_when_a_later_step_is_there(log: Path) -> None:
    watch = Watch(log)
    watch.wait_for(ONSET - 1)
    append(log, lines(ONSET, ONSET + 1))
    watch.wait_for(ONSET)
    assert watch.told == []
    half = lines(ONSET + 1, ONSET + 2)
    append(log, half[:-3])  # a line that is not ended is no record yet
    time.sleep(0.1)
    assert watch.last == ONSET
    append(log, half[-3:] + lines(ONSET + 2, 300))
    watch.wait_for(299)
    curve = watch.end()
    assert watch.told == [ONSET]
    assert curve.series["loss"] == pytest.approx(LOSS, rel=1e-3)


@pytest.mark.parametrize("how", ["truncated", "replaced"])
def test_what_was_read_stays_when_a_file_is_rotated(log: Path, how: str) -> None:
    watch = Watch(log)
    watch.wait_for(ONSET - 1)
    rest = lines(ONSET, 300)
    if how == "truncated":
        log.write_text(rest, encoding="utf-8")
    else:
        other = log.with_name("new")
        other.write_text(rest, encoding="utf-8")
        log.rename(log.with_name("log.1"))
        time.sleep(0.05)  # for a while there is no such file
        other.rename(log)
    watch.wait_for(299)
    assert len(watch.end().steps) == 300
    assert watch.told == [ONSET]


def test_a_run_that_goes_back_and_rises_again_is_told_again(log: Path) -> None:
    watch = Watch(log)
    append(log, lines(ONSET, ONSET + 5))
    watch.wait_for(ONSET + 4)
    once_more = [1.1 * x if i == ONSET else x for i, x in enumerate(LOSS)]
    append(log, lines(ONSET - 5, 300, once_more))
    watch.wait_for(299)
    watch.end()
    assert watch.told == [ONSET, ONSET]


def test_a_json_document_is_written_whole_each_time(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"

    def save(end: int) -> None:
        history = [{"step": i, "loss": x} for i, x in enumerate(LOSS[:end])]
        path.write_text(json.dumps({"log_history": history}, indent=1), encoding="utf-8")

    save(100)
    watch = Watch(path)
    watch.wait_for(99)
    save(300)
    watch.wait_for(299)
    assert (len(watch.end().steps), watch.told) == (300, [ONSET])


def test_a_file_without_a_loss_is_waited_for_and_an_ambiguous_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("", encoding="utf-8")
    watch = Watch(path)
    time.sleep(0.05)
    append(path, lines(0, 300))
    watch.wait_for(299)
    watch.end()
    path.write_text("step,loss,loss\n0,1,2\n1,1,3\n", encoding="utf-8")
    with pytest.raises(AnalysisError, match="several columns"):
        follow_spikes(path, Choice(), find, stop=threading.Event())
    with pytest.raises(AnalysisError, match="is not there"):
        follow_spikes(tmp_path / "no", Choice(), find, stop=threading.Event())


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "unclamp", "spikes", *arguments, "--follow"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"}, preexec_fn=with_ctrl_c,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send another Ctrl-C there")
def test_ctrl_c_ends_with_the_summary(log: Path) -> None:
    append(log, lines(ONSET, 300))
    with ended(command(str(log))) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=TIMEOUT)
    assert first.startswith(f"Step {ONSET}: spike 1 of loss, 1.")
    assert "1 spike in 300 steps" in rest
    assert (process.returncode, "Traceback" in errors) == (0, False)


def test_a_pipe_that_is_closed_ends_the_following() -> None:
    with ended(command("-", "--json")) as process:
        out, _ = process.communicate(lines(0, 300), timeout=TIMEOUT)
    (spike,) = map(json.loads, out.splitlines())
    assert (process.returncode, spike["onset"], spike["series"]) == (0, ONSET, "loss")
