"""Which records of a file are those asked for: of training, of one run.

What tells them apart is a column (`split`, `mode`, `run`, ...) or a column's name. Nothing is
left out without a sentence that says so, and where nothing tells what is wanted, the choices are.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclamp.errors import AnalysisError, did_you_mean
from unclamp.written import counted, listed

Table = Mapping[str, Sequence[Any]]
"""By name, a cell a record; None is missing."""
EVALUATION_WORDS = ("eval", "evals", "evaluate", "evaluation", "val", "valid", "validate",
                    "validation", "test", "testing", "dev", "cv", "heldout", "holdout")  # fmt: skip
TRAINING_WORDS = ("train", "training", "trn", "fit", "learn")
EVALUATION = re.compile(rf"(^|_)({'|'.join(EVALUATION_WORDS)}|held_out|hold_out)\d*(_|$)")
"""In a plain name: a quantity of an evaluation."""
LOSS = re.compile(r"loss(_(train|training|step|value|avg|average|mean|batch|iter|total))*$|^trl$")
"""At the end of a plain name: a loss. `trl` is llm.c's in its main.log."""
LIKE_LOSS = re.compile(r"(^|_)loss(es)?(_(?!scale|weight|mask|fn)|$)")
"""Anywhere in a plain name: something of a loss, such as one of several (`loss_d`, `loss_g`)."""
NORM = re.compile(r"grad\w*norm|^gnorm$")
SPLIT_NAMES = ("split", "mode", "phase", "stage", "subset", "partition", "set", "dataset", "type",
               "event", "kind", "job", "prefix", "loop")  # fmt: skip
TRAINING_FLAGS = ("train", "training", "is_train", "is_training")
EVALUATION_FLAGS = ("eval", "is_eval", "is_evaluation", "is_val", "is_validation", "is_test",
                    "validation")  # fmt: skip
RUN_NAMES = ("run", "run_id", "run_name", "runid", "run_uuid", "experiment", "experiment_name",
             "experiment_id", "exp", "exp_name", "trial", "trial_id", "seed", "arm")  # fmt: skip
RANK_NAMES = ("rank", "global_rank", "dp_rank", "process_index", "local_rank")
_KEY_NAMES = ("metric", "key", "tag", "name", "variable", "metric_name", "measure")
_VALUE_NAMES = ("value", "values", "metric_value")
_MOST_RUNS = 50
_ALL = "all"


class AmbiguousCurveError(AnalysisError):
    """A file holds several curves; more of it would not tell which one is meant."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a user asked for, where a file holds more than one curve.

    Attributes:
        column: The column to take for the loss.
        split: The split to read, as the file calls it.
        run: The run to read; a value of the column that tells runs apart, or `COLUMN=VALUE`.
        pattern: Regular expression with the groups `loss` and, as there are, `step` and others.
        group: Column of the kinds of batches, which tells neither splits nor runs apart.
    """

    column: str | None = None
    split: str | None = None
    run: str | None = None
    pattern: str | None = None
    group: str | None = None


@functools.lru_cache(maxsize=4096)
def plain_name(column: str) -> str:
    """Return a column's name without case and punctuation: `train/Grad-Norm`, train_grad_norm."""
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column that is called by the first of some plain names, None if there is none."""
    plain = {plain_name(column): column for column in columns}
    return next((plain[name] for name in names if name in plain), None)


@functools.lru_cache(maxsize=4096)
def is_training_loss(plain: str) -> bool:
    """Return whether a plain name is that of a loss, and of no evaluation's."""
    return LOSS.search(plain) is not None and not EVALUATION.search(plain)


def is_like_loss(plain: str) -> bool:
    """Return whether a plain name has something of a loss in it, and of no evaluation's."""
    return LIKE_LOSS.search(plain) is not None and not EVALUATION.search(plain)


@functools.lru_cache(maxsize=4096)
def is_evaluation_loss(plain: str) -> bool:
    """Return whether a plain name is that of an evaluation's loss."""
    return "loss" in plain and EVALUATION.search(plain) is not None


