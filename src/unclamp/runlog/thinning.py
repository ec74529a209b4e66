"""Leave out old rows of a run's casts under a rule, `Keep`, while every total stays exact.

The rows that go are in the stored summaries, and stay there: a thinned part takes over the summary
of the parts that it replaces. So nothing computes a summary of a thinned part again.

New parts are first written beside the run, into `.compacting`, which is then renamed `.compacted`:
until then the log is the old one, and from then on the new one, which only has to be moved into
place. What a crash leaves of that is finished by the next call; meanwhile each part is whole, in
its old form or its new one.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from unclamp.errors import RunLogError
from unclamp.files import write_json
from unclamp.runlog.attempts import is_alive, refuse_if_written
from unclamp.runlog.connection import connect
from unclamp.runlog.damage import UNREADABLE, find_damaged
from unclamp.runlog.finder import read_header
from unclamp.runlog.folder import read_json, write_header
from unclamp.runlog.header import SCHEMA_VERSION
from unclamp.runlog.keeping import Keep, Thinned
from unclamp.runlog.levels import SUMMARIES, LevelWriter, find_levels, query_arrow, remove_levels
from unclamp.runlog.parts import (
    PartName,
    in_reading_order,
    parts_that_count,
    read_filled,
    sync_folder,
    write_part,
)
from unclamp.runlog.rows_to_keep import RowsToKeep, rows_to_keep
from unclamp.runlog.schema import TABLES, VIEWS
from unclamp.runlog.summary import merged_sql, summary_sql

STAGING, READY = ".compacting", ".compacted"
FULL_ROWS = 1_000_000
"""A part has less than so many rows more than one that it is made of."""
_OWNER, _ENTRY = "owner.json", "thinned.json"
_CASTS = "casts"


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What a compaction did, or would do.

    Attributes:
        rows: Rows of casts before.
        kept: Rows after.
        steps: Steps of which no row is left, and one was.
        bytes_before: Of casts and summaries on disk.
        bytes_after: The same after; of a dry run an estimate, by the share of rows.
        parts_before: Parts of casts.
        parts_after: The same after; of a dry run those that would be left at most.
        before: The steps from this one on are whole.
        is_done: Whether it was done, and not only tried.
    """

    rows: int
    kept: int
    steps: int
    bytes_before: int
    bytes_after: int
    parts_before: int
    parts_after: int
    before: int
    is_done: bool

    @property
    def freed(self) -> int:
        """Bytes that are free after it."""
        return self.bytes_before - self.bytes_after


