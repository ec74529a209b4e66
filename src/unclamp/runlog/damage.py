"""Parts of a run that cannot be read: found, left out, and told of with what is missing for them.

A part is written in one piece, so that a killed run has none of these; a full disk, a copy that
broke off or a bad sector makes them. Nobody looks for them until a query fails: then each of its
parts is read alone. What was found is remembered by the process, by name, size and time of the
file, so that every `RunLog` of the run leaves out the same.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unclamp.runlog.parts import PartName, column_range, range_in, read_metadata, read_parts
from unclamp.written import counted

_Identity = tuple[str, int, int]
_found: set[_Identity] = set()
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
    """

    path: Path
    rows: int | None = None
    first_step: int | None = None
    last_step: int | None = None

    @property
    def table(self) -> str:
        """The table that lacks its rows."""
        return self.path.parent.name

    def __str__(self) -> str:
        name = f"{self.table}/{self.path.name}"
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
        except UNREADABLE as error:
            if _is_damage(error) and (identity := _identity(path)) is not None:
                with _lock:
                    damaged[path] = identity not in _found
                    _found.add(identity)
    return damaged


def find_without_footer(paths: Iterable[Path]) -> None:
    """As `find_damaged`, of the parts whose end cannot be read: a look, whatever their size."""
    find_damaged(path for path in paths if _metadata(path) is None)


def describe_damage(path: Path, parts: list[Path]) -> DamagedPart:
    """Return what is missing with a damaged part.

    Args:
        path: The part.
        parts: All parts of its table, in order of writing.
    """
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
