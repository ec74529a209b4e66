"""Columns of numbers from CSV and JSON, in the order in which they were recorded.

Which column is a loss, and what repeated steps mean, is for `curves`.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclamp.errors import AnalysisError

STEP_NAMES = ("step", "global_step", "trainer_global_step", "train_global_step", "iteration",
              "iter", "train_iter", "steps")  # fmt: skip
_MISSING = {"", "na", "n/a", "none", "null", "-"}
_DELIMITERS = ",\t;"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Columns as recorded.

    Attributes:
        columns: By name, the step and the value of each record, in order; None is missing.
        source: What it was read from, in words.
        places: Where in the file each record is, such as "line 7"; empty where there are no such.
    """

    columns: dict[str, tuple[Sequence[int], Sequence[Any]]]
    source: str
    places: Sequence[str] = ()

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
    table = {
        name: [row[i] if i < len(row) and row[i].strip().lower() not in _MISSING else None
               for row in rows]
        for i, name in enumerate(names)
    }  # fmt: skip
    return _recorded(table, lines, f"CSV file {path.name}", path)


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
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    return _recorded(table, _records(len(rows)), source, path)


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
    table: Mapping[str, Sequence[Any]], places: Sequence[str], source: str, path: Path
) -> Recorded:
    """Pair each column with the table's steps, or with row numbers if it has none."""
    name = _step_column(table)
    steps: Sequence[int | None] = range(len(places))
    if name is not None:
        where = [f"column {name!r}, {place} of {path}" for place in places]
        steps = [_whole(cell, place) for cell, place in zip(table[name], where, strict=True)]
    rows = [i for i, step in enumerate(steps) if step is not None]
    at = [step for step in steps if step is not None]
    columns: dict[str, tuple[Sequence[int], Sequence[Any]]] = {
        other: (at, [cells[i] for i in rows]) for other, cells in table.items() if other != name
    }
    return Recorded(columns=columns, source=source, places=[places[i] for i in rows])


def _step_column(columns: Iterable[str]) -> str | None:
    """Return the column that counts steps, None if there is none."""
    plain = {plain_name(column): column for column in columns}
    return next((plain[name] for name in STEP_NAMES if name in plain), None)


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
