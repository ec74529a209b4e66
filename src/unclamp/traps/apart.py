"""Processes of the traps that need some: two ranks that meet through gloo, or one by itself.

All start when the context begins and are ended when it ends, whatever happens. A process is a
fresh Python and no fork, so that a script without a `__main__` guard can run traps too.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unclamp
from unclamp.traps.answers import Answer
from unclamp.traps.trap import Trap


@dataclass(frozen=True, kw_only=True)
class _Started:
    """A process and the files that it writes: a line of JSON for each trap, and what it says."""

    process: subprocess.Popen[bytes]
    answers: Path
    said: Path


class Apart:
    """The processes of some traps, started on entry; `answer` waits for one trap's facts.

    Args:
        pairs: Traps and devices. Those with ranks share one group; each other has a process.
        patience_s: Seconds after which all are ended, and what is missing has failed.
    """

    def __init__(self, pairs: Sequence[tuple[Trap, str]], *, patience_s: float) -> None:
        self._pairs = pairs
        self._patience_s = patience_s
        self._started: dict[tuple[str, str], list[_Started]] = {}
        self._deadline = 0.0
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def __enter__(self) -> "Apart":
        self._deadline = time.monotonic() + self._patience_s
        with contextlib.ExitStack() as stack:
            stack.callback(self.__exit__)
            together = [trap for trap, _ in self._pairs if trap.ranks]
            groups = [([t], d) for t, d in self._pairs if not t.ranks]
            for traps, device in [(together, "cpu"), *groups] if together else groups:
                started = self._start(traps, device)
                self._started |= {(trap.name, device): started for trap in traps}
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for each in {id(s): s for group in self._started.values() for s in group}.values():
            _end(each.process)
        self._folder.cleanup()

    def answer(self, trap: Trap, device: str) -> Answer:
        """Wait for a trap's processes, and return its facts; of ranks, those of each."""
        answers = [self._answer_of(each, trap) for each in self._started[trap.name, device]]
        for rank, answer in enumerate(answers):
            if answer.error is not None:
                where = f"rank {rank}: " if len(answers) > 1 else ""
                return Answer(error=where + answer.error, seconds=answer.seconds)
        if not trap.ranks:
            return answers[0]
        facts = {
            f"rank {rank}: {name}": fact
            for rank, answer in enumerate(answers)
            for name, fact in answer.facts.items()
        }
        return Answer(facts=facts, seconds=max(answer.seconds for answer in answers))

    def _start(self, traps: Sequence[Trap], device: str) -> list[_Started]:
        ranks = max(trap.ranks for trap in traps)
        path = Path(self._folder.name)
        about: dict[str, Any] = {
            "names": [trap.name for trap in traps],
            "device": device,
            "ranks": ranks,
            "meeting": str(path / "meeting"),
            "patience_s": self._patience_s,
        }
        return [
            _started(about | {"rank": rank}, path / f"{traps[0].name}-{device}-{rank}")
            for rank in range(max(ranks, 1))
        ]

    def _answer_of(self, started: _Started, trap: Trap) -> Answer:
        while True:
            has_ended = started.process.poll() is not None
            lines = started.answers.read_bytes().split(b"\n")[:-1]
            for line in map(json.loads, lines):
                if line["name"] == trap.name:
                    return Answer(**line["answer"])
            if has_ended:
                return Answer(error=f"its process ended with {_last_words(started)}")
            if time.monotonic() > self._deadline:
                return Answer(error=f"no answer within {self._patience_s:.0f} s")
            time.sleep(0.05)


def _started(about: dict[str, Any], path: Path) -> _Started:
    answers, said = path.with_suffix(".jsonl"), path.with_suffix(".log")
    answers.touch()
    source = str(Path(unclamp.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unclamp.traps.child", json.dumps(about), str(answers)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return _Started(process=process, answers=answers, said=said)


def _last_words(started: _Started) -> str:
    lines = started.said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{started.process.returncode}: {lines[-1] if lines else 'no word'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started, a compiler for one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