def pivoted(table: Table, places: Sequence[str]) -> tuple[Table, Sequence[str]]:
    """Bring a long table, with a column of metrics' names and one of values, into a wide one.

    Consecutive records that differ in nothing but the metric, its value and its time are one.
    """
    if any(is_training_loss(plain_name(name)) for name in table):
        return table, places
    key, value = named(table, _KEY_NAMES), named(table, _VALUE_NAMES)
    if key is None or value is None:
        return table, places
    metrics = list(dict.fromkeys(str(cell) for cell in table[key] if cell is not None))
    if not any("loss" in plain_name(metric) for metric in metrics):
        return table, places
    others = [name for name in table if name not in (key, value) and "time" not in plain_name(name)]
    wide: list[dict[str, Any]] = []
    found: list[str] = []
    open_rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, place in enumerate(places):
        metric = str(table[key][i])
        shared = tuple(table[name][i] for name in others)
        row = open_rows.get(shared)
        if row is None or metric in row:
            row = dict(zip(others, shared, strict=True))
            open_rows[shared] = row
            wide.append(row)
            found.append(place)
        row[metric] = table[value][i]
    return {name: [row.get(name) for row in wide] for name in (*others, *metrics)}, found


def wanted_rows(table: Table, count: int, choice: Choice, notes: list[str]) -> list[int]:
    """Return the records with a value in a column of interest; all where there is no such column.

    Those that hold only an evaluation's loss, or a step and nothing of interest, are said.
    """
    plain = {name: plain_name(name) for name in table}
    wanted = [name for name in table if name == choice.column]
    if not wanted and choice.column is None:
        wanted = [name for name in table if is_training_loss(plain[name])]
        wanted = wanted or [name for name in table if is_like_loss(plain[name])]
        wanted += [name for name in table if NORM.search(plain[name])] if wanted else []
    if not wanted:
        return list(range(count))
    of_evaluations = [name for name in table if is_evaluation_loss(plain[name])]
    split = named(table, SPLIT_NAMES)
    kept, evaluations = [], 0
    for i in range(count):
        if any(table[name][i] is not None for name in wanted):
            kept.append(i)
        elif any(table[name][i] is not None for name in of_evaluations) or (
            split is not None and _is_evaluation(table[split][i])
        ):
            evaluations += 1
    if evaluations and choice.split is None:
        notes.append(evaluations_in_words(evaluations))
    return kept


def evaluations_in_words(count: int) -> str:
    """Return the sentence for records of evaluations that were left out."""
    were = counted(count, "record of an evaluation was", "records of evaluations were")
    return f"{were} left out."


def trained_rows(
    table: Table, rows: list[int], choice: Choice, path: Path, notes: list[str]
) -> list[int]:
    """Return the records of training, or of the split that was asked for.

    Raises:
        AmbiguousCurveError: Several splits, none of which is called training.
        AnalysisError: No such split, or no column of splits.
    """
    name = _split_column({n: c for n, c in table.items() if n != choice.group}, rows)
    if name is None:
        if choice.split is not None and choice.split not in TRAINING_WORDS:
            raise AnalysisError(
                f"{path} has no column that tells splits apart, such as 'split' or 'mode'; "
                f"--split {choice.split} chooses nothing. Name one of its columns with --column: "
                f"{listed([repr(one) for one in table], most=12)}"
            )
        return _flagged(table, rows, notes)
    splits = list(dict.fromkeys(_text(table[name][i]) for i in rows))
    if choice.split is not None:
        asked = choice.split.strip().lower()
        kept = [i for i in rows if _text(table[name][i]).lower() == asked]
        if not kept:
            raise AnalysisError(
                f"the column {name!r} of {path} has no {choice.split!r}; it has "
                f"{listed([repr(one) for one in splits], most=12)}"
                f"{did_you_mean(choice.split, splits)}"
            )
    else:
        trains = [one for one in splits if _is_training(one)]
        others = [one for one in splits if one not in trains and not _is_evaluation(one)]
        is_part_of_training = plain_name(name) in ("phase", "stage", "type", "event", "kind")
        if not trains and len([one for one in others if one]) > 1 and not is_part_of_training:
            raise AmbiguousCurveError(
                f"{path} has records of several splits in its column {name!r}; choose one with "
                f"--split: {listed([repr(one) for one in splits], most=12)}"
            )
        used = set(trains or others)
        if is_part_of_training or not trains:
            used |= set(others)
        if "" in splits:
            used.add("")
        kept = [i for i in rows if _text(table[name][i]) in used]
    used_rows = set(kept)
    dropped = [i for i in rows if i not in used_rows]
    evaluations = sum(_is_evaluation(table[name][i]) for i in dropped)
    if choice.split is None and evaluations:
        _add_evaluations(notes, evaluations)
        dropped = [i for i in dropped if not _is_evaluation(table[name][i])]
    if dropped:
        left = list(dict.fromkeys(repr(_text(table[name][i])) for i in dropped))
        were = counted(len(dropped), "record was", "records were")
        notes.append(f"{were} left out, whose {name!r} is {listed(left, 'or', most=6)}.")
    return kept


