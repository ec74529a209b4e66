"""Records of somebody else's file as columns over steps: which count, and what a step is.

`curve_files` and `console_files` bring rows; `selections` says which of them are of training, of
one run. Which column is the loss, and what repeated steps mean, is for `curves`.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unclamp.analysis.selections import (
    RANK_NAMES,
    Choice,
    Table,
    named,
    one_run,
    pivoted,
    refuse_runs,
    trained_rows,
    wanted_rows,
)
from unclamp.errors import AnalysisError
from unclamp.written import counted

STEP_NAMES = ("step", "global_step", "trainer_global_step", "train_global_step", "train_step",
              "training_step", "iteration", "iter", "train_iter", "steps", "current_steps",
              "current_step", "iterations", "iters",
              "num_updates", "update", "updates", "iter_num", "n_iter", "it", "itr", "batch",
              "batch_idx", "s")  # fmt: skip
SURE_STEPS = 12
"""So many of the names are a step's whatever they hold; the others only if they are whole."""
EPOCH_NAMES = ("epoch", "epochs", "train_epoch", "current_epoch")
MISSING = {"", "na", "n/a", "none", "null", "-"}
_WINDOWS_NUMBERS = re.compile(
    r"([-+]?)1\.?#(inf|ind|qnan|snan)\w*|([-+]?)nan\(\w*\)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Columns as recorded.

    Attributes:
        columns: By name, the step and the value of each record, in order; None is missing.
        source: What it was read from, in words.
        places: Where in the file each record is, such as "line 7"; empty where there are no such.
        same: Names that one header gives to several columns, which are told apart by place.
        restarts: Epoch and step of each step number, where the file counts steps anew in each
            epoch; the step numbers here then only give the order. Empty otherwise.
        step_name: What the file calls a step.
        notes: What was left out, a sentence each.
        ranks: The rank that wrote each record; empty where there are not several.
    """

    columns: dict[str, tuple[Sequence[int], Sequence[Any]]]
    source: str
    places: Sequence[str] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    restarts: Sequence[tuple[int, int]] = ()
    step_name: str = "step"
    notes: Sequence[str] = ()
    ranks: Sequence[int] = ()

    def numbers(self, name: str, path: Path) -> tuple[Sequence[int], list[float | None]]:
        """Return the steps and numbers of a column; None for a missing one.

        Raises:
            AnalysisError: A cell is no number; it names the place, the column and `path`.
        """
        at, cells = self.columns[name]
        found = []
        for i, cell in enumerate(cells):
            place = self.places[i] if self.places else f"record {i + 1}"
            found.append(_number_at(cell, f"column {name!r}, {place} of {path}"))
        return at, found


def to_number(value: Any) -> float | None:
    """Return what a cell holds: a number, None if nothing.

    Raises:
        AnalysisError: Text that is no number.

    Numerics: "nan", "inf" and "-Infinity" are the numbers they name; so are "1.#INF" and
    "-nan(ind)", as programs of Windows print them.
    """
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in MISSING:
            return None
        if (odd := _WINDOWS_NUMBERS.fullmatch(text)) is not None:
            is_infinite = (odd[2] or "").lower() == "inf"
            text = f"{odd[1]}inf" if is_infinite else "nan"
        try:
            return float(text)
        except ValueError as error:
            raise AnalysisError(f"expected a number, got {text!r}") from error
    return float(value)


def _number_at(cell: Any, place: str) -> float | None:
    try:
        return to_number(cell)
    except (AnalysisError, TypeError) as error:
        hint = ""
        if isinstance(cell, str) and re.fullmatch(r"[-+]?\d+,\d+", cell.strip()):
            hint = "; decimals need a point"
        raise AnalysisError(f"expected a number in {place}, got {cell!r}{hint}") from error


def from_rows(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    source: str,
    path: Path,
    *,
    choice: Choice,
    notes: Sequence[str] = (),
) -> Recorded:
    """Return records as columns; None where a record lacks a name."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    return recorded(table, places, source, path, choice=choice, notes=notes)


def recorded(
    table: Table,
    places: Sequence[str],
    source: str,
    path: Path,
    *,
    choice: Choice,
    same: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Recorded:
    """Choose the records of one run's training, and pair each column with their steps.

    Without a column of steps, an epoch that rises with every record is the step; without one the
    records are numbered.

    Raises:
        AnalysisError: A step that is no whole number, several runs, or a choice that is not there.
    """
    notes = list(notes)
    table, places = pivoted(table, places)
    wanted = wanted_rows(table, len(places), choice, notes)
    rows = trained_rows(table, wanted, choice, path, notes)
    table, rows = one_run(table, rows, choice, path, notes)
    name, steps = _steps(table, rows, places, path)
    known = [(i, step) for i, step in zip(rows, steps, strict=True) if step is not None]
    if len(known) < len(rows):
        notes.append(f"{counted(len(rows) - len(known), 'record')} without a step left out.")
    rows, at = [i for i, _ in known], [step for _, step in known]
    ranks = _ranks(table, rows)
    if not ranks:
        refuse_runs(table, rows, at, choice, path)
    restarts: list[tuple[int, int]] = []
    epochs = _epochs(table, rows) if name is not None else []
    if not ranks and not (epochs and _starts_anew(epochs, at)):
        epochs = _passes(at) if name is not None and not (epochs and len(set(epochs)) > 1) else []
        if epochs:
            notes.append(
                f"Steps are counted anew {epochs[-1]} times with no epoch told, each time from "
                f"{at[0]} as far as before: they are taken for passes of one run."
            )
    elif not (epochs and _starts_anew(epochs, at)):
        epochs = []
    if epochs:
        pairs = list(zip(epochs, at, strict=True))
        restarts = sorted(set(pairs))
        order = {pair: i for i, pair in enumerate(restarts)}
        at = [order[pair] for pair in pairs]
    columns: dict[str, tuple[Sequence[int], Sequence[Any]]] = {
        other: (at, [cells[i] for i in rows]) for other, cells in table.items() if other != name
    }
    return Recorded(
        columns=columns,
        source=source,
        places=[places[i] for i in rows],
        same=same or {},
        restarts=restarts,
        step_name=name or "step",
        notes=notes,
        ranks=ranks,
    )


def _steps(
    table: Table, rows: Sequence[int], places: Sequence[str], path: Path
) -> tuple[str | None, list[int | None]]:
    """Return the column of steps and the step of each row; no column where rows are numbered."""
    known = [name for plain in STEP_NAMES if (name := named(table, (plain,))) is not None]
    for i, plain in enumerate(STEP_NAMES):
        name = named(table, (plain,))
        if name is None:
            continue
        if i >= SURE_STEPS and not _may_count(table[name], rows):
            continue
        better = _rising(table, rows, known) if _has_repeats(table[name], rows) else None
        name = better or name
        return name, [_whole(table[name][k], f"column {name!r}, {places[k]} of {path}")
                      for k in rows]  # fmt: skip
    name = named(table, EPOCH_NAMES)
    if name is not None and _is_rising(table[name], rows):
        return name, [int(to_number(table[name][k]) or 0) for k in rows]
    return None, list(range(len(rows)))


def _may_count(cells: Sequence[Any], rows: Sequence[int]) -> bool:
    """Return whether whole numbers vary, as the size of a batch does not."""
    return _are_whole(cells, rows) and len({str(cells[k]) for k in rows}) > 1


def _rising(table: Table, rows: Sequence[int], names: Iterable[str]) -> str | None:
    """Return a column of steps that counts through where another starts anew."""
    return next((name for name in names if _is_rising(table[name], rows)), None)


def _is_rising(cells: Sequence[Any], rows: Sequence[int]) -> bool:
    if len(rows) < 2 or not _are_whole(cells, rows):
        return False
    numbers = [to_number(cells[k]) for k in rows]
    known = [number for number in numbers if number is not None]
    rises = all(one < other for one, other in itertools.pairwise(known))
    return rises and len(known) == len(rows)


def _has_repeats(cells: Sequence[Any], rows: Sequence[int]) -> bool:
    return len({str(cells[k]).strip() for k in rows}) < len(rows)


def _are_whole(cells: Sequence[Any], rows: Sequence[int]) -> bool:
    try:
        numbers = [to_number(cells[k]) for k in rows]
    except (AnalysisError, TypeError):
        return False
    known = [number for number in numbers if number is not None]
    return bool(known) and all(number.is_integer() for number in known)


def _ranks(table: Table, rows: Sequence[int]) -> list[int]:
    """Return the rank of each row; empty unless several ranks wrote."""
    name = named(table, RANK_NAMES)
    if name is None or not _are_whole(table[name], rows):
        return []
    ranks = [int(number) if (number := to_number(table[name][k])) is not None else 0 for k in rows]
    return ranks if len(set(ranks)) > 1 else []


def _epochs(table: Table, rows: Sequence[int]) -> list[int]:
    """Return the epoch of each row; empty if they are not all known, whole numbers."""
    name = named(table, EPOCH_NAMES)
    if name is None or not _are_whole(table[name], rows):
        return []
    numbers = [to_number(table[name][i]) for i in rows]
    return [] if None in numbers else [int(number) for number in numbers if number is not None]


def _starts_anew(epochs: Sequence[int], steps: Sequence[int]) -> bool:
    """Return whether steps are counted from the beginning in each epoch.

    Where a run is resumed, steps go back too, but then the epoch does not rise.
    """
    rises = [i for i in range(1, len(epochs)) if epochs[i] > epochs[i - 1]]
    back = sum(steps[i] <= steps[i - 1] for i in rises)
    return 2 * back > len(rises)


def _passes(steps: Sequence[int]) -> list[int]:
    """Return the pass of each record where steps start anew twice or more, equally far each time.

    A run that was begun again ends where it was stopped, which is rarely twice the same step.
    """
    begins = [i for i in range(1, len(steps)) if steps[i] < steps[i - 1]]
    if len(begins) < 2 or any(steps[i] != steps[0] for i in begins):
        return []
    ends = {steps[i - 1] for i in begins}
    if len(ends) > 1 or steps[-1] > steps[begins[0] - 1] or begins[0] < 3:
        return []
    marks = set(begins)
    passes, found = 0, []
    for i in range(len(steps)):
        passes += i in marks
        found.append(passes)
    return found


def _whole(cell: Any, place: str) -> int | None:
    number = _number_at(cell, place)
    try:
        if number is None:
            return None
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise AnalysisError(f"expected a whole step in {place}, got {cell!r}") from error
    return int(number)
