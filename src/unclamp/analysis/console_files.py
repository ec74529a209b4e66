"""Columns of numbers from what a trainer printed: `name value` pairs, or dicts, on a line.

Megatron-LM, torchtitan, nanoGPT, llm.c and Hugging Face's Trainer print a line a step, between
lines of other kinds, with colours or progress bars. A line with a number that is called a loss is
a record (`console_lines` reads it). Lines of evaluations and sums of epochs are left out, and said.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from unclamp.analysis.console_lines import COLOURS, Line, read_line
from unclamp.analysis.records import Recorded, from_rows
from unclamp.analysis.selections import (
    EVALUATION_WORDS,
    TRAINING_WORDS,
    Choice,
    is_evaluation_loss,
    is_like_loss,
    is_training_loss,
    plain_name,
)
from unclamp.errors import AnalysisError
from unclamp.written import counted

_EPOCH_HEADING = re.compile(
    r"[\W_]*(?:(?:starting|begin|beginning|training)\s+)?epoch\W*(\d+)(?:\s*(?:/|of)\s*\d+)?[\W_]*",
    re.IGNORECASE,
)
_EVALUATION_HEADING = re.compile(
    rf"[\W_]*(?:(?:starting|running|begin)\s+)?(?:{'|'.join(EVALUATION_WORDS)}|evaluating|validating)"
    r"(?:\s+(?:loop|set|results?|epoch\W*\d+))?[\W_]*",
    re.IGNORECASE,
)
_BLOCK_LINE = re.compile(r"\s+(?P<name>[A-Za-z][^=:]*?)(?:=|:\s+)(?P<value>\S+)\s*")
"""A line of a block, as OLMo and Composer print one below the line that names the step."""
_OF_INTEREST = re.compile(r"loss|\btrl:|step|iter|batch", re.IGNORECASE)
_SUMMARY = re.compile(r"\|\s*train\s*\|")
_INNER = "train_inner"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A line with a loss.

    Attributes:
        place: Where it is.
        line: Its names and values.
        text: The line.
        below_evaluation: Whether a heading such as "*** Evaluation ***" stands above, and none of
            an epoch between.
        takes_all: Whether each name with something of a loss in it will do.
    """

    place: str
    line: Line
    text: str
    below_evaluation: bool = False
    takes_all: bool = False

    @property
    def training(self) -> set[str]:
        """The names of its training losses."""
        is_loss = is_like_loss if self.takes_all else is_training_loss
        return {plain for name in self.line.row if is_loss(plain := plain_name(name))}

    @property
    def has_evaluation_loss(self) -> bool:
        """Whether one of its losses is called an evaluation's."""
        return any(is_evaluation_loss(plain_name(name)) for name in self.line.row)

    @property
    def evaluates(self) -> bool:
        """Whether its words say that it is of an evaluation."""
        return self.line.says_evaluation

    def is_at(self, other: "_Record") -> bool:
        """Return whether it is of the same step as another."""
        return self.line.step is not None and self.line.step == other.line.step


def read_console(text: str, path: Path, choice: Choice) -> Recorded | None:
    """Return the columns of a console's text; None if no line has a loss.

    A line's names and numbers are the record's. Of several numbers of one name on a line the
    first counts. Lines without a number that is called a loss are passed over; those with the
    loss of an evaluation too, unless there are no others. A line is of an evaluation where a word
    before its loss says so ("Test: [0/3]", "| val |"), or its loss is called so ("val loss"); one
    that has both losses is where its training loss is not called as on the lines of steps.

    Raises:
        AnalysisError: A pattern that is no regular expression, or that no line matches.
    """
    if choice.pattern is not None:
        return _read_pattern(text, path, choice, choice.pattern)
    trained, evaluated, summaries = _sorted_out(list(_records(text)), choice)
    evaluated = [r for r in evaluated if r.has_evaluation_loss or r.training]
    wants_evaluation = choice.split is not None and choice.split.lower() in EVALUATION_WORDS
    used = evaluated if wants_evaluation else trained or evaluated
    if not used:
        return None
    notes = _left_out(trained, evaluated, summaries, wants_evaluation=wants_evaluation)
    rows = [record.line.row for record in used]
    if wants_evaluation or (choice.split or "").lower() in TRAINING_WORDS:
        choice = replace(choice, split=None)
    if wants_evaluation and choice.column is None:
        rows = [_as_loss(row) for row in rows]
    places = [record.place for record in used]
    return from_rows(rows, places, f"console log {path.name}", path, choice=choice, notes=notes)


