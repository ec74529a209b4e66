"""The Parquet parts of a run: how they are named, which of them count, how one is written.

A flush writes `part-r0-000017.parquet`, the 17th part of rank 0. A merge of the parts 0 to 15
writes `part-r0-000000-000015.parquet`, and removes them after. A part whose range lies inside
another part's is one that the merge had no time to remove: it does not count. So a kill at any
moment neither loses rows nor doubles them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from unclamp.files import write_atomically

ROW_GROUP_ROWS = 65_536
"""Rows that are read at least when one is wanted: of 1,680 sorted sites, 1 in 15 to 30."""

_NAME = re.compile(r"part-r(\d+)-(\d+)(?:-(\d+))?\.parquet")


@dataclass(frozen=True, kw_only=True)
class PartName:
    """The parts `first` to `last` of a rank in one file, or a part as it was flushed."""

    rank: int
    first: int
    last: int
    is_merged: bool

    @classmethod
    def flushed(cls, rank: int, number: int) -> Self:
        """Return the name of the flush with this number."""
        return cls(rank=rank, first=number, last=number, is_merged=False)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return what the name of a file says; None if it is not that of a part."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        rank, first = int(match[1]), int(match[2])
        last = first if match[3] is None else int(match[3])
        return cls(rank=rank, first=first, last=last, is_merged=match[3] is not None)

    def __str__(self) -> str:
        end = f"-{self.last:06d}" if self.is_merged else ""
        return f"part-r{self.rank}-{self.first:06d}{end}.parquet"


def parts_that_count(folder: Path) -> list[Path]:
    """Return the parts in `folder` whose rows are not in another one, in order of writing.

    Ranks follow one another. A Parquet file of another name counts, after the others. A folder
    that does not exist has no parts.
    """
    named, others = [], []
    for path in _list(folder):
        name = PartName.parse(path.name)
        if name is None:
            others.append(path)
        else:
            named.append((name.rank, name.first, -name.last, not name.is_merged, path))
    counted = []
    rank, end = -1, -1
    for each, _, minus_last, _, path in sorted(named):  # of equal starts, the widest first
        if each != rank or -minus_last > end:
            rank, end = each, -minus_last
            counted.append(path)
    return counted + sorted(others)


def _list(folder: Path) -> set[Path]:
    """List a folder until two lists agree.

    A listing that runs while a merge replaces parts may see neither the old nor the new ones.
    """
    before = None
    while True:
        files = set(folder.glob("*.parquet"))
        if files == before:
            return files
        before = files


def write_part(path: Path, rows: pa.Table) -> None:
    """Write `rows`, with statistics for integer columns only.

    A float column's minimum and maximum leave NaN out, and DuckDB would go by them and skip the
    part that holds the NaN loss it was asked for.

    Raises:
        OSError: The disk refuses; then there is no such part.
    """
    counts = [column.name for column in rows.schema if pa.types.is_integer(column.type)]
    data = pa.BufferOutputStream()
    pq.write_table(
        rows,
        data,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
        write_statistics=counts,  # type: ignore[arg-type]
    )
    path.parent.mkdir(exist_ok=True)  # not its parents: a run that was removed stays removed
    write_atomically(path, data.getvalue())


def read_parts(paths: Iterable[Path]) -> pa.Table:
    """Return the rows of parts of one table, in order, read on this thread alone.

    Raises:
        OSError, pa.ArrowException: A part cannot be read.
    """
    tables = []
    for path in paths:
        with pq.ParquetFile(path) as file:  # unlike read_table, no columns from `lr=0.1/run`
            tables.append(file.read(use_threads=False))
    return pa.concat_tables(tables)


def sync_folder(folder: Path) -> None:
    """Make what was renamed into `folder` survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
