"""Columns of numbers from CSV and JSON, in the order in which they were recorded.

Which records count is for `records`; which column is a loss, and what repeated steps mean, is for
`curves`.
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unclamp.analysis.records import MISSING, STEP_NAMES, Recorded, from_rows, recorded
from unclamp.analysis.selections import LOSS, Choice, plain_name
from unclamp.errors import AnalysisError
from unclamp.written import counted

_DELIMITERS = ",\t;"
_MESSAGE_NAMES = ("log", "message", "msg")
_METRIC_LINE = re.compile(r"\d{10,16}\s+(?P<value>\S+)\s+(?P<step>\d+)")
"""A line of a metric's file in MLflow's folder: time in ms, value, step."""


def read_csv(text: str, path: Path, choice: Choice) -> Recorded:
    """Return the columns of CSV text; its first line names them.

    Commas, tabs, semicolons or blanks separate cells. Empty cells, NA, null and None are missing.
    Blank lines, those that begin with `#`, and the header again are passed over.

    Raises:
        AnalysisError: No header, no rows, or a step that is no whole number.
    """
    names, rows, lines = _cells(text)
    if not names or all(_is_number(name) for name in names):
        header = (text.strip().splitlines() or [""])[0]
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
        name: [row[i] if i < len(row) and row[i].strip().lower() not in MISSING else None
               for row in rows]
        for i, name in enumerate(shown)
    }  # fmt: skip
    same = {one: name for one, name in zip(shown, names, strict=True) if one != name}
    return recorded(table, lines, f"CSV file {path.name}", path, choice=choice, same=same)


def is_csv(text: str) -> bool:
    """Return whether the first line names columns, one of them a step or a loss, with numbers.

    The next line has as many cells, and a number or nothing in those of steps and losses. A header
    alone is CSV too, in which nothing was recorded.
    """
    begin = "".join(text.splitlines(keepends=True)[:_LOOKED_AT])
    names, rows, _ = _cells(begin)
    plain = [plain_name(name) for name in names]
    asked = [i for i, name in enumerate(plain) if name in STEP_NAMES or LOSS.search(name)]
    if not rows or not asked:
        return bool(asked) and not rows and _delimiter(begin.strip()) != " "
    row = rows[0]
    return len(row) == len(plain) and all(_is_cell(row[i]) for i in asked)


_LOOKED_AT = 50


def _cells(text: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the names, the rows under them and where those are."""
    every = text.splitlines()
    first = next((i for i, line in enumerate(every) if line.strip() and line[0] != "#"), None)
    if first is None:
        return [], [], []
    delimiter = _delimiter(every[first])
    reader = csv.reader(every[first:], delimiter=delimiter, skipinitialspace=delimiter == " ")
    names = [name.strip() for name in next(reader, [])]
    rows, places = [], []
    for row in reader:
        cells = [cell for cell in row if cell] if delimiter == " " else row
        if not _has_text(cells) or cells[0].startswith("#") or _strip(cells) == names:
            continue
        rows.append(cells)
        places.append(f"line {first + reader.line_num}")
    names = [name for name in names if name] if delimiter == " " else names
    return names, rows, places


def _strip(cells: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _delimiter(header: str) -> str:
    """Return what separates the names; blanks if nothing else does."""
    likely = max(_DELIMITERS, key=header.count)
    return likely if likely in header or " " not in header.strip() else " "


def _has_text(row: Sequence[str]) -> bool:
    return any(cell.strip() for cell in row)


def _is_cell(text: str) -> bool:
    """Return whether a cell holds a number or says that there is none."""
    return text.strip().lower() in MISSING or _is_number(text)


def is_json_throughout(text: str) -> bool:
    """Return whether what begins as JSON goes on so; a console may print a dict first.

    A second line that is cut off is JSON still, and so is every line of one document.
    """
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


def is_json(text: str) -> bool:
    """Return whether a text is meant as JSON; a Python dict or a bracketed word is none."""
    begin = text.lstrip()
    if begin.startswith("{"):
        return begin[1:].lstrip()[:1] != "'"
    return begin.startswith("[") and _is_json(text)


def messages(text: str) -> str:
    """Return what a program printed, where a logger made each line an object; "" elsewhere.

    Docker has the line in `log`, others in `message` or `msg`. Objects with a loss of their own
    are records themselves.
    """
    begin = text.lstrip().partition("\n")[0]
    if not begin.startswith("{") or not _is_json(begin):
        return ""
    found = []
    for line in text.splitlines():
        if not _is_json(line):
            continue
        record = json.loads(line)
        if not isinstance(record, dict) or any(LOSS.search(plain_name(name)) for name in record):
            return ""
        found += [str(record[name]).rstrip("\n") for name in _MESSAGE_NAMES if name in record]
    return "\n".join(found)


def read_json(text: str, path: Path, choice: Choice) -> Recorded:
    """Return the columns of JSON text.

    JSON lines, an object a record; a trainer's state, whose `log_history` has an object a record;
    a list of objects; or an object of lists. Nested names are joined by a slash. A last line that
    is cut off, as of a killed run, is left out; lines that do not begin as JSON are too, and said.

    Raises:
        AnalysisError: None of those.
    """
    notes: list[str] = []
    try:
        document = json.loads(text)
    except ValueError:
        document = _json_lines(text, path, notes)
    source = f"JSON file {path.name}"
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        document, source = document["log_history"], f"Hugging Face trainer state {path.name}"
    elif isinstance(document, dict):
        lists = _lists(document)
        count = max((len(value) for value in lists.values()), default=0)
        if count:
            table = {k: v + [None] * (count - len(v)) for k, v in lists.items()}
            return recorded(table, _records(count), source, path, choice=choice)
        document = [document]
    rows = [flat(row) for row in document if isinstance(row, dict)]
    if not rows:
        raise AnalysisError(f"expected records with a loss in {path}, found none")
    return from_rows(rows, _records(len(rows)), source, path, choice=choice, notes=notes)


def read_metric_file(text: str, path: Path, choice: Choice) -> Recorded | None:
    """Return the column of a metric's file in MLflow's folder, called as the file; None if none."""
    found = [_METRIC_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    rows = [{"step": match["step"], path.name: match["value"]} for match in found if match]
    if not rows or len(rows) < len(found):
        return None
    return from_rows(rows, _records(len(rows)), f"MLflow metric {path.name}", path, choice=choice)


def _records(count: int) -> list[str]:
    return [f"record {i + 1}" for i in range(count)]


def _json_lines(text: str, path: Path, notes: list[str]) -> list[Any]:
    lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    rows, others = [], 0
    for i, line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i == lines[-1][0] and rows:
                break
            if rows and line.lstrip()[0] not in "{[":
                others += 1
                continue
            raise AnalysisError(f"line {i} of {path} is no JSON: {error}") from error
    if others:
        notes.append(f"{counted(others, 'line')} that {'is' if others == 1 else 'are'} no JSON "
                     "passed over.")  # fmt: skip
    return rows


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a record, nested ones under joined names; lists are left out."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif not isinstance(value, list):
            found[f"{prefix}{key}"] = value
    return found


def _lists(document: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Return the lists of an object, nested ones under joined names."""
    found: dict[str, list[Any]] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            found |= _lists(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            found[f"{prefix}{key}"] = value
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