def _sorted_out(records: list[_Record], choice: Choice) -> tuple[list[_Record], list[_Record], int]:
    """Return the records of training, those of evaluations, and how many sum up epochs."""
    if choice.column is not None or not any(record.training for record in records):
        records = [replace(record, takes_all=True) for record in records]
    plainly = [r for r in records if r.training and not (r.has_evaluation_loss or r.evaluates)]
    names = set().union(*(record.training for record in plainly))
    has_inner = any(_INNER in record.text for record in plainly)
    trained: list[_Record] = []
    evaluated: list[_Record] = []
    summaries = 0
    for record in records:
        if has_inner and _SUMMARY.search(record.text):
            summaries += 1
        elif (
            record.evaluates
            or not record.training
            or (record.has_evaluation_loss and names and not record.training & names)
            or (record.below_evaluation and trained and record.is_at(trained[-1]))
        ):
            evaluated.append(record)
        else:
            trained.append(record)
    return trained, evaluated, summaries


def _left_out(
    trained: list[_Record], evaluated: list[_Record], summaries: int, *, wants_evaluation: bool
) -> list[str]:
    notes = []
    if wants_evaluation and trained:
        were = counted(len(trained), "line of training was", "lines of training were")
        notes.append(f"{were} left out.")
    elif trained and evaluated:
        were = counted(len(evaluated), "line of an evaluation was", "lines of evaluations were")
        notes.append(f"{were} left out.")
    if summaries:
        were = counted(summaries, "line that sums up an epoch was", "lines that sum up epochs were")
        notes.append(f"{were} left out.")
    return notes


def _as_loss(row: dict[str, object]) -> dict[str, object]:
    """Return an evaluation's row whose loss, if it is called "val loss", is called "loss"."""
    own = next((name for name in row if is_evaluation_loss(plain_name(name))), None)
    return row if own is None else {"loss" if n == own else n: v for n, v in row.items()}


def _records(text: str) -> Iterator[_Record]:
    """Yield the lines with a loss; epochs told on lines of their own go with those below."""
    epoch: str | None = None
    block: Line | None = None
    below = False
    for i, raw in enumerate(_lines(text), start=1):
        plain = COLOURS.sub("", raw)
        if block is not None and (part := _BLOCK_LINE.fullmatch(plain)) is not None:
            has_loss = bool(block.losses)
            block.row.setdefault(part["name"], part["value"].rstrip(",").replace(",", ""))
            if block.losses and not has_loss:
                yield _Record(place=f"line {i}", line=block, text=plain, below_evaluation=below)
            continue
        if (heading := _EPOCH_HEADING.fullmatch(plain)) is not None:
            epoch, below = heading[1], False
            continue
        below |= _EVALUATION_HEADING.fullmatch(plain) is not None
        block = None
        if _OF_INTEREST.search(plain) is None:
            continue
        line = read_line(plain)
        if not line.losses and "trl" not in line.row:
            block = line if line.step is not None and not line.says_evaluation else None
            continue
        if epoch is not None and not any("epoch" in plain_name(name) for name in line.row):
            line.row["epoch"] = epoch
        yield _Record(place=f"line {i}", line=line, text=plain, below_evaluation=below)


def _lines(text: str) -> list[str]:
    """Return lines; what a progress bar wrote over itself are several."""
    return text.replace("\b", "\r").splitlines()


def _without_commas(value: str | None) -> str | None:
    """Return a number without the commas between thousands."""
    has_thousands = value is not None and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", value)
    return value.replace(",", "") if value is not None and has_thousands else value


def _read_pattern(text: str, path: Path, choice: Choice, pattern: str) -> Recorded:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AnalysisError(f"--pattern {pattern!r} is no regular expression: {error}") from error
    if "loss" not in compiled.groupindex:
        raise AnalysisError(
            f"--pattern {pattern!r} has no group called loss; write (?P<loss>...) where the "
            "loss stands, and (?P<step>...) where the step does"
        )
    rows: list[dict[str, object]] = []
    places = []
    for i, raw in enumerate(_lines(text), start=1):
        found = compiled.search(COLOURS.sub("", raw))
        if found is not None:
            rows.append({name: _without_commas(value) for name, value in found.groupdict().items()})
            places.append(f"line {i}")
    if not rows:
        raise AnalysisError(f"no line of {path} matches --pattern {pattern!r}")
    chosen = replace(choice, column=choice.column or "loss")
    return from_rows(rows, places, f"console log {path.name}", path, choice=chosen)
