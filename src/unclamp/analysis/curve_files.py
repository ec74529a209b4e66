"""Columns of numbers from CSV and JSON, in the order in which they were recorded.

Which column is a loss, and what repeated steps mean, is for `curves`.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unclamp.errors import AnalysisError

STEP_NAMES = ("step", "global_step", "trainer_global_step", "train_global_step", "iteration",
              "iter", "train_iter", "steps")  # fmt: skip
EPOCH_NAMES = ("epoch", "epochs", "train_epoch", "current_epoch")
EVALUATION = re.compile(r"(^|_)(eval|evaluation|val|valid|validation|test|dev)(_|$)")
"""In a plain name: a quantity of an evaluation."""
_MODE_NAMES = ("mode", "split", "phase", "stage", "subset")
_EVALUATION_MODES = {"eval", "evaluation", "val", "valid", "validate", "validation", "test", "dev"}
_MISSING = {"", "na", "n/a", "none", "null", "-"}
_DELIMITERS = ",\t;"


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
    """

    columns: dict[str, tuple[Sequence[int], Sequence[Any]]]
    source: str
    places: Sequence[str] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    restarts: Sequence[tuple[int, int]] = ()
    step_name: str = "step"
    notes: Sequence[str] = ()

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

    Numerics: "nan", "inf" and "-Infinity" are the numbers they name.
    """
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _MISSING:
            return None
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


def plain_name(column: str) -> str:
    """Return a column's name without case and punctuation: `train/Grad-Norm`, train_grad_norm."""
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def read_csv_file(path: Path) -> Recorded:
    """Return the columns of a CSV file; its first line names them.

    Commas, tabs or semicolons separate cells. Empty cells, NA, null and None are missing.

    Raises:
        AnalysisError: No header, no rows, or a step that is no whole number.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        delimiter = max(_DELIMITERS, key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        reader = csv.reader(file, delimiter=delimiter)
        lines, rows = [], []
        for row in reader:
            if row:
                lines.append(f"line {reader.line_num + 1}")
                rows.append(row)
    if not names or all(_is_number(name) for name in names):
        raise AnalysisError(
            f"expected the first line of {path} to name the columns, such as 'step,loss', "
            f"got {header.strip()[:60]!r}"
        )
    if not rows:
        raise AnalysisError(
            f"expected rows under the header of {path}, which names the columns "
            f"{', '.join(map(repr, names))}, found none: nothing was recorded in it"
        )
    shown = [
        f"{name} (column {i})" if names.count(name) > 1 else name
        for i, name in enumerate(names, start=1)
    ]
    table = {
        name: [row[i] if i < len(row) and row[i].strip().lower() not in _MISSING else None
               for row in rows]
        for i, name in enumerate(shown)
    }  # fmt: skip
    same = {one: name for one, name in zip(shown, names, strict=True) if one != name}
    return _recorded(table, lines, f"CSV file {path.name}", path, same=same)


def is_csv_file(path: Path) -> bool:
    """Return whether the first line names columns, one of them a step or a loss, with numbers.

    The next line has as many cells, and a number or nothing in those of steps and losses. A header
    alone is a CSV file too, one in which nothing was recorded.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        delimiter = max(_DELIMITERS, key=header.count)
        row = next((row for row in csv.reader(file, delimiter=delimiter) if _has_text(row)), None)
    plain = [plain_name(name) for name in next(csv.reader([header], delimiter=delimiter), [])]
    asked = [i for i, name in enumerate(plain) if name in STEP_NAMES or name.endswith("loss")]
    if row is None or not asked:
        return bool(asked)
    return len(row) == len(plain) and all(_is_cell(row[i]) for i in asked)


def _has_text(row: Sequence[str]) -> bool:
    return any(cell.strip() for cell in row)


def _is_cell(text: str) -> bool:
    """Return whether a cell holds a number or says that there is none."""
    return text.strip().lower() in _MISSING or _is_number(text)


def is_json_throughout(path: Path) -> bool:
    """Return whether what begins as JSON goes on so; a console may print a dict first.

    A second line that is cut off is JSON still, and so is every line of one document.
    """
    text = path.read_text(encoding="utf-8-sig")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or lines[1].lstrip().startswith("{"):
        return True
    try:
        json.loads(text)
    except ValueError:
        return _is_json(lines[1])
    return True


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def is_json_file(path: Path) -> bool:
    """Return whether a file is meant as JSON; a Python dict or a bracketed word is none."""
    with path.open(encoding="utf-8-sig") as file:
        begin = file.read(4096).lstrip()
        if begin.startswith("{"):
            return begin[1:].lstrip()[:1] != "'"
        if not begin.startswith("["):
            return False
        return _is_json(begin + file.read())


