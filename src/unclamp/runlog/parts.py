"""The Parquet parts of a run: how they are named, which of them count, how one is written.

A flush writes `part-r0-000017.parquet`, the 17th part of rank 0. A merge of the parts 0 to 15
writes `part-r0-000000-000015.parquet`, and removes them after. A part whose range lies inside
another part's is one that the merge had no time to remove: it does not count. So a kill at any
moment neither loses rows nor doubles them. Where a run was begun again, the second attempt writes
`part-r0-a1-000000.parquet`: its parts are numbered anew and never merged with those before. Where
old steps were thinned (`unclamp.runlog.thinning`), `part-r0-000000-000015-t1.parquet` takes the
place of what lies in its range, and `-t2` that of `-t1`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unclamp.files import write_atomically
from unclamp.runlog.located import arrow_name, arrow_system

ROW_GROUP_ROWS = 65_536
"""Rows that are read at least when one is wanted: of 1,680 sorted sites, 1 in 15 to 30."""

_NAME = re.compile(r"part-r(\d+)-(?:a(\d+)-)?(\d+)(?:-(\d+)(?:-t(\d+))?)?\.parquet")
_NEVER_NAN = {"price_rounding"}
"""Columns of floats that may have statistics: these say where all of it is null."""
_MANY_VALUED = {"amax", "amax_max", "amax_mean", "scaled_amax_max"}
"""Columns of floats that hardly repeat: a dictionary of them takes more room than they do."""


@dataclass(frozen=True, kw_only=True)
class PartName:
    """The parts `first` to `last` of a rank in one file, or a part as it was flushed.

    `attempt` says how often the run had been begun before, `thinned` how often rows were left out.
    """

    rank: int
    first: int
    last: int
    is_merged: bool
    attempt: int = 0
    thinned: int = 0

    @classmethod
    def flushed(cls, rank: int, number: int, *, attempt: int = 0) -> Self:
        """Return the name of the flush with this number."""
        return cls(rank=rank, first=number, last=number, is_merged=False, attempt=attempt)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return what the name of a file says; None if it is not that of a part."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        rank, attempt, first = int(match[1]), int(match[2] or 0), int(match[3])
        last = first if match[4] is None else int(match[4])
        return cls(
            rank=rank,
            first=first,
            last=last,
            is_merged=match[4] is not None,
            attempt=attempt,
            thinned=int(match[5] or 0),
        )

    def __str__(self) -> str:
        attempt = f"a{self.attempt}-" if self.attempt else ""
        end = f"-{self.last:06d}" if self.is_merged else ""
        end += f"-t{self.thinned}" if self.thinned else ""
        return f"part-r{self.rank}-{attempt}{self.first:06d}{end}.parquet"


def attempt_of(path: Path) -> int:
    """Return which attempt of its run wrote a part; the first where its name does not say."""
    name = PartName.parse(path.name)
    return 0 if name is None else name.attempt


def parts_that_count(folder: Path) -> list[Path]:
    """Return the parts in `folder` whose rows are not in another one, in order of writing.

    Ranks follow one another, and the attempts of each. A Parquet file of another name counts, after
    the others. A folder that does not exist has no parts.
    """
    named, others = [], []
    for path in _list(folder):
        name = PartName.parse(path.name)
        if name is None:
            others.append(path)
        else:
            writer = (name.rank, name.attempt)
            newest = (not name.is_merged, -name.thinned)
            named.append((writer, name.first, -name.last, newest, path))
    counted = []
    before, end = None, -1
    for writer, _, minus_last, _, path in sorted(named):  # of equal starts, the widest first
        if writer != before or -minus_last > end:
            before, end = writer, -minus_last
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


def write_part(path: Path, *rows: pa.Table) -> None:
    """Write tables of one schema, with statistics for columns that never hold NaN.

    A float column's minimum and maximum leave NaN out, and DuckDB would go by them and skip the
    part that holds the NaN loss it was asked for. Each table begins a row group.

    Raises:
        OSError: The disk refuses; then there is no such part.
    """
    schema = rows[0].schema
    counts = [
        column.name
        for column in schema
        if pa.types.is_integer(column.type) or column.name in _NEVER_NAN
    ]
    split = [name for name in schema.names if name in _MANY_VALUED]
    data = pa.BufferOutputStream()
    with pq.ParquetWriter(
        data,
        schema,
        compression="zstd",
        write_statistics=counts,  # type: ignore[arg-type]
        use_dictionary=[name for name in _leaves(schema) if name not in split],  # type: ignore[arg-type]
        use_byte_stream_split=split,  # type: ignore[arg-type]
    ) as writer:
        for table in rows:
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
    path.parent.mkdir(exist_ok=True)  # not its parents: a run that was removed stays removed
    write_atomically(path, data.getvalue())


def in_reading_order(casts: pa.Table) -> list[pa.Table]:
    """Return rows of `casts` as a merged part has them: those that clamped, then the others.

    Both are ordered by site, then step, so that a site is in few row groups; and what asks of
    clamping alone reads the row groups of the first, since `saturated` has statistics. Where a step
    was recorded twice the order of its rows tells which was the last: then there is one table.
    """
    rows = casts.sort_by([("site", "ascending"), ("step", "ascending")])  # stable
    site, step = rows["site"].to_numpy(), rows["step"].to_numpy()
    if np.any((np.diff(site) == 0) & (np.diff(step) == 0)):
        return [rows]
    flags = pc.call_function("greater", [rows["saturated"], pa.scalar(0, pa.int64())])
    has_clamped = pc.call_function("coalesce", [rows["clamped"], flags, pa.scalar(True)])
    has_clamped = has_clamped.to_numpy().astype(np.bool_)
    tables = [rows.filter(pa.array(kept)) for kept in (has_clamped, ~has_clamped)]
    return [table for table in tables if len(table)] or [rows]


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the columns of a Parquet file: a map has two."""
    leaves = []
    for column in schema:
        ends = ("key", "value") if pa.types.is_map(column.type) else ()
        leaves += [f"{column.name}.key_value.{end}" for end in ends] or [column.name]
    return leaves


