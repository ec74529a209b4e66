"""What a worker process does, wherever it runs: train a run, and pass on all that it says.

What it writes to stderr goes through the same channel as its steps, because two writers on one
terminal tear each other's lines, and a worker on another machine has no terminal.
"""

import ctypes
import io
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from unclamp.study.loop import RunPlan, train
from unclamp.study.messages import Message, Note, Progress


class Speaker:
    """Passes on what a worker says, by `tell`; `label` is the run that is training."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self.tell = tell
        self.label = ""

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        """Stand in for `warnings.showwarning`."""
        kind = category.__name__
        self.tell(Note(text=str(message), label=self.label, kind=kind, once=True))


class _Lines(io.TextIOBase):
    """A worker's stderr: whole lines go to the study."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker, self._rest = speaker, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            own = line.startswith("unclamp: ")
            label = "" if own else self._speaker.label
            self._speaker.tell(Note(text=line, label=label, once=own))
        return len(text)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGE_BYTES = 1 << 30, 1 << 25
"""As much as glibc allows, or more than a small model's step takes."""


def keep_memory() -> None:
    """Have a step's memory serve the next one, where glibc is the allocator.

    Otherwise each step gives most of it back to the system, and pays for it page by page again.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


@contextmanager
def speaking(speaker: Speaker) -> Iterator[None]:
    """While entered, this process has one thread, and what it says goes to the study."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    before = warnings.showwarning, sys.stderr
    warnings.showwarning, sys.stderr = speaker.warn, _Lines(speaker)
    try:
        yield
    finally:
        warnings.showwarning, sys.stderr = before


def work(plan: RunPlan, speaker: Speaker, *, should_stop: Callable[[], bool]) -> str:
    """Train a run from its beginning; return "finished" or "interrupted"."""
    if should_stop():
        return "interrupted"
    speaker.label = plan.label
    if plan.path.exists():
        shutil.rmtree(plan.path)
    status = train(
        plan,
        on_step=lambda step, loss: speaker.tell(Progress(label=plan.label, step=step, loss=loss)),
        should_stop=should_stop,
    )
    speaker.tell(Progress(label=plan.label, step=plan.config.steps, status=status))
    return status
