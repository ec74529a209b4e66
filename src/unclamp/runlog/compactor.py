"""Merge the parts of a run while it goes on, on a thread of its own.

A flush leaves a part per table, which over weeks makes a million files. Whenever a level holds
`FAN_IN` parts of a table they become one part of the next level; a part of `FULL_ROWS` rows is
full and stays. Merged casts are ordered (`in_reading_order`), so that one site, or what clamped, is
read from a few row groups. They get a summary (`unclamp.runlog.summary`) that is exact for them;
those of full parts are added up to coarser ones (`unclamp.runlog.levels`).

The order of a merge makes it safe to die in: the summary appears, then the merged part, then the
parts in it go. Readers leave out parts that lie inside another one. A merge that fails costs no
row; it is tried again later, and `problem` says why it last failed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import pyarrow as pa

from unclamp.runlog.connection import connect
from unclamp.runlog.levels import SUMMARIES, LevelWriter, query_arrow
from unclamp.runlog.parts import PartName, in_reading_order, read_parts, sync_folder, write_part
from unclamp.runlog.schema import TABLES
from unclamp.runlog.summary import summary_sql
from unclamp.worker import Worker

FAN_IN = 16
FULL_ROWS = 1_000_000
"""A merged part has less than twice as many rows, some 250 MB in memory while it is made."""
CLOSE_S = 10.0
"""No merge begins later than so many seconds after the end of the run, or goes on for long."""
RETRY_S = (60.0, 3600.0)
"""Wait before the first repetition of a merge that failed, doubled up to the second number."""

_Levels = list[list["Part"]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part on disk, and how many rows it has."""

    table: str
    name: PartName
    rows: int


class Compactor:
    """Merge the parts of one rank of the run in the folder `path`.

    `add` and `close` are called from outside, in the order in which parts were written.
    """

    def __init__(self, path: Path) -> None:
        self.problem: BaseException | None = None
        self._path = path
        self._levels: dict[str, _Levels] = {table: [] for table in TABLES}
        self._stop_at = float("inf")
        self._retry_at = 0.0
        self._wait_s = RETRY_S[0]
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._coarser = LevelWriter(path, self._connect)
        self._worker = Worker(
            self._take,
            name="unclamp-compactor",
            on_begin=_yield_to_training,
            on_due=self._merge_left,  # nobody waits and there is no interval: once, at the end
            closes_at_exit=False,  # the writer does, and allows no time for merges then
        )

    def add(self, part: Part) -> None:
        """Take note of a part that has been written, and merge when it is time; do not wait."""
        self._worker.put(part)

    def close(self, *, at_once: bool) -> None:
        """Merge what is left into few parts, or only end soon if `at_once`; wait for it."""
        self._stop_at = time.monotonic() + (0.0 if at_once else CLOSE_S)
        self._retry_at = 0.0
        self._worker.close()
        # What ended the thread has left parts small, and rows where they are.
        self.problem = self._worker.take_failure() or self.problem

    def _take(self, part: Part) -> None:
        levels = self._levels[part.table]
        if not levels:
            levels.append([])
        levels[0].append(part)
        self._try(self._merge_due, levels)

    def _merge_left(self) -> None:
        for levels in self._levels.values():
            self._try(self._merge_all, levels)
        if self._connection is not None:
            self._connection.close()

    def _try(self, merge: Callable[[_Levels], None], levels: _Levels) -> None:
        """Merge unless a failure was too recent or the time is up."""
        if not self._retry_at <= time.monotonic() < self._stop_at:
            return
        try:
            merge(levels)
            self.problem = None
            self._wait_s = RETRY_S[0]
        except _OutOfTime:
            pass
        except Exception as error:
            self.problem = error
            self._retry_at = time.monotonic() + self._wait_s
            self._wait_s = min(2 * self._wait_s, RETRY_S[1])

    def _merge_due(self, levels: _Levels) -> None:
        level = 0
        while level < len(levels):
            while due := _due(levels[level]):
                merged = self._merge(due)
                del levels[level][: len(due)]
                if merged.rows < FULL_ROWS:
                    if level + 1 == len(levels):
                        levels.append([])
                    levels[level + 1].append(merged)
                elif merged.table == "casts":
                    self._coarser.add(merged.name)
            level += 1

    def _merge_all(self, levels: _Levels) -> None:
        """Merge what is not full: the highest level holds the oldest parts."""
        left = [part for level in reversed(levels) for part in level]
        levels.clear()
        while left:
            group = _due(left, fan_in=len(left))
            self._merge(group)
            left = left[len(group) :]

    def _merge(self, parts: list[Part]) -> Part:
        """Put one part in the place of `parts`, which follow one another without a gap."""
        table, first, last = parts[0].table, parts[0].name, parts[-1].name
        if len(parts) == 1 and first.is_merged:
            return parts[0]
        name = replace(first, last=last.last, is_merged=True)
        folder = self._path / table
        rows = read_parts(folder / str(part.name) for part in parts)
        self._check_time()
        if table == "casts":
            write_part(self._path / SUMMARIES / str(name), self._summarise(rows))
            self._check_time()
            tables = in_reading_order(rows)
            self._check_time()
        else:
            tables = [rows]
        write_part(folder / str(name), *tables)
        sync_folder(folder)
        for part in parts:
            _remove(folder / str(part.name))
            if table == "casts" and part.name.is_merged:
                _remove(self._path / SUMMARIES / str(part.name))
        return Part(table=table, name=name, rows=rows.num_rows)

    def _summarise(self, casts: pa.Table) -> pa.Table:
        name = "rows_to_summarise"
        return query_arrow(self._connect(), name, casts, summary_sql(name))

    def _connect(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            self._connection = connect(threads=1)
        return self._connection

    def _check_time(self) -> None:
        if time.monotonic() >= self._stop_at:
            raise _OutOfTime


class _OutOfTime(Exception):
    """The run is over, and its last merge would take too long."""


def _due(parts: list[Part], *, fan_in: int | None = None) -> list[Part]:
    """Return the oldest parts that are to be one; none while there are too few.

    They are a full part's rows, or a level's worth, or all until a gap: a merge across it would
    claim the range of the full part that lies there.
    """
    rows = 0
    for count, part in enumerate(parts, start=1):
        rows += part.rows
        is_before_gap = count < len(parts) and parts[count].name.first != part.name.last + 1
        if rows >= FULL_ROWS or count == (fan_in or FAN_IN) or is_before_gap:
            return parts[:count]
    return []


def _remove(path: Path) -> None:
    with suppress(OSError):  # what stays does not count: it lies inside the merged part
        path.unlink()


def _yield_to_training() -> None:
    """Give way to every other thread: on Linux a priority may be that of a thread alone."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
