"""Train runs side by side, tell the caller what they say, and end them when asked.

Where they train is for an `Executor`: `Processes` of this machine, or `RayTasks` of a cluster.

A terminal sends Ctrl-C to all its processes. Here it is answered in one place:

- The caller's process counts it (`CtrlC`) instead of raising in the midst of whatever it does.
  Before there are workers there is nothing to put away, and it does what it did before.
- Workers never get it. They are asked to stop, which they do between two steps.
- A worker that imports torch or compiles kernels is in no step. After `GRACE_S`, or at the second
  Ctrl-C, what has not ended is killed. That leaves an unfinished run, which is readable and starts
  over; finished ones stay.
"""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from unclamp.study.loop import RunPlan
from unclamp.study.messages import Message, Note, Progress

POLL_S = 0.1
GRACE_S = 3.0
"""How long a worker that was asked to stop may take for the step that it is in."""


class Interrupted(Exception):
    """The study was interrupted; running it again resumes."""


class Crew(Protocol):
    """Workers with runs to train."""

    def begin(self) -> None:
        """Have the runs trained from now on."""
        ...

    def follow(self, seconds: float) -> bool:
        """Wait at most so long, and pass on what was said; return whether all runs have ended.

        Raises:
            Exception: What a run raised.
            StudyError: A run cannot be trained, because its workers die.
        """
        ...

    def ask_to_stop(self) -> None:
        """Have each run end between two steps, and no other one begin."""
        ...

    def has_ended(self, seconds: float) -> bool:
        """Wait at most so long, as `follow`; return whether all workers are done. Raises nothing.

        Called after `ask_to_stop`, again and again.
        """
        ...

    def kill(self) -> None:
        """End at once what has not ended."""
        ...


class Executor(Protocol):
    """Where runs are trained."""

    def hire(self, plans: list[RunPlan], tell: Callable[[Message], None]) -> Crew:
        """Return workers for these runs, which pass on what they say by `tell`.

        Raises:
            StudyError: There is nobody to hire.
        """
        ...

    def close(self) -> None:
        """Let go of what was needed to hire."""
        ...


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Whom a study tells what.

    Args:
        on_start: Called once a wave, with the runs about to be trained and the number of those
            that are finished already.
        on_progress: Called for each step of each run, and at its end.
        on_note: Called with what workers would have written to stderr.
        on_interrupt: Called at the first Ctrl-C, before anything is waited for.
    """

    on_start: Callable[[list[RunPlan], int], None] = lambda plans, finished: None
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_note: Callable[[Note], None] = lambda note: None
    on_interrupt: Callable[[], None] = lambda: None

    def hear(self, message: Message) -> None:
        """Pass on a message."""
        if isinstance(message, Note):
            self.on_note(message)
        else:
            self.on_progress(message)


class CtrlC:
    """Counts Ctrl-C while entered, from `count` on: before, it does what it did.

    Fetching or building a model can take minutes, and nobody asks meanwhile how often there was
    a Ctrl-C. Where it is ignored, as under nohup, it stays ignored.
    """

    def __init__(self) -> None:
        self.times = 0
        self._is_counting = False

    def count(self) -> None:
        """Count from now on."""
        self._is_counting = True

    def __enter__(self) -> "CtrlC":
        self._before = signal.getsignal(signal.SIGINT)
        self._counts = (
            threading.current_thread() is threading.main_thread()
            and self._before is not signal.SIG_IGN
        )
        if self._counts:
            signal.signal(signal.SIGINT, self._count)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._counts:
            signal.signal(signal.SIGINT, self._before)

    def _count(self, number: int, frame: FrameType | None) -> None:
        if self._is_counting:
            self.times += 1
        elif callable(self._before):
            self._before(number, frame)
        else:
            raise KeyboardInterrupt


def train_all(
    plans: list[RunPlan], *, executor: Executor, listener: Listener, ctrl_c: CtrlC
) -> None:
    """Train the plans, each by a worker with one thread.

    Raises:
        StudyError: What a run raises, or workers that die.
        Interrupted: Ctrl-C.
    """
    watch = _Watch(listener, ctrl_c)
    crew = executor.hire(plans, listener.hear)
    is_done = False
    try:
        watch.check()
        crew.begin()
        while not crew.follow(POLL_S):
            watch.check()
        is_done = True
    finally:
        _end(crew, watch, in_s=None if is_done else GRACE_S)
    watch.check()


class _Watch:
    """Tells the listener of the first Ctrl-C."""

    def __init__(self, listener: Listener, ctrl_c: CtrlC) -> None:
        self._listener, self._ctrl_c = listener, ctrl_c
        self._is_noticed = False

    def check(self) -> None:
        """Raise `Interrupted` if there was a Ctrl-C."""
        if self.notices():
            raise Interrupted

    def notices(self) -> bool:
        """Return whether there was a Ctrl-C."""
        if self._ctrl_c.times and not self._is_noticed:
            self._is_noticed = True
            self._listener.on_interrupt()
        return self._is_noticed

    @property
    def is_urgent(self) -> bool:
        """Whether there was a second one."""
        return self._ctrl_c.times > 1


def _end(crew: Crew, watch: _Watch, *, in_s: float | None) -> None:
    """End the workers: those that are idle at once, the others as the module says."""
    crew.ask_to_stop()
    deadline = None if in_s is None else time.monotonic() + in_s
    while not crew.has_ended(POLL_S):
        if watch.notices() and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if watch.is_urgent or (deadline is not None and time.monotonic() > deadline):
            crew.kill()
            return
