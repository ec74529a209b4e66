"""Where a run begins: in a new folder, in one that gets a number, or in the place of an old run.

Going on with a run that ended is for `attempts`, and what makes a folder this run's for `folder`.
An old run is moved aside, and removed only once the new one has its header; if that fails, it is
moved back.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from unclamp.errors import RunLogError
from unclamp.runlog.attempts import Joined, begin_again, is_alive, is_begun
from unclamp.runlog.finder import is_run
from unclamp.runlog.folder import (
    Claim,
    check_header,
    create_run,
    is_of_this_process,
    read_claims,
    read_json,
)
from unclamp.runlog.header import RUN_FILE, Header
from unclamp.runlog.schema import TABLES

NUMBER = "{n}"
"""In a path: the first free number."""
_OWN = re.compile(
    rf"{re.escape(RUN_FILE)}|{'|'.join(TABLES)}|summaries|snapshots|explain-cache|report\.html"
    r"|explain-.*\.json|\.writer-r\d+(-a\d+)?\.json|\.attempt-\d+\.json|\.compact(ing|ed)|\..*\.tmp"
)
"""What unclamp puts into a run's folder."""


_FORBIDDEN: list[str] = []
"""Why no run may begin now."""


@contextmanager
def starting_no_run(why: str) -> Iterator[None]:
    """Refuse every new run meanwhile: code that is executed again must not replace its own run."""
    _FORBIDDEN.append(why)
    try:
        yield
    finally:
        _FORBIDDEN.pop()


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Where a rank writes: the folder, and which attempt of the run in it."""

    path: Path
    joined: Joined


def begin_run(
    path: Path,
    *,
    rank: int,
    header: Header,
    overwrite: bool = False,
    resume: bool = False,
    beats_s: float | None = None,
    before_replacing: Callable[[], None] = lambda: None,
) -> Begun:
    """Claim a folder for `rank` of the run that `header` describes, and return it.

    Args:
        path: The folder. With "{n}" in it, the first number from 1 on whose folder is not there
            takes its place; of processes that ask at once, each gets a number of its own.
        rank: As in `create_run`.
        header: As in `create_run`.
        overwrite: Whether a run that is there is replaced.
        resume: Whether a run that is there, and has ended, goes on.
        beats_s: Seconds between two signs of life that the writer will give.
        before_replacing: Called when a run is to be replaced and nothing speaks against that but
            that it may still be written: who writes it in this process can close it.

    Raises:
        RunLogError: As `create_run`; or, where a number or an old run's place is asked for, the
            run has several ranks, which would have to agree. A run is not replaced that a process
            still writes, as far as that can be known, nor one whose folder holds other files.
    """
    if _FORBIDDEN:
        raise RunLogError(f"no run can begin in {path} while {_FORBIDDEN[-1]}")
    if resume and (overwrite or NUMBER in str(path)):
        asked = "overwrite=True, which replaces it" if overwrite else f"a new number for {NUMBER}"
        raise RunLogError(f"resume=True goes on with the run in {path}: leave out {asked}")
    if (overwrite or NUMBER in str(path)) and header.world_size > 1:
        asked = "overwrite=True" if overwrite else f"a path with {NUMBER}"
        raise RunLogError(
            f"{asked} is for a run of one process, and this one has {header.world_size}: give all "
            "ranks the name of one new folder"
        )
    if resume and is_begun(path):
        check_header(header)
        joined = begin_again(path, rank=rank, header=header, beats_s=beats_s)
        return Begun(path=path, joined=joined)
    joined = Joined(attempt=0, header=header, first_site=0)
    if NUMBER in str(path):
        path = _numbered(path)
        try:
            create_run(path, rank=rank, header=header, beats_s=beats_s)
        except BaseException:
            with suppress(OSError):
                path.rmdir()
            raise
    elif overwrite and _is_taken(path):
        check_header(header)
        with _moved_aside(path, before_replacing) as place:
            create_run(place, rank=rank, header=header, beats_s=beats_s)
    else:
        create_run(path, rank=rank, header=header, beats_s=beats_s)
    return Begun(path=path, joined=joined)


def _numbered(path: Path) -> Path:
    for number in count(1):
        candidate = Path(str(path).replace(NUMBER, str(number)))
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
        except FileExistsError:
            if not candidate.parent.is_dir():
                raise RunLogError(
                    f"cannot create the run {candidate}: {candidate.parent} is a file"
                ) from None
            continue
        except OSError as error:
            raise RunLogError(f"cannot create the run {candidate}: {error}") from error
        return candidate
    raise AssertionError  # numbers do not end


def _is_taken(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


@contextmanager
def _moved_aside(path: Path, before_replacing: Callable[[], None]) -> Iterator[Path]:
    """Have the place free (the folder itself, no link); after an error all is as it was."""
    held = path.resolve()  # of a link, what it leads to
    _check_is_a_run_alone(path, named=path)
    before_replacing()
    before = _check_replaceable(path, named=path)
    aside = held.with_name(f".{held.name}.{os.getpid()}.replaced")
    try:
        held.rename(aside)
    except OSError as error:
        raise RunLogError(f"cannot replace the run {path}: {error}") from error
    try:
        # Another process may have replaced it between the look and the move.
        if _check_replaceable(aside, named=path) != before:
            raise RunLogError(f"{path} was replaced by another process just now; try again")
        yield held
    except BaseException:
        _move_back(aside, held)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_back(aside: Path, held: Path) -> None:
    with suppress(OSError):
        held.rmdir()  # empty, or another process's by now
    try:
        aside.rename(held)
    except OSError as error:
        raise RunLogError(
            f"the new run in {held} could not begin, and the old one, which is in {aside}, could "
            f"not be moved back: {error}"
        ) from error


def _check_is_a_run_alone(path: Path, *, named: Path) -> None:
    """Raise unless a folder holds a run and nothing else."""
    if not is_run(path):
        raise RunLogError(
            f"overwrite=True replaces a run, and {named} holds none "
            f"({sorted(entry.name for entry in path.iterdir())[:5]}); name another folder"
        )
    foreign = sorted(e.name for e in path.iterdir() if not _OWN.fullmatch(e.name))
    if foreign:
        raise RunLogError(
            f"overwrite=True would remove {foreign[:5]} from {named}, which unclamp did not write: "
            "move it away, or name another folder"
        )


def _check_replaceable(path: Path, *, named: Path) -> object:
    """Raise unless a folder holds a run that nobody writes and nothing else; return its id."""
    _check_is_a_run_alone(path, named=named)
    header = read_json(path / RUN_FILE)
    if header.get("status") == "running":
        for claim in read_claims(path):
            _refuse_writer(named, claim)
    return header.get("run_id"), header.get("created")


def _refuse_writer(path: Path, claim: Claim) -> None:
    """Raise if a process that claimed a run, whose header says "running", may still write it."""
    process, host = claim.data.get("process"), claim.data.get("host")
    if host != socket.gethostname():
        raise RunLogError(
            f"{path} is being written by process {process} on {host}, or was when that ended: "
            "if it has ended, remove the folder yourself; or name another"
        )
    if is_of_this_process(claim.data):
        raise RunLogError(
            f"{path} is being written by this process: close its recorder first, or name another "
            "folder"
        )
    if process != os.getpid() and is_alive(process):
        raise RunLogError(
            f"{path} is being written by process {process}: stop that first, or name another folder"
        )
