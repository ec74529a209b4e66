"""Parts of a run that cannot be read: found, left out, and told of with what is missing for them.

A part is written in one piece, so that a killed run has none of these; a full disk, a copy that
broke off or a bad sector makes them. Nobody looks for them until a query fails: then each of its
parts is read alone. What was found is remembered by the process, by name, size and time of the
file, so that every `RunLog` of the run leaves out the same.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unclamp.errors import UnclampWarning
from unclamp.runlog.levels import SUMMARIES
from unclamp.runlog.located import is_remote
from unclamp.runlog.parts import PartName, column_range, range_in, read_metadata, read_parts
from unclamp.runlog.schema import TABLES
from unclamp.runlog.storage import StorageError
from unclamp.written import counted

_Identity = tuple[str, int, int]
_found: set[_Identity] = set()
_told: set[DamagedPart] = set()
_lock = threading.Lock()

UNREADABLE = (OSError, pa.ArrowException, MemoryError)
_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}
"""Why a part cannot be read now, that is no damage of the part."""


@dataclass(frozen=True, kw_only=True)
class DamagedPart:
    """A part that is left out of what a run's tables show.

    Attributes:
        path: The file.
        rows: Rows in it; None where that cannot be read either.
        first_step: First step that it may have rows of; None where that is not known.
        last_step: The last one, likewise.
        is_summary: Whether it is a summary. Of a part whose rows were thinned nothing else knows
            what these were; any other is made again, of rows that are there.
        is_gone: Whether there is no such file any more.
    """

    path: Path
    rows: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    is_summary: bool = False
    is_gone: bool = False

    @property
    def table(self) -> str:
        """The table that lacks its rows."""
        return self.path.parent.name

    def __str__(self) -> str:
        name = f"{self.table}/{self.path.name}"
        if self.is_summary:
            how = "is missing" if self.is_gone else "is damaged"
            if not _is_thinned(self.path):
                return f"{name} {how}, and made again of rows that are there: nothing is missing"
            return (
                f"{name} {how}: it alone told of the rows of casts that were thinned, so totals"
                f"{self._steps()} are of the rows that are left"
            )
        count = "rows" if self.rows is None else counted(self.rows, "row")
        are = "is" if self.rows == 1 else "are"
        return f"{name} is damaged and left out: {count}{self._steps()} {are} missing"

    def _steps(self) -> str:
        first, last = self.first_step, self.last_step
        if first is None and last is None:
            return ", of steps that are not known,"
        if last is None:
            return f" of steps from {first:,} on"
        if first is None:
            return f" of steps up to {last:,}"
        return f" of step {first:,}" if first == last else f" of the steps {first:,} to {last:,}"


def is_damaged(path: Path) -> bool:
    """Whether this very file was found damaged in this process."""
    return bool(_found) and _identity(path) in _found


def find_damaged(paths: Iterable[Path]) -> dict[Path, bool]:
    """Read each part alone, and remember those that cannot be read.

    Returns:
        These, and of each whether it is news: two threads may find the same. A part that has gone
        meanwhile is none.
    """
    damaged = {}
    for path in paths:
        try:
            read_parts([path])
        except StorageError:  # the next part would say the same
            raise
        except UNREADABLE as error:
            if _is_damage(error) and (identity := _identity(path)) is not None:
                with _lock:
                    damaged[path] = identity not in _found
                    _found.add(identity)
    return damaged


def find_without_footer(paths: Iterable[Path]) -> None:
    """As `find_damaged`, of the parts whose end cannot be read: a look, whatever their size."""
    find_damaged(path for path in paths if not _has_end(path))


def _has_end(path: Path) -> bool:
    """Return whether a file ends as one of Parquet does: with the size of a footer that fits."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 8, 0))
            end = file.read(8)
    except OSError:
        return False
    return end[4:] == b"PAR1" and int.from_bytes(end[:4], "little") <= size - 12


def lost_summaries(run: Path, casts: Iterable[Path], *, looks: bool = True) -> list[DamagedPart]:
    """Return the summaries of thinned parts that are missing or damaged.

    Args:
        run: The run.
        casts: Its parts of casts.
        looks: Whether to look at the end of each file, and not only for it.
    """
    thinned = [path for path in casts if _is_thinned(path)]
    if not thinned:
        return []
    there = {path.name: path for path in (run / SUMMARIES).glob("*.parquet")}
    if looks:
        find_without_footer(there[path.name] for path in thinned if path.name in there)
    return [
        _of_summary(run / SUMMARIES / path.name, is_gone=path.name not in there)
        for path in thinned
        if path.name not in there or is_damaged(there[path.name])
    ]


def warn_of_lost_summaries(run: Path, casts: Iterable[Path]) -> None:
    """Tell of each lost summary, once a process: totals are not those of all rows."""
    for lost in lost_summaries(run, casts, looks=not is_remote(run)):
        if lost not in _told:
            tell(run, lost)


def tell(run: Path, part: DamagedPart) -> None:
    """Warn of a part that is left out of what a run shows."""
    with _lock:
        _told.add(part)
    warnings.warn(f"{run}: {part}", UnclampWarning, stacklevel=6)


def _of_summary(path: Path, *, is_gone: bool = False) -> DamagedPart:
    casts = path.parent.parent / "casts" / path.name
    first, last = range_in([casts], "step") or (None, None)
    return DamagedPart(
        path=path, first_step=first, last_step=last, is_summary=True, is_gone=is_gone
    )


def _is_thinned(path: Path) -> bool:
    name = PartName.parse(path.name)
    return name is not None and name.thinned > 0


def describe_damage(path: Path, parts: list[Path]) -> DamagedPart:
    """Return what is missing with a damaged part.

    Args:
        path: The part.
        parts: All parts of its table, in order of writing.
    """
    if path.parent.name not in TABLES:
        return _of_summary(path)
    metadata = _metadata(path)
    if metadata is not None:
        first, last = column_range(metadata, "step") or (None, None)
        return DamagedPart(path=path, rows=metadata.num_rows, first_step=first, last_step=last)
    writer, place = _writer(path), parts.index(path)
    before = range_in((p for p in parts[:place] if _writer(p) == writer), "step")
    after = range_in((p for p in parts[place + 1 :] if _writer(p) == writer), "step")
    return DamagedPart(
        path=path,
        first_step=None if before is None else before[1] + 1,
        last_step=None if after is None else after[0] - 1,
    )


def _is_damage(error: BaseException) -> bool:
    """Whether a part itself is to blame: not a lack of files, memory or rights."""
    if isinstance(error, MemoryError | pa.ArrowMemoryError):
        return False
    if isinstance(error, PermissionError | ConnectionError | TimeoutError):  # also without errno
        return False
    return not (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE)


def _identity(path: Path) -> _Identity | None:
    with suppress(OSError):
        stat = path.stat()
        return str(path.absolute()), stat.st_size, stat.st_mtime_ns
    return None


def _writer(path: Path) -> tuple[int, int] | None:
    """Return the rank that wrote a part, and in which attempt of the run."""
    name = PartName.parse(path.name)
    return None if name is None else (name.rank, name.attempt)


def _metadata(path: Path) -> pq.FileMetaData | None:
    try:
        return read_metadata(path)
    except UNREADABLE:
        return None
