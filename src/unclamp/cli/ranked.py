"""A command on several ranks: one voice, and where one of them ends all do."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from typing import Any

import typer

from unclamp.cli.app import INTERRUPTED, USER_ERROR
from unclamp.errors import UnclampError

FAILED = 1
_SAID = "unclamp/said"


@contextmanager
def one_voice() -> Iterator[None]:
    """While entered, ranks but the first are silent, and what ends one of them ends all.

    Of several ranks that fail, each for its own reason or because another is gone, one says why, in
    a sentence. A process that fails or is interrupted ends at once: the others wait for it in a
    collective, which its end breaks off, and a process group that is waited for does not let go.
    A process alone is left as it is.
    """
    # Imports of its own: they load torch, and `unclamp --help` should not wait for that.
    from unclamp.explain.ranks import place_of  # noqa: PLC0415
    from unclamp.telemetry.rank import find_place  # noqa: PLC0415

    place = find_place()
    if place.world_size == 1:
        yield
        return
    try:
        with _silence() if place.rank else nullcontext():
            yield
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    except typer.Exit as exit_:
        _end(exit_.exit_code)
    except UnclampError as error:
        _say(str(error), place.rank)
        _end(USER_ERROR)
    except Exception as error:
        said = f"rank {place.rank}: {type(error).__name__}: {error}{place_of(error)}"
        _say(said, place.rank, is_unexpected=True)
        _end(FAILED)


@contextmanager
def _silence() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def _say(text: str, rank: int, *, is_unexpected: bool = False) -> None:
    if _is_first_to_say(rank, is_unexpected=is_unexpected):
        line = " ".join(text.split())
        with suppress(OSError):
            os.write(2, f"unclamp: {line}\n".encode())


def _is_first_to_say(rank: int, *, is_unexpected: bool) -> bool:
    import torch.distributed as dist  # noqa: PLC0415

    if not dist.is_initialized():
        return rank == 0 or is_unexpected
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        return store.compare_set(_SAID, "", str(rank)).decode() == str(rank)
    except RuntimeError:  # it went with the rank that held it
        return True


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