def read_parts(paths: Iterable[Path]) -> pa.Table:
    """Return the rows of parts of one table, in order, read on this thread alone.

    Raises:
        OSError, pa.ArrowException: A part cannot be read.
    """
    tables = []
    for path in paths:
        with opened(path) as file:  # unlike read_table, no columns from `lr=0.1/run`
            tables.append(file.read(use_threads=False))
    return pa.concat_tables(tables)


def read_filled(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    """Return the same with all columns of a schema; those that an earlier version had not are null.

    Raises:
        OSError, pa.ArrowException: As `read_parts`.
    """
    return pa.concat_tables([_filled(read_parts([path]), schema) for path in paths])


def _filled(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    for column in schema:
        if column.name not in rows.schema.names:
            rows = rows.append_column(column, pa.nulls(len(rows), column.type))
    return rows.select(schema.names).cast(schema)


def opened(path: Path) -> pq.ParquetFile:
    """Return a part that is open for reading.

    Raises:
        OSError, pa.ArrowException: It cannot be read.
    """
    return pq.ParquetFile(arrow_name(path), filesystem=arrow_system(path))


def read_metadata(path: Path) -> pq.FileMetaData:
    """Return what the end of a part says of it.

    Raises:
        OSError, pa.ArrowException: It cannot be read.
    """
    return pq.read_metadata(arrow_name(path), filesystem=arrow_system(path))


def column_range(metadata: pq.FileMetaData, name: str) -> tuple[int, int] | None:
    """Return the least and the largest value of a column of whole numbers; None without any."""
    found = []
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if name not in names:
        return None
    place = names.index(name)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        statistics = group.column(place).statistics
        if statistics and statistics.has_min_max:
            found += [statistics.min, statistics.max]
    return (min(found), max(found)) if found else None


def range_in(paths: Iterable[Path], name: str) -> tuple[int, int] | None:
    """Return the same over parts; those that cannot be read are left out."""
    ranges = []
    for path in paths:
        with suppress(OSError, pa.ArrowException):
            if (found := column_range(read_metadata(path), name)) is not None:
                ranges += found
    return (min(ranges), max(ranges)) if ranges else None


def sync_folder(folder: Path) -> None:
    """Make what was renamed into `folder` survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