def read_json_file(path: Path) -> Recorded:
    """Return the columns of a JSON file.

    JSON lines, an object a record; a trainer's state, whose `log_history` has an object a record;
    a list of objects; or an object of lists. Nested names are joined by a slash. A last line that
    is cut off, as of a killed run, is left out.

    Raises:
        AnalysisError: None of those.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        document = json.loads(text)
    except ValueError:
        document = _json_lines(text, path)
    source = f"JSON file {path.name}"
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        document, source = document["log_history"], f"Hugging Face trainer state {path.name}"
    elif isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        count = max((len(value) for value in lists.values()), default=0)
        if count:
            table = {k: v + [None] * (count - len(v)) for k, v in lists.items()}
            return _recorded(table, _records(count), source, path)
        document = [document]
    rows = [_flat(row) for row in document if isinstance(row, dict)]
    if not rows:
        raise AnalysisError(f"expected records with a loss in {path}, found none")
    return from_rows(rows, _records(len(rows)), source, path)


def from_rows(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    source: str,
    path: Path,
    *,
    notes: Sequence[str] = (),
) -> Recorded:
    """Return records as columns; None where a record lacks a name."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    return _recorded(table, places, source, path, notes=notes)


def _records(count: int) -> list[str]:
    return [f"record {i + 1}" for i in range(count)]


def _json_lines(text: str, path: Path) -> list[Any]:
    lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    rows = []
    for i, line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i == lines[-1][0] and rows:
                break
            raise AnalysisError(f"line {i} of {path} is no JSON: {error}") from error
    return rows


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers of a record, nested ones under joined names."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif not isinstance(value, list):
            flat[f"{prefix}{key}"] = value
    return flat


def _recorded(
    table: Mapping[str, Sequence[Any]],
    places: Sequence[str],
    source: str,
    path: Path,
    *,
    same: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Recorded:
    """Pair each column with the table's steps, or with row numbers if it has none."""
    name = _named(table, STEP_NAMES)
    steps: Sequence[int | None] = range(len(places))
    if name is not None:
        where = [f"column {name!r}, {place} of {path}" for place in places]
        steps = [_whole(cell, place) for cell, place in zip(table[name], where, strict=True)]
    trained = _trained(table, len(places))
    rows = [i for i, step in enumerate(steps) if step is not None and trained[i]]
    at = [step for i in rows if (step := steps[i]) is not None]
    restarts: list[tuple[int, int]] = []
    if name is not None and (epochs := _epochs(table, rows)) and _starts_anew(epochs, at):
        pairs = list(zip(epochs, at, strict=True))
        restarts = sorted(set(pairs))
        order = {pair: i for i, pair in enumerate(restarts)}
        at = [order[pair] for pair in pairs]
    evaluations = trained.count(False)
    if evaluations:
        records = "record of an evaluation was" if evaluations == 1 else (
            "records of evaluations were")  # fmt: skip
        notes = [*notes, f"{evaluations:,} {records} left out."]
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
    )


def _trained(table: Mapping[str, Sequence[Any]], count: int) -> list[bool]:
    """Return which records are of training, by a column that says so; all without one."""
    name = _named(table, _MODE_NAMES)
    cells = table[name] if name is not None else [None] * count
    return [str(cell).strip().lower() not in _EVALUATION_MODES for cell in cells]


def _epochs(table: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> list[int]:
    """Return the epoch of each row; empty if they are not all known, whole numbers."""
    name = _named(table, EPOCH_NAMES)
    if name is None:
        return []
    epochs = []
    for i in rows:
        try:
            number = to_number(table[name][i])
        except (AnalysisError, TypeError):
            return []
        if number is None or not number.is_integer():
            return []
        epochs.append(int(number))
    return epochs


def _starts_anew(epochs: Sequence[int], steps: Sequence[int]) -> bool:
    """Return whether steps are counted from the beginning in each epoch.

    Where a run is resumed, steps go back too, but then the epoch does not rise.
    """
    rises = [i for i in range(1, len(epochs)) if epochs[i] > epochs[i - 1]]
    back = sum(steps[i] <= steps[i - 1] for i in rises)
    return 2 * back > len(rises)


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column that is called by the first of some plain names, None if there is none."""
    plain = {plain_name(column): column for column in columns}
    return next((plain[name] for name in names if name in plain), None)


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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
