"""How the numba kernels are compiled, and run on torch's number of threads.

Threads are plain ones: numba's own pool dies of a fork, and of two callers at a time. The kernels
release the interpreter's lock.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numba import njit


def compiled(function: Callable, **options: Any) -> Callable:
    """Compile a function at its first call, kept on disk where there is a folder for it."""
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # no folder to write the cache to
        return njit(function, nogil=True, **options)


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