def _add_evaluations(notes: list[str], count: int) -> None:
    """Say how many records of evaluations were left out, one sentence for all of them."""
    before = next((note for note in notes if "evaluation" in note), None)
    if before is not None:
        notes.remove(before)
        count += int(before.split()[0].replace(",", ""))
    notes.append(evaluations_in_words(count))


def _split_column(table: Table, rows: Sequence[int]) -> str | None:
    """Return the column that tells training from evaluation; None if none does."""
    for plain in SPLIT_NAMES:
        name = named(table, (plain,))
        if name is None:
            continue
        texts = {_text(table[name][i]) for i in rows} - {""}
        if not any(_is_number(text) for text in texts) and (
            plain in ("split", "mode", "subset", "partition")
            or any(_is_training(text) or _is_evaluation(text) for text in texts)
        ):
            return name
    for name, cells in table.items():
        texts = {_text(cells[i]) for i in rows} - {""}
        if texts and len(texts) < 9 and all(_is_training(t) or _is_evaluation(t) for t in texts):
            return name
    return None


def _flagged(table: Table, rows: list[int], notes: list[str]) -> list[int]:
    """Leave out what a column of truth values calls an evaluation."""
    for names, of_training in ((TRAINING_FLAGS, True), (EVALUATION_FLAGS, False)):
        name = named(table, names)
        if name is None:
            continue
        flags = {_text(table[name][i]).lower() for i in rows} - {""}
        if not flags or not flags <= {"true", "false", "0", "1", "yes", "no"}:
            continue
        yes = {"true", "1", "yes"}
        kept = [i for i in rows if (_text(table[name][i]).lower() in yes) == of_training]
        if kept and len(kept) < len(rows):
            _add_evaluations(notes, len(rows) - len(kept))
            return kept
    return rows


def one_run(
    table: Table, rows: list[int], choice: Choice, path: Path, notes: list[str]
) -> tuple[Table, list[int]]:
    """Return the columns and records of the run that was asked for; all if none was.

    A run is a value of a column, or what stands before " - " in columns' names, as in exports of
    Weights & Biases.

    Raises:
        AnalysisError: No such run.
    """
    if choice.run is None or choice.run == _ALL:
        return table, rows
    prefixes = runs_of_columns(table)
    if choice.run in prefixes:
        begin = f"{choice.run} - "
        of_others = tuple(f"{one} - " for one in prefixes if one != choice.run)
        own = [name for name in table if name.startswith(begin)]
        kept = {name.removeprefix(begin): cells for name, cells in table.items()
                if not name.startswith(of_others)}  # fmt: skip
        return kept, [i for i in rows if any(table[name][i] is not None for name in own)]
    name, value = _run_column(table, rows, choice.run)
    if name is None:
        known = [*prefixes, *_runs_in_words(table, rows)]
        has = f"it has {listed([repr(one) for one in known], most=12)}" if known else (
            "no column tells runs apart")  # fmt: skip
        raise AnalysisError(
            f"{path} has no run {choice.run!r}; {has}{did_you_mean(choice.run, known)}"
        )
    kept = [i for i in rows if _text(table[name][i]) == value]
    others = len(rows) - len(kept)
    if others:
        notes.append(f"{counted(others, 'record')} of other runs left out.")
    return table, kept


