"""How the numba kernels are compiled, and run on torch's number of threads.

Threads are plain ones: numba's own pool dies of a fork, and of two callers at a time. The kernels
release the interpreter's lock.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from numba import njit
from numba.core.event import Event, Listener, install_listener


def compiled(function: Callable, **options: Any) -> Callable:
    """Compile a function at its first call, kept on disk where there is a folder for it."""
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # no folder to write the cache to
        return njit(function, nogil=True, **options)


@contextmanager
def announced() -> Iterator[None]:
    """Tell a user on stderr, once a process, when one of our kernels is compiled in here.

    numba says when it compiles, and says nothing when it loads a kernel from its cache. No clock
    can tell the two apart: on a busy machine loading takes as long as compiling on an idle one.
    """
    with install_listener("numba:compile", _Announcer()):
        yield


class _Announcer(Listener):
    """Hears numba begin to compile; a user's own functions, in other threads, do not count."""

    def on_start(self, event: Event) -> None:
        data: Any = event.data  # numba does not say its type
        kernel = data["dispatcher"]
        if kernel.py_func.__module__.startswith("unclamp."):
            _announce(is_kept=kernel.stats.cache_path is not None)

    def on_end(self, event: Event) -> None:
        pass


@functools.cache
def _announce(*, is_kept: bool) -> None:
    fate = "once: they are kept on disk" if is_kept else "for this process: no folder to keep them"
    with suppress(OSError, ValueError):  # a stderr that is closed must not stop the compiler
        print(f"unclamp: compiling the CPU kernels, about 20 s, {fate}", file=sys.stderr)


def run(calls: list[tuple[Any, ...]]) -> None:
    """Make calls, each a function and its arguments, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(calls))
    if threads <= 1:
        for function, *arguments in calls:
            function(*arguments)
    else:
        for future in [_pool(threads).submit(*call) for call in calls]:
            future.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="unclamp")


# A forked child has the pool but not its threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)
