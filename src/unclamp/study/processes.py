"""Runs in processes of this machine."""

import contextlib
import gc
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

from unclamp.errors import StudyError
from unclamp.study.compiling import compile_kernels, is_worthwhile
from unclamp.study.forking import blocking_interrupts, workers_context
from unclamp.study.loop import RunPlan
from unclamp.study.messages import Message
from unclamp.study.pool import GRACE_S
from unclamp.study.worker import Speaker, keep_memory, speaking, work


class Processes:
    """Trains `jobs` runs at a time, one a core without it, each in a process with one thread."""

    def __init__(self, jobs: int | None = None) -> None:
        self._jobs = jobs or os.cpu_count() or 1

    def hire(self, plans: list[RunPlan], tell: Callable[[Message], None]) -> "_Crew":
        """Return worker processes for these runs."""
        return _Crew(plans, tell, size=min(self._jobs, len(plans)))

    def close(self) -> None:
        """There is nothing to let go of."""


class _Crew:
    """Worker processes, and the channel through which they tell what they do."""

    def __init__(self, plans: list[RunPlan], tell: Callable[[Message], None], *, size: int) -> None:
        context = workers_context()
        self._context = context
        self._plans, self._tell = plans, tell
        self._channel: Any = context.Queue()
        self._stop = context.Event()
        self._workers = context.started
        self._pending: set[Future[str]] = set()
        self._ending: threading.Thread | None = None
        self._compiler: BaseProcess | None = None
        self._compiler_says: Any = None
        self._executor = ProcessPoolExecutor(
            max_workers=size,
            mp_context=context,
            initializer=_start_worker,
            initargs=(self._channel, self._stop, dict(os.environ) if context.forks else None),
        )

    def begin(self) -> None:
        """Start the processes, which no Ctrl-C reaches."""
        with blocking_interrupts():
            self._pending = {self._executor.submit(_work, plan) for plan in self._plans}
            if self._context.forks and is_worthwhile(self._plans):
                self._compile()

    def follow(self, seconds: float) -> bool:
        """As `Crew.follow`; a worker that was killed ends them all."""
        done, self._pending = wait(self._pending, timeout=seconds)
        self._drain()
        try:
            for future in done:
                future.result()
        except BrokenProcessPool as error:
            raise StudyError(
                "a worker process was killed; run the study again to resume"
            ) from error
        return not self._pending

    def ask_to_stop(self) -> None:
        """As `Crew.ask_to_stop`."""
        self._stop.set()
        if self._compiler is not None:
            self._compiler.kill()
        # In a thread, because what it waits for may have to be killed meanwhile.
        end = {"wait": True, "cancel_futures": True}
        self._ending = threading.Thread(target=self._executor.shutdown, kwargs=end, daemon=True)
        self._ending.start()

    def has_ended(self, seconds: float) -> bool:
        """As `Crew.has_ended`."""
        assert self._ending is not None
        self._ending.join(seconds)
        is_alive = self._ending.is_alive()
        self._drain()
        return not is_alive

    def kill(self) -> None:
        """Kill the processes, without a last look into the channel: one may have died writing."""
        assert self._ending is not None
        for worker in self._workers & set(multiprocessing.active_children()):
            worker.kill()
        self._ending.join(GRACE_S)

    def _compile(self) -> None:
        """Start who compiles; he may be killed at any time, so he has a channel of his own."""
        self._compiler_says, tell = self._context.Pipe(duplex=False)
        compiler = self._context.Process(
            target=compile_kernels, args=(self._plans, tell), daemon=True
        )
        compiler.start()
        self._compiler = compiler
        tell.close()

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._tell(self._channel.get_nowait())
        with contextlib.suppress(EOFError, OSError):
            while self._compiler_says is not None and self._compiler_says.poll():
                self._tell(self._compiler_says.recv())


_worker: dict[str, Any] = {}


def _start_worker(channel: Any, stop: Any, environ: dict[str, str] | None) -> None:
    """Prepare a worker, for as long as it lives; a fork is given its environment."""
    if environ is not None:
        os.environ.update(environ)
        gc.freeze()  # what is imported stays: the collector need not look through it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_memory()
    speaker = Speaker(channel.put)
    _worker.update(speaker=speaker, stop=stop, voice=contextlib.ExitStack())
    _worker["voice"].enter_context(speaking(speaker))


def _end_with_parent() -> None:
    """End this process when the study was killed: nobody would give it work, or end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(plan: RunPlan) -> str:
    return work(plan, _worker["speaker"], should_stop=_worker["stop"].is_set)
