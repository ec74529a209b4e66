"""Coarser summaries of merged parts, so that what is told of months reads few rows.

The summary of a part has a row per `SUMMARY_STEPS` steps, rank and site. Where the summaries of
`FACTOR` parts follow one another, they are added up in windows that are `FACTOR` times as wide, as
one file of level 1, and those of level 1 as one of level 2: `summaries/level-1/part-r0-000000-
000119.parquet` covers parts 0 to 119 of casts. A level is a copy of what lies below it. A file of
it counts where the parts in its range are there without a gap, and where it is missing the level
below serves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa

from unclamp.runlog.parts import PartName, parts_that_count, read_filled, write_part
from unclamp.runlog.schema import SUMMARY_STEPS, VIEWS
from unclamp.runlog.summary import coarser_sql

SUMMARIES = "summaries"
FACTOR = 4
"""A level takes a quarter of the room of the one below: all of them take a third of the lowest."""
_FOLDER = "level-"

Levels = Mapping[int, Sequence[Path]]
"""The files of each level from 1 on."""


def window_steps(level: int) -> int:
    """Return how many steps a row of a level stands for; level 0 is that of stored summaries."""
    return SUMMARY_STEPS * FACTOR**level


def stored_name(level: int) -> str:
    """Return the name of the relation that holds the stored summaries, as coarse as a level."""
    return "stored_summaries" if level == 0 else f"stored_summaries_{level}"


def level_for(steps: int, *, most: int, coarsest: int) -> int:
    """Return the highest level whose windows are still as many as `most` in so many steps."""
    level = 0
    while level < coarsest and window_steps(level + 1) * most <= steps:
        level += 1
    return level


def level_folder(run: Path, level: int) -> Path:
    """Return where the summaries of a level lie."""
    return run / SUMMARIES / f"{_FOLDER}{level}" if level else run / SUMMARIES


def find_levels(run: Path) -> dict[int, list[Path]]:
    """Return the files of each level that the run has."""
    found = {}
    for folder in (run / SUMMARIES).glob(f"{_FOLDER}*"):
        number = folder.name.removeprefix(_FOLDER)
        if number.isdecimal() and (files := parts_that_count(folder)):
            found[int(number)] = files
    return found


def remove_levels(run: Path) -> None:
    """Remove the coarser summaries of a run; readers take the finer ones."""
    for folder in (run / SUMMARIES).glob(f"{_FOLDER}*"):
        shutil.rmtree(folder, ignore_errors=True)


def coarse_summaries(
    parts: Iterable[Path], levels: Levels, *, level: int, may_use: Callable[[Path, int], bool]
) -> list[Path]:
    """Return the files whose rows add up to the summaries of `parts`, as coarse as a level.

    Args:
        parts: Stored summaries, one a part of casts.
        levels: What coarser ones there are.
        level: The highest that may be taken.
        may_use: Says of a coarser file, with windows of so many steps, whether all rows count.
    """
    fine = {path: name for path in parts if (name := PartName.parse(path.name)) is not None}
    starts = {(name.rank, name.attempt, name.first): path for path, name in fine.items()}
    chosen = []
    for number in sorted((n for n in levels if n <= level), reverse=True):
        for path in levels[number]:
            covered = _covered(path, starts)
            if covered and may_use(path, window_steps(number)):
                chosen.append(path)
                for name in covered:
                    del starts[name.rank, name.attempt, name.first]
    return chosen + sorted(starts.values())


def _covered(path: Path, starts: Mapping[tuple[int, int, int], Path]) -> list[PartName]:
    """Return the parts in a file's range; none unless they fill it."""
    whole = PartName.parse(path.name)
    if whole is None:
        return []
    covered, number = [], whole.first
    while number <= whole.last:
        found = starts.get((whole.rank, whole.attempt, number))
        name = None if found is None else PartName.parse(found.name)
        if name is None:
            return []
        covered.append(name)
        number = name.last + 1
    return covered if number == whole.last + 1 else []


class LevelWriter:
    """Writes coarser summaries of one writer's parts, told of them in the order of their numbers.

    What has too few files for the next level waits, in memory, and is lost with the process.
    """

    def __init__(self, run: Path, connection: Callable[[], duckdb.DuckDBPyConnection]) -> None:
        self._run = run
        self._connection = connection
        self._waiting: list[list[PartName]] = []

    def add(self, name: PartName, *, level: int = 0) -> None:
        """Take note of a file of a level, and write one of the next when there are enough.

        Raises:
            OSError, pa.ArrowException, duckdb.Error: It cannot be written. It is tried again with
                the next file, and meanwhile the level below serves.
        """
        if level == len(self._waiting):
            self._waiting.append([])
        waiting = self._waiting[level]
        if waiting and waiting[-1].last + 1 != name.first:
            waiting.clear()  # across a gap no file can claim to cover a range
        waiting.append(name)
        if len(waiting) < FACTOR:
            return
        merged = replace(waiting[0], last=waiting[-1].last, is_merged=True, thinned=0)
        self._write(waiting, merged, level=level + 1)
        waiting.clear()
        self.add(merged, level=level + 1)

    def _write(self, group: Sequence[PartName], merged: PartName, *, level: int) -> None:
        below, folder = level_folder(self._run, level - 1), level_folder(self._run, level)
        rows = read_filled((below / str(name) for name in group), VIEWS[SUMMARIES])
        query = coarser_sql("finer_summaries", window_steps(level))
        coarser = query_arrow(self._connection(), "finer_summaries", rows, query)
        folder.mkdir(exist_ok=True)
        write_part(folder / str(merged), coarser)


def query_arrow(
    connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table, query: str
) -> pa.Table:
    """Return what a query makes of `rows`, which it calls by `name`, as rows of `summaries`."""
    connection.register(name, rows)
    try:
        found = connection.sql(f"{query} ORDER BY first_step, rank, site").to_arrow_table()
    finally:
        connection.unregister(name)
    return found.cast(VIEWS[SUMMARIES])
