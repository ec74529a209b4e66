"""Columns of numbers from what a trainer printed: `name value` pairs, or Python dicts, on a line.

Megatron-LM, torchtitan, nanoGPT, llm.c and Hugging Face's Trainer print a line a step, between
lines of other kinds, with colours or progress bars. No format is asked for by name: a line with a
number that is called a loss is a record. Lines that tell of an evaluation are left out, and said.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from unclamp.analysis.curve_files import (
    EPOCH_NAMES,
    EVALUATION,
    STEP_NAMES,
    Recorded,
    from_rows,
    plain_name,
)

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\[(?:\d{1,3};)*\d{1,2}m")
"""Also without the escape character, which copying a terminal's text may lose."""
_WORD = r"[A-Za-z][\w/.-]*"
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_PAIR = re.compile(
    rf"(?P<name>{_WORD}(?: {_WORD})*)\s*[:=]?\s*"
    rf"(?P<value>[-+]?(?:{_NUMBER}|nan|inf(?:inity)?))(?:\s*/\s*\d+)?(?=[\s,;:|)\]]|$)",
    re.IGNORECASE,
)
_EVALUATES = re.compile(
    r"(?<![\w./-])(?:eval\w*|val|valid\w*|test|testing|dev)(?![\w./-])", re.IGNORECASE
)
"""A word of its own, not a part of a path or of a name."""
_LEVEL_WORD = re.compile(r"^(?:(?:debug|info|warning|error)\s+)+", re.IGNORECASE)
_DICT = re.compile(r"\{['\"].*\}")
_BARE_NAN = re.compile(r"(:\s*)(-?(?:nan|inf))(?=\s*[,}])")


def read_console_file(path: Path) -> Recorded | None:
    """Return the columns of a console's text; None if no line has a loss.

    A line's names and numbers are the record's. Of several numbers of one name on a line the
    first counts. Lines without a number that is called a loss are passed over; those with the
    loss of an evaluation too, unless there are no others. A line is of an evaluation where its
    loss is called so ("val loss"), or where a word before its numbers says so ("Test: [0/3]").
    """
    trained, evaluated = [], []
    with path.open(encoding="utf-8-sig") as file:
        for i, line in enumerate(file.read().splitlines(), start=1):
            if "loss" not in line.lower():
                continue
            plain_line = _COLOURS.sub("", line)
            row = _read_line(plain_line)
            losses = [plain for name in row if "loss" in (plain := plain_name(name))]
            is_evaluation = any(EVALUATION.search(name) for name in losses)
            if losses and (is_evaluation or _EVALUATES.search(_before(plain_line))):
                evaluated.append((f"line {i}", row))
            elif any(name.endswith("loss") for name in losses):
                trained.append((f"line {i}", row))
    records = trained or evaluated
    if not records:
        return None
    notes = []
    if trained and evaluated:
        lines = "line of an evaluation was" if len(evaluated) == 1 else "lines of evaluations were"
        notes = [f"{len(evaluated):,} {lines} left out."]
    return from_rows(
        [row for _, row in records],
        [place for place, _ in records],
        f"console log {path.name}",
        path,
        notes=notes,
    )


def _before(line: str) -> str:
    """Return what a line says before its first number or dict, with the words before a step."""
    if (found := _DICT.search(line)) is not None:
        return line[: found.start()]
    first = _PAIR.search(line)
    if first is None:
        return ""
    words = first["name"].split()
    counts = plain_name(words[-1]) in (*STEP_NAMES, *EPOCH_NAMES)
    return line[: first.start("name")] + (" ".join(words[:-1]) if counts else "")


def _read_line(line: str) -> dict[str, object]:
    """Return the names and values on a line; values as text or number."""
    if (found := _DICT.search(line)) is not None:
        try:
            record = ast.literal_eval(_BARE_NAN.sub(r"\1'\2'", found.group()))
        except (ValueError, SyntaxError):
            record = None
        if isinstance(record, dict):
            return {str(name): value for name, value in record.items()}
    row: dict[str, object] = {}
    for name, value in _pairs(line):
        row.setdefault(name, value)
    return row


def _pairs(line: str) -> Iterable[tuple[str, str]]:
    for pair in _PAIR.finditer(line):
        name = _LEVEL_WORD.sub("", pair["name"])
        last = name.split()[-1] if name else ""
        # "train step 5": the words before it say nothing of the number. Of a loss they do.
        is_step = plain_name(last) in STEP_NAMES and not EVALUATION.search(plain_name(name))
        yield (last if is_step else name), pair["value"].replace(",", "")
