"""Which runs are compared, what they are called, and what each recorded. Torch-free."""

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unclamp.errors import RunLogError, UnclampError
from unclamp.files import to_json
from unclamp.report.recorded import RunRecord, read_run
from unclamp.report.status import run_notes
from unclamp.runlog import Header, RunLog, find_runs, is_run, read_header
from unclamp.study.config import is_study

MOST_FOUND = 12
"""Runs of a folder that are compared when nobody named them; more are hard to read in a chart."""
READERS = 4
_NUMBER = re.compile(r"(seed|run|s|r)?[-_=. ]?\d+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One run: its short name, and what it recorded.

    Attributes:
        name: The end of its path, as long as it takes to tell all runs apart.
        notes: What a reader must know of it before its figures.
    """

    name: str
    path: Path
    header: Header
    record: RunRecord
    notes: list[str]

    @cached_property
    def losses(self) -> dict[int, float]:
        """The losses that were recorded by step, NaN and Inf among them."""
        record = self.record
        return {s: x for s, x in zip(record.steps, record.loss, strict=True) if x is not None}

    @property
    def seed(self) -> Any:
        """What the run's metadata say of its seed; None where they say nothing."""
        return self.header.metadata.get("seed")


def runs_to_compare(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the runs that these paths ask to be compared, and notes on which were left out.

    Several paths are the runs themselves. A single one is a folder that holds several, at any
    depth, of which the newest are taken; an empty list means that it is for the report of a
    single run or a study.

    Raises:
        UnclampError: A path was given twice, or is a study.
        RunLogError: One of several paths is no run.
    """
    if len(paths) == 1:
        return _found_below(paths[0])
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UnclampError(f"{path} was given {count} times: name runs that differ")
    for path in paths:
        if is_study(path):
            runs = [str(run) for run in find_runs(path)[:3]]
            raise UnclampError(
                f"{path} is a study, whose arms `unclamp report {path}` compares; to compare some "
                f"of its runs with others, name them: {', '.join(runs) or 'it has none yet'}"
            )
        if not is_run(path):
            read_header(path)  # raises, and says what the folder is
    return list(paths), []


def _found_below(path: Path) -> tuple[list[Path], list[str]]:
    if is_run(path) or is_study(path):
        return [], []
    studies = sorted({study for run in find_runs(path) if (study := _study_of(run, path))})
    runs = [run for run in find_runs(path) if not _study_of(run, path)]
    if len(runs) < 2:
        return [], []
    notes = [
        f"{study} is a study and was left out: `unclamp report {study}` compares its arms."
        for study in studies
    ]
    if len(runs) <= MOST_FOUND:
        return runs, notes
    newest = sorted(runs, key=lambda run: (_created(run), run))[-MOST_FOUND:]
    return sorted(newest), [
        f"{path} holds {len(runs)} runs: the {MOST_FOUND} newest are compared. Name runs to "
        "compare others.",
        *notes,
    ]


def _study_of(run: Path, top: Path) -> Path | None:
    """Return the study below `top` that holds a run, if one does."""
    between = [run, *run.parents]
    return next((folder for folder in between[: between.index(top)] if is_study(folder)), None)


def _created(run: Path) -> str:
    try:
        return read_header(run).created
    except RunLogError:
        return ""


def read_sides(paths: Sequence[Path]) -> tuple[list[Side], list[str]]:
    """Return the runs that can be read, and why the others cannot.

    Raises:
        RunLogError: Fewer than two can be read.
    """
    names = short_names(paths)
    with ThreadPoolExecutor(READERS) as pool:  # DuckDB and Arrow read outside of Python's lock
        found = list(pool.map(_read, names, paths))
    sides = [side for side in found if isinstance(side, Side)]
    lost = [
        f"{name} cannot be read: {error}"
        for name, error in zip(names, found, strict=True)
        if isinstance(error, str)
    ]
    if len(sides) < 2:
        what = f"only {sides[0].name} can be read" if sides else "none of the runs can be read"
        raise RunLogError(f"nothing to compare, {what}: {'; '.join(lost)}")
    return sides, [f"{each.rstrip('.')}." for each in lost]


def _read(name: str, path: Path) -> Side | str:
    """Return a run, or why it cannot be read."""
    try:
        with RunLog.open(path) as log:
            header = log.header
            record, _ = read_run(log)
            notes = run_notes(log)
    except RunLogError as error:
        return " ".join(str(error).split())
    return Side(name=name, path=path, header=header, record=record, notes=notes)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the ends of paths, as many of their parts as it takes to tell all of them apart.

    Ends that are but numbers or seeds tell nothing of what a run was, so they are not enough where
    the runs lie in different folders.

    Example:
        >>> short_names([Path("runs/a/seed-0"), Path("runs/b/seed-0")])
        ['a/seed-0', 'b/seed-0']
    """
    parts = [path.resolve().parts for path in paths]
    deepest = max(map(len, parts))
    for depth in range(1, deepest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) < len(names):
            continue
        above = {part[:-depth] for part in parts}
        if len(above) == 1 or not all(_NUMBER.fullmatch(name) for name in names):
            return names
    return [str(path) for path in paths]


def canonical(data: object) -> str:
    """Return data as text that is equal where the data are, whatever the order of keys."""
    if isinstance(data, dict):
        items = sorted((str(key), canonical(value)) for key, value in data.items())
        return "{" + ",".join(f"{to_json(key)}:{value}" for key, value in items) + "}"
    if isinstance(data, list):
        return "[" + ",".join(map(canonical, data)) + "]"
    return to_json(data, indent=None)
