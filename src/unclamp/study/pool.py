"""Train runs in worker processes, tell the caller what they say, and end them when asked.

A terminal sends Ctrl-C to all its processes. Here it is answered in one place:

- The caller's process counts it (`CtrlC`) instead of raising in the midst of whatever it does.
  Before there are workers there is nothing to put away, and it does what it did before.
- Workers never get it: they are started with the signal blocked. They are asked to stop, which
  they do between two steps.
- A worker that imports torch or compiles kernels is in no step. After `GRACE_S`, or at the second
  Ctrl-C, what has not ended is killed. That leaves an unfinished run, which is readable and starts
  over; finished ones stay.

What a worker writes to stderr goes through the same channel as its steps, because two writers on
one terminal tear each other's lines.
"""

import contextlib
import io
import multiprocessing
import queue
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from unclamp.errors import StudyError
from unclamp.study.loop import RunPlan, train

POLL_S = 0.1
GRACE_S = 3.0
"""How long a worker that was asked to stop may take for the step that it is in."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker tells: a run's step and loss; `status` at its end."""

    label: str
    step: int
    loss: float | None = None
    status: str | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line that a worker would have written to stderr.

    Args:
        text: The line; of a warning its message.
        label: The run that was training, "" before the first.
        kind: The name of the warning's class, "" for what is no warning.
        once: Whether all runs say the same, so that once is enough.
    """

    text: str
    label: str = ""
    kind: str = ""
    once: bool = False


class Interrupted(Exception):
    """The study was interrupted; running it again resumes."""


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


def train_all(plans: list[RunPlan], *, jobs: int, listener: Listener, ctrl_c: CtrlC) -> None:
    """Train the plans, `jobs` at a time, each in a process with one thread.

    Raises:
        StudyError: What a run raises, or a worker was killed.
        Interrupted: Ctrl-C.
    """
    pool = _Pool(min(jobs, len(plans)), listener, ctrl_c)
    try:
        pool.train(plans)
    except BrokenProcessPool as error:
        raise StudyError("a worker process was killed; run the study again to resume") from error
    finally:
        pool.close()
    pool.check_interrupt()


class _Context(SpawnContext):
    """Starts processes by `spawn`, and knows which: those of others are not ours to end."""

    def __init__(self) -> None:
        super().__init__()
        self.started: set[BaseProcess] = set()

    def Process(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, *arguments: Any, **named: Any
    ) -> SpawnProcess:
        """Return a process to start."""
        made = SpawnProcess(*arguments, **named)
        self.started.add(made)
        return made


class _Pool:
    """Worker processes, and the channel through which they tell what they do."""

    def __init__(self, size: int, listener: Listener, ctrl_c: CtrlC) -> None:
        context = _Context()
        self._listener, self._ctrl_c = listener, ctrl_c
        self._channel: Any = context.Queue()
        self._stop = context.Event()
        self._workers = context.started
        self._executor = ProcessPoolExecutor(
            max_workers=size,
            mp_context=context,
            initializer=_start_worker,
            initargs=(self._channel, self._stop),
        )
        self._is_done = self._is_noticed = False

    def train(self, plans: list[RunPlan]) -> None:
        self.check_interrupt()
        with _blocking_interrupts():
            pending = {self._executor.submit(_work, plan) for plan in plans}
        while pending:
            pending = self._follow(pending)
            self.check_interrupt()
        self._is_done = True

    def check_interrupt(self) -> None:
        """Raise `Interrupted` if there was a Ctrl-C."""
        if self._notices_interrupt():
            raise Interrupted

    def _notices_interrupt(self) -> bool:
        if self._ctrl_c.times and not self._is_noticed:
            self._is_noticed = True
            self._listener.on_interrupt()
        return self._is_noticed

    def _follow(self, pending: set[Future[str]]) -> set[Future[str]]:
        done, pending = wait(pending, timeout=POLL_S)
        self._drain()
        for future in done:
            future.result()
        return pending

    def close(self) -> None:
        """End the workers: those that are idle at once, the others as the module says."""
        self._stop.set()
        # In a thread, because what it waits for may have to be killed meanwhile.
        end = {"wait": True, "cancel_futures": True}
        ending = threading.Thread(target=self._executor.shutdown, kwargs=end, daemon=True)
        ending.start()
        deadline = None if self._is_done else time.monotonic() + GRACE_S
        while ending.is_alive():
            if self._notices_interrupt() and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if self._ctrl_c.times > 1 or (deadline is not None and time.monotonic() > deadline):
                for worker in self._workers & set(multiprocessing.active_children()):
                    worker.kill()
                ending.join(GRACE_S)
                return  # without a last look into the channel: a worker may have died writing
            ending.join(POLL_S)
            self._drain()
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._channel.get_nowait()
                if isinstance(message, Note):
                    self._listener.on_note(message)
                else:
                    self._listener.on_progress(message)


@contextlib.contextmanager
def _blocking_interrupts() -> Iterator[None]:
    """Start processes that no Ctrl-C reaches, from their first moment: they inherit the mask.

    One that comes meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[str, Any] = {}


def _start_worker(channel: Any, stop: Any) -> None:
    """Prepare a worker: one thread, and all that it says goes to the parent."""
    torch.set_num_threads(1)
    _worker.update(channel=channel, stop=stop, label="")
    transformers_logging.disable_progress_bar()
    warnings.showwarning = _tell_warning
    sys.stderr = _Lines()


class _Lines(io.TextIOBase):
    """A worker's stderr: whole lines go to the parent."""

    def __init__(self) -> None:
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            own = line.startswith("unclamp: ")
            label = "" if own else _worker["label"]
            _worker["channel"].put(Note(text=line, label=label, once=own))
        return len(text)


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Stand in for `warnings.showwarning`."""
    note = Note(text=str(message), label=_worker["label"], kind=category.__name__, once=True)
    _worker["channel"].put(note)


def _work(plan: RunPlan) -> str:
    channel, stop = _worker["channel"], _worker["stop"]
    if stop.is_set():
        return "interrupted"
    _worker["label"] = plan.label
    if plan.path.exists():
        shutil.rmtree(plan.path)
    status = train(
        plan,
        on_step=lambda step, loss: channel.put(Progress(label=plan.label, step=step, loss=loss)),
        should_stop=stop.is_set,
    )
    channel.put(Progress(label=plan.label, step=plan.config.steps, status=status))
    return status