def compact(
    path: Path,
    keep: Keep | None,
    *,
    near: Iterable[int] = (),
    is_tried: bool = False,
    on_part: Callable[[int, int], None] = lambda done, parts: None,
) -> Compacted:
    """Thin the casts of a run that nobody writes; merge its small parts, and make its levels.

    Args:
        path: The run.
        keep: What stays; None to leave out nothing.
        near: Steps around which all rows stay, as `keep.near` says: of spikes and events.
        is_tried: Whether only to say what it would do.
        on_part: Told after each part how many of how many are done.

    Raises:
        RunLogError: It is no run, is being written or compacted, is of schema 1, cannot be read or
            written.
    """
    header = read_header(path)
    if header.schema_version != SCHEMA_VERSION:
        raise RunLogError(
            f"{path} is of schema {header.schema_version}, and only runs of schema "
            f"{SCHEMA_VERSION} can be compacted"
        )
    refuse_if_written(path, wanted="compacted")
    try:
        if not is_tried:
            _finish(path)
        rows = rows_to_keep(path, keep, near=near)
        found = _Pass(path, rows, is_tried=is_tried, on_part=on_part).run()
        if not is_tried:
            _make_levels(path)
            found = replace(found, bytes_after=_size(path), parts_after=_parts(path))
        return found
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        raise RunLogError(f"{path} cannot be compacted: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Thin:
    """A part of casts without the rows that go.

    Attributes:
        path: Where it lies.
        name: Its name.
        rows: What stays.
        dropped: How many rows do not.
        summary: Of all rows that it ever had.
    """

    path: Path
    name: PartName
    rows: pa.Table
    dropped: int
    summary: pa.Table


class _Pass:
    """One walk over the casts of a run."""

    def __init__(
        self,
        path: Path,
        rows: RowsToKeep,
        *,
        is_tried: bool,
        on_part: Callable[[int, int], None],
    ) -> None:
        self._path, self._rows = path, rows
        self._is_tried, self._on_part = is_tried, on_part
        self._connection = connect(threads=1)
        self._waiting: list[_Thin] = []
        self._before, self._after = 0, 0
        self._steps: set[int] = set()
        self._steps_left: set[int] = set()
        self._parts_after, self._bytes_less, self._staged = 0, 0.0, 0

    def run(self) -> Compacted:
        size, parts = _size(self._path), _parts(self._path)
        try:
            if self._is_tried:
                self._walk()
            else:
                with _staging(self._path):
                    self._walk()
                    self._commit()
        finally:
            self._connection.close()
        return Compacted(
            rows=self._before,
            kept=self._after,
            steps=len(self._steps - self._steps_left),
            bytes_before=size,
            bytes_after=size - round(self._bytes_less),
            parts_before=parts,
            parts_after=self._parts_after,
            before=self._rows.before,
            is_done=not self._is_tried,
        )

    def _walk(self) -> None:
        paths = parts_that_count(self._path / _CASTS)
        for done, path in enumerate(paths, start=1):
            self._take(path)
            self._on_part(done, len(paths))
        self._end_group()

    def _take(self, path: Path) -> None:
        name = PartName.parse(path.name)
        part = None if name is None else self._read(path, name)
        if part is None:
            self._end_group()
            self._parts_after += 1
            return
        if self._waiting:
            last = self._waiting[-1].name
            follows = (last.rank, last.attempt, last.last + 1)
            is_full = sum(len(each.rows) for each in self._waiting) >= FULL_ROWS
            if is_full or follows != (part.name.rank, part.name.attempt, part.name.first):
                self._end_group()
        self._waiting.append(part)

    def _read(self, path: Path, name: PartName) -> _Thin | None:
        """Return a part without what goes; None where it is to stay as it is."""
        stored = self._path / SUMMARIES / path.name
        has_summary = name.is_merged and stored.exists()
        if name.thinned and not has_summary:
            return None  # nothing else knows what it had
        try:
            if name.is_merged and has_summary and self._rows.keeps_all_of(path):
                count, steps = self._rows.extent(path)
                self._count(count, count, steps, steps)
                return None
            rows = read_filled([path], TABLES[_CASTS])
        except UNREADABLE:
            if find_damaged([path]):
                return None  # readers leave it out and say what is missing
            raise
        keeps = self._rows.mask(rows, name, self._connection)
        kept = rows.filter(pa.array(keeps))
        self._count(len(rows), len(kept), _distinct(rows), _distinct(kept))
        if len(rows):
            self._bytes_less += path.stat().st_size * (1 - len(kept) / len(rows))
        if has_summary:
            summary = read_filled([stored], VIEWS[SUMMARIES])
        else:
            summary = query_arrow(self._connection, "unsummed", rows, summary_sql("unsummed"))
        dropped = len(rows) - len(kept)
        if self._is_tried:  # only their number counts
            kept, summary = kept.select(["step"]), summary.slice(0, 0)
        return _Thin(path=path, name=name, rows=kept, dropped=dropped, summary=summary)

    def _count(self, before: int, after: int, steps: set[int], left: set[int]) -> None:
        self._before, self._after = self._before + before, self._after + after
        self._steps |= steps
        self._steps_left |= left

    def _end_group(self) -> None:
        """Make one part of those that wait, unless there is nothing to gain."""
        group, self._waiting = self._waiting, []
        if not group:
            return
        self._parts_after += 1
        is_thinned = any(part.dropped or part.name.thinned for part in group)
        is_as_it_was = len(group) == 1 and group[0].name.is_merged and not group[0].dropped
        if self._is_tried or is_as_it_was:
            return
        thinned = max(part.name.thinned for part in group) + 1 if is_thinned else 0
        last = group[-1].name.last
        name = str(replace(group[0].name, last=last, is_merged=True, thinned=thinned))
        rows = pa.concat_tables([part.rows for part in group])
        summaries = pa.concat_tables([part.summary for part in group])
        staging = self._path / STAGING
        summary = query_arrow(self._connection, "finer", summaries, merged_sql("finer"))
        write_part(staging / SUMMARIES / name, summary)
        write_part(staging / _CASTS / name, *in_reading_order(rows))
        self._staged += 1

    def _commit(self) -> None:
        """Make the new parts count, all at once."""
        if not self._staged:
            return
        refuse_if_written(self._path, wanted="compacted")
        entry = None
        if self._after < self._before and self._rows.keep is not None:
            entry = asdict(
                Thinned(
                    **asdict(self._rows.keep),
                    before=self._rows.before,
                    rows=self._before - self._after,
                    steps=len(self._steps - self._steps_left),
                )
            )
        staging = self._path / STAGING
        write_json(staging / _ENTRY, {"thinned": entry})
        for folder in (staging / _CASTS, staging / SUMMARIES, staging):
            sync_folder(folder)
        staging.rename(self._path / READY)
        sync_folder(self._path)
        _finish(self._path)


def _distinct(rows: pa.Table) -> set[int]:
    return set(np.unique(rows["step"].to_numpy()).tolist())


@contextmanager
def _staging(path: Path) -> Iterator[None]:
    """Have a folder for new parts that no other process has, and leave none behind."""
    staging = path / STAGING
    if staging.exists():
        _refuse_owner(path, staging)
        shutil.rmtree(staging)
    try:
        staging.mkdir()
    except FileExistsError:
        raise RunLogError(f"{path} is being compacted by another process") from None
    try:
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        (staging / _OWNER).write_text(json.dumps(owner), encoding="utf-8")
        for folder in (_CASTS, SUMMARIES):
            (staging / folder).mkdir()
        yield
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_owner(path: Path, staging: Path) -> None:
    """Raise if who began a compaction may be at it."""
    try:
        owner = read_json(staging / _OWNER)
    except (OSError, ValueError):  # it was killed as it began
        return
    process, host = owner.get("process"), owner.get("host")
    if host != socket.gethostname():
        raise RunLogError(
            f"{path} is being compacted by process {process} on {host}, or was when that ended: if "
            f"it has ended, remove {staging}"
        )
    if is_alive(process):
        raise RunLogError(f"{path} is being compacted by process {process}: wait for its end")


def _finish(path: Path) -> None:
    """Move into place what a compaction has made, however much of it was moved already."""
    ready = path / READY
    if not ready.is_dir():
        return
    if not (ready / _ENTRY).exists():  # all was moved, and a crash came while the folder went
        shutil.rmtree(ready, ignore_errors=True)
        return
    told = read_json(ready / _ENTRY)["thinned"]
    header = read_header(path)
    if told is not None and (entry := Thinned.from_dict(told)) not in header.thinned[-1:]:
        write_header(path, replace(header, thinned=[*header.thinned, entry]))
    remove_levels(path)
    for folder in (SUMMARIES, _CASTS):  # a part without its summary would be summed up anew
        (path / folder).mkdir(exist_ok=True)
        for file in sorted((ready / folder).glob("*.parquet")):
            file.replace(path / folder / file.name)
        sync_folder(path / folder)
    counted = {part.name for part in parts_that_count(path / _CASTS)}
    for folder in (_CASTS, SUMMARIES):
        for file in (path / folder).glob("*.parquet"):
            if file.name not in counted:
                file.unlink(missing_ok=True)
    shutil.rmtree(ready, ignore_errors=True)


def _make_levels(path: Path) -> None:
    """Write the coarser summaries of a run that has none."""
    if find_levels(path):
        return
    names = [PartName.parse(part.name) for part in parts_that_count(path / _CASTS)]
    merged = [
        name
        for name in names
        if name is not None and (path / SUMMARIES / str(name)).exists() and name.is_merged
    ]
    with connect(threads=1) as connection:
        for _, own in groupby(merged, key=lambda name: (name.rank, name.attempt)):
            levels = LevelWriter(path, lambda: connection)
            for name in own:
                levels.add(name)


def _size(path: Path) -> int:
    files = [*(path / _CASTS).glob("*.parquet"), *(path / SUMMARIES).rglob("*.parquet")]
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _parts(path: Path) -> int:
    return len(parts_that_count(path / _CASTS))
