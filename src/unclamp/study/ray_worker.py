"""A run as a Ray task: on which terms it trains, and what comes back of it.

Where the study's folder is on a file system that the worker shares, the run is written in its
place, as on one machine. A worker that does not see the folder trains in a temporary one of its
own, and the files come back when the run has ended.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from unclamp.errors import StudyError
from unclamp.runlog.header import RUN_FILE
from unclamp.study.data import read_text, text_digest
from unclamp.study.loop import RunPlan
from unclamp.study.messages import Message, Note
from unclamp.study.worker import Speaker, speaking, work
from unclamp.version import __version__


@dataclass(frozen=True, kw_only=True)
class Home:
    """The machine that the study was started on, for workers to compare themselves with.

    Attributes:
        folder: Where it works: relative paths of the study begin here.
        mark: A file in the study's folder that has this name on no other file system.
        text: Identifies the text.
        versions: Of packages, by name.
        processor: The instructions that torch uses, which decide the last bits of losses.
    """

    folder: Path
    mark: Path
    text: str
    versions: dict[str, str]
    processor: str

    @classmethod
    def of(cls, plan: RunPlan, mark: Path) -> Self:
        """Return what this machine is, for a study with this run."""
        return cls(
            folder=Path.cwd(),
            mark=mark,
            text=_text(plan),
            versions=_versions(),
            processor=_processor(),
        )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
        status: "finished" or "interrupted".
        files: Those of its folder, by their paths in it; None where they are in their place.
    """

    status: str
    files: dict[str, bytes] | None = None

    def save(self, path: Path) -> None:
        """Write the files to the run's folder, the header last: without it there is no run."""
        if self.files is None:
            return
        for name in sorted(self.files, key=lambda name: name == RUN_FILE):
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.files[name])


class Line:
    """A worker's end of the channel, an actor: an answer is that of the message before."""

    def __init__(self, ray: Any, channel: Any) -> None:
        self._ray, self._channel = ray, channel
        self._answer = channel.tell.remote(None)

    def tell(self, message: Message) -> None:
        """Send a message, without waiting for it to arrive."""
        self._answer = self._channel.tell.remote(message)

    def should_stop(self) -> bool:
        """Wait until the last message has arrived; return whether to stop."""
        return self._ray.get(self._answer)


def run(plan: RunPlan, tested: bytes | None, home: Home, channel: Any) -> Ended:
    """Train a run; `tested` is the backtest of its rule, if it has one.

    Raises:
        StudyError: This machine lacks something that the study's has, or what `train` raises.
    """
    import ray  # noqa: PLC0415 - an extra, which is there where this runs

    line = Line(ray, channel)
    with _working_in(home.folder), speaking(speaker := Speaker(line.tell)):
        _compare(plan, home, speaker)
        if home.mark.exists():
            plan = replace(plan, path=home.folder / plan.path)
            ended = Ended(status=work(plan, speaker, should_stop=line.should_stop))
        else:
            ended = _train_apart(plan, tested, speaker, line)
    line.should_stop()  # what was told has arrived
    return ended


def _train_apart(plan: RunPlan, tested: bytes | None, speaker: Speaker, line: Line) -> Ended:
    with tempfile.TemporaryDirectory(prefix="unclamp-", ignore_cleanup_errors=True) as scratch:
        apart = replace(plan, path=Path(scratch) / plan.arm / plan.path.name)
        apart.path.parent.mkdir()
        if tested is not None:
            apart.backtest.write_bytes(tested)
        status = work(apart, speaker, should_stop=line.should_stop)
        return Ended(
            status=status,
            files={
                str(file.relative_to(apart.path)): file.read_bytes()
                for file in apart.path.rglob("*")
                if file.is_file()
            },
        )


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """While entered, relative paths mean what they do at home, where the folder is here too."""
    before = Path.cwd()
    with suppress(OSError):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _compare(plan: RunPlan, home: Home, speaker: Speaker) -> None:
    """Refuse a machine whose runs would be others, and tell of one whose last bits may be."""
    here = f"the worker on {socket.gethostname()}"
    for package, version in _versions().items():
        if version != home.versions[package]:
            raise StudyError(
                f"expected {package} {home.versions[package]} on all machines, as on the study's, "
                f"but {here} has {version}: install the same versions"
            )
    if _text(plan) != home.text:
        raise StudyError(
            f"{here} reads another text than the study's machine: {list(plan.config.data.text)} "
            "must hold the same on all machines"
        )
    if (processor := _processor()) != home.processor:
        text = (
            f"a worker computes with {processor}, the study's machine with {home.processor}: the "
            "last bits of losses may differ between them"
        )
        speaker.tell(Note(text=text, once=True))


def _text(plan: RunPlan) -> str:
    data = plan.config.data
    return text_digest(read_text(data.text, seq_len=data.seq_len))


def _versions() -> dict[str, str]:
    return {"unclamp": __version__, "torch": str(torch.__version__)}


def _processor() -> str:
    return torch.backends.cpu.get_cpu_capability()
