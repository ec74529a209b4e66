"""How the numba kernels are compiled, and run on torch's number of threads.

Threads are plain ones: numba's own pool dies of a fork, and of two callers at a time. The kernels
release the interpreter's lock.

Compiled kernels are kept where numba keeps them: in `NUMBA_CACHE_DIR`, beside our code, or in the
user's cache. Where none of these can be written (a container's read-only image and home), they
are kept in a temporary folder of the user's; without that, each process would compile anew.
"""

import ctypes
import functools
import hashlib
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from numba import njit
from numba.core import config
from numba.core.event import Event, Listener, install_listener, register


def compiled(function: Callable, **options: Any) -> Callable:
    """Compile a function at its first call, kept on disk where there is a folder for it."""
    njit_it = functools.partial(njit, function, nogil=True, **options)
    with suppress(RuntimeError):  # no folder to write the cache to
        return _of_all_sources(njit_it(cache=True))
    with suppress(RuntimeError), _kept_in(_temporary()):
        return _of_all_sources(njit_it(cache=True))
    return njit_it()


def _of_all_sources(kernel: Any) -> Any:
    """Have a kept kernel loaded only where none of our sources has changed since.

    numba looks at the file of the kernel itself. A kernel holds those that it calls, and constants
    of other modules, and the cache outlives an upgrade: it would run on as it was.
    """
    with suppress(AttributeError):  # of numba's own: nobody promises that it stays
        kept = kernel._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _sources())
    return kernel


@functools.cache
def _sources() -> str:
    """Return a digest of all that kernels are made of."""
    here = Path(__file__).parent
    others = [here.parent / f"{name}.py" for name in ("formats", "reference", "scaling")]
    digest = hashlib.sha256()
    with suppress(OSError):  # a package without sources does not change
        for path in [*sorted(here.glob("*.py")), *others]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _temporary() -> Path | None:
    """Return a temporary folder that only this user can write; None where there is none.

    What lies in it is loaded and run, so a folder that somebody else has made is not used.
    """
    user = os.getuid() if hasattr(os, "getuid") else None  # Windows: the folder is the user's
    try:
        folder = Path(tempfile.gettempdir()) / ("unclamp" if user is None else f"unclamp-{user}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_ours = user is None or (found.st_uid == user and not stat.S_IMODE(found.st_mode) & 0o022)
    return folder if is_ours and stat.S_ISDIR(found.st_mode) else None


@contextmanager
def _kept_in(folder: Path | None) -> Iterator[None]:
    """Have numba choose `folder` for what is declared in here, and for nobody else's functions."""
    before: Any = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    config.CACHE_DIR = str(folder or before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        config.CACHE_DIR = before  # pyright: ignore[reportAttributeAccessIssue]


class NotKept(Exception):
    """A kernel is not kept on disk."""


class _Refuser(Listener):
    """Lets nothing be compiled: numba tells of a compilation before it begins."""

    def on_start(self, event: Event) -> None:
        raise NotKept

    def on_end(self, event: Event) -> None:
        pass


@contextmanager
def only_loading() -> Iterator[None]:
    """While entered, a kernel is loaded where it is kept, and never compiled.

    Raises:
        NotKept: At the first call of one that would be compiled.
    """
    with install_listener("numba:compile", _Refuser()):
        yield


def announce() -> None:
    """Tell a user on stderr, once a process, when one of our kernels is compiled from now on.

    numba says when it compiles, and says nothing when it loads a kernel from its cache. No clock
    can tell the two apart: on a busy machine loading takes as long as compiling on an idle one.
    """
    register("numba:compile", _Announcer())


class _Announcer(Listener):
    """Hears numba begin to compile; a user's own functions, in other threads, do not count."""

    def on_start(self, event: Event) -> None:
        data: Any = event.data  # numba does not say its type
        kernel = data["dispatcher"]
        if kernel.py_func.__module__.startswith("unclamp.numerics."):  # the doctor tries numba
            _announce(kernel.stats.cache_path)

    def on_end(self, event: Event) -> None:
        pass


@functools.cache
def _announce(folder: str | None) -> None:
    if folder is None:
        fate = "for this process: no folder to keep them"
    elif (parent := Path(folder).parent) != _temporary():
        fate = "once: they are kept on disk"
    else:
        fate = (
            f"once: they are kept in {parent}, since neither beside unclamp nor in your home can "
            "be written; NUMBA_CACHE_DIR names another folder"
        )
    with suppress(OSError, ValueError):  # a stderr that is closed must not stop the compiler
        print(f"unclamp: compiling the CPU kernels, some seconds, {fate}", file=sys.stderr)


def run(calls: list[tuple[Any, ...]]) -> list[Any]:
    """Make calls, each a function and its arguments, in as many threads as torch uses.

    Return what they return, in their order. None is at work any more when this returns or raises,
    be it for Ctrl-C: they write to addresses, whose memory goes with the caller's arrays.
    """
    threads = min(torch.get_num_threads(), len(calls))
    # Calls of a call would wait for the threads of the pool that wait for them.
    if threads <= 1 or _of_pool.is_set:
        return [function(*arguments) for function, *arguments in calls]
    futures: list[Future[Any]] = []
    try:
        futures += (_pool(threads).submit(*call) for call in calls)
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise


class _OfPool(threading.local):
    """Whether the calling thread is of a pool, whatever torch says of its number of threads."""

    is_set = False


_of_pool = _OfPool()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="unclamp", initializer=_be_one, initargs=(limits(),)
    )


@functools.cache
def limits() -> tuple[Callable[[int], Any], ...] | None:
    """Return what sets the number of threads that torch takes for a caller's thread alone.

    That is MKL's function and OpenMP's. None where torch has not both; `torch.set_num_threads`
    would change the number of threads to come, too.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(torch._C.__file__)
        return library.MKL_Set_Num_Threads_Local, library.omp_set_num_threads
    return None


def _be_one(limits: tuple[Callable[[int], Any], ...] | None) -> None:
    """Have torch compute in the calling thread without any other: the pool has them all."""
    _of_pool.is_set = True
    torch.get_num_threads()  # a thread takes the process's numbers with its first question
    for limit in limits or ():
        limit(1)


# A forked child has the pool but not its threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)
