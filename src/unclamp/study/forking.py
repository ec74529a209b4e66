"""Worker processes that start in no time: forks of one that has imported what they need.

Importing torch and transformers takes some seconds of a processor. `prepare` has a process of its
own do that, once for all workers and beside the caller, who imports them too. Torch-free, so that
it can begin before anything else.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import (
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = "unclamp.study.preload"
_prepared_in: dict[str, str] = {}
"""The environment in which the workers' parent was started; empty before."""


def prepare() -> None:
    """Have a process import what workers need, on Linux: elsewhere libraries may not be forked.

    For a command, whose process is ours: a process has one such server, and what it imports is for
    all who use it.
    """
    if _prepared_in or sys.platform != "linux":
        return
    multiprocessing.set_forkserver_preload([PRELOADED])
    resource_tracker.ensure_running()  # which ends with SIGINT let through
    with blocking_interrupts():
        forkserver.ensure_running()
    _prepared_in.update(os.environ)


class Spawning(SpawnContext):
    """Starts fresh interpreters, and knows which: those of others are not ours to end."""

    forks = False

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


class Forking(ForkServerContext):
    """Starts forks of what `prepare` has begun, and knows which."""

    forks = True

    def __init__(self) -> None:
        super().__init__()
        self.started: set[BaseProcess] = set()

    def Process(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, *arguments: Any, **named: Any
    ) -> ForkServerProcess:
        """Return a process to start."""
        made = ForkServerProcess(*arguments, **named)
        self.started.add(made)
        return made


def workers_context() -> Spawning | Forking:
    """Return how to start workers: forked from what `prepare` has started, spawned without it.

    A fork has imported with the environment of then. Where a variable has another value now, it is
    not used; new ones, which imports of our own have set, are for the worker to set.
    """
    is_as_then = all(os.environ.get(name) == value for name, value in _prepared_in.items())
    return Forking() if _prepared_in and is_as_then else Spawning()


@contextmanager
def blocking_interrupts() -> Iterator[None]:
    """Start processes that no Ctrl-C reaches, from their first moment: they inherit the mask.

    One that comes meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