def runs_of_columns(names: Iterable[str]) -> list[str]:
    """Return what stands before " - " in the names of losses, if it is not the same for all."""
    found = [
        run
        for run, divides, metric in (name.rpartition(" - ") for name in names)
        if divides and is_training_loss(plain_name(metric))
    ]
    return list(dict.fromkeys(found))


def _run_column(table: Table, rows: Sequence[int], asked: str) -> tuple[str | None, str]:
    """Return the column and value of a run: by `COLUMN=VALUE`, by a column of runs, by any."""
    column, _, value = asked.partition("=")
    if column in table and any(_text(table[column][i]) == value for i in rows):
        return column, value
    for name in _run_columns(table, rows):
        if any(_text(table[name][i]) == asked for i in rows):
            return name, asked
    return None, asked


def _runs_in_words(table: Table, rows: Sequence[int]) -> list[str]:
    """Return the values of the first column that can tell runs apart."""
    for name in _run_columns(table, rows):
        runs = list(dict.fromkeys(_text(table[name][i]) for i in rows))
        if 1 < len(runs) <= _MOST_RUNS:
            return runs
    return []


def _run_columns(table: Table, rows: Sequence[int]) -> list[str]:
    """Return the columns that are called like a run, and then those of text."""
    called = [name for plain in RUN_NAMES if (name := named(table, (plain,))) is not None]
    return [*called, *(n for n in table if n not in called and _is_text(table[n], rows))]


def refuse_runs(
    table: Table, rows: Sequence[int], steps: Sequence[int], choice: Choice, path: Path
) -> None:
    """Refuse records of several runs, unless all were asked for.

    They are of several where steps repeat or go back, and a column tells apart records each of
    which count from the same step on. A run that is resumed under another name goes on later.

    Raises:
        AmbiguousCurveError: It names the column and the choices.
    """
    rises = all(one < other for one, other in itertools.pairwise(steps))
    if choice.run is not None or rises:
        return
    asked = [name for plain in RUN_NAMES if (name := named(table, (plain,))) is not None]
    others = [name for name in table if name not in (*asked, choice.group)
              and _is_text(table[name], rows)]  # fmt: skip
    for name in (*asked, *others):
        firsts: dict[str, int] = {}
        lasts: dict[str, int] = {}
        rises, counts = True, dict.fromkeys((_text(table[name][i]) for i in rows), 0)
        for i, step in zip(rows, steps, strict=True):
            value = _text(table[name][i])
            rises &= value not in lasts or step > lasts[value]
            firsts.setdefault(value, step)
            lasts[value] = step
            counts[value] += 1
        begin_alike = len(firsts) > 1 and len(set(firsts.values())) < len(firsts)
        if not begin_alike or len(firsts) > _MOST_RUNS:
            continue
        if name in asked or (rises and min(counts.values()) > 1 and "" not in counts):
            choices = listed([repr(one) for one in firsts], most=12)
            raise AmbiguousCurveError(
                f"{path} holds several runs, told apart by its column {name!r}; choose one with "
                f"--run: {choices}"
            )


def _is_text(cells: Sequence[Any], rows: Sequence[int]) -> bool:
    texts = {_text(cells[i]) for i in rows} - {""}
    return bool(texts) and len(texts) <= _MOST_RUNS and not any(map(_is_number, texts))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _is_training(cell: Any) -> bool:
    words = plain_name(_text(cell)).split("_")
    return words[0] in TRAINING_WORDS


def _is_evaluation(cell: Any) -> bool:
    plain = plain_name(_text(cell))
    return EVALUATION.search(plain) is not None and not _is_training(cell)
