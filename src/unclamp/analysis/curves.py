"""Loss curves from wherever they were written: a run log, CSV, JSON, a trainer, TensorBoard.

`read_curve` finds out what a path holds, which column is the loss and which the gradient norm,
and brings the records into one order of steps. What a path holds is found out in `sources`, which
column is the loss in `series`; what the curve means is for `spikes`.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unclamp.analysis.groups import Group, has_kinds, joined
from unclamp.analysis.joining import column_means, last_records, means_over_ranks, union
from unclamp.analysis.records import Recorded, to_number
from unclamp.analysis.selections import Choice
from unclamp.analysis.series import SERIES, choose_column, notes_of
from unclamp.analysis.sources import read_as_text, read_source
from unclamp.errors import AnalysisError, did_you_mean
from unclamp.runlog import RunLog, is_run
from unclamp.runlog.located import located

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run's series over its steps.

    Attributes:
        steps: Step numbers, rising.
        series: By name ("loss", "grad_norm"), a value a step; None where it was not recorded.
        columns: By name, what the series is called in the source.
        source: What it was read from, in words.
        places: By step number, what the source calls the step, such as "epoch 3, step 20", where
            it counts steps anew in each epoch; the steps are then records, from 0. Empty
            otherwise.
        notes: What was left out or could not be told, a sentence each.
        groups: The kind of each step's batch, None where it has none; empty where no step has one.
    """

    steps: np.ndarray
    series: dict[str, list[float | None]]
    columns: dict[str, str]
    source: str
    places: Sequence[str] = ()
    notes: Sequence[str] = ()
    groups: Sequence[Group] = ()


@dataclass(frozen=True, kw_only=True)
class Losses:
    """A run's losses.

    Attributes:
        steps: Step numbers with a loss, rising.
        values: The loss of each; NaN and Inf stay.
        groups: The kind of each one's batch; empty where no step has one.
    """

    steps: list[int]
    values: list[float]
    groups: list[Group]


def read_curve(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    split: str | None = None,
    run: str | None = None,
    pattern: str | None = None,
    group: str | None = None,
) -> Curve:
    """Return the curve that a file or folder holds.

    Reads the folder of a run log; CSV with a header line; JSON lines, nested or not; a Hugging
    Face `trainer_state.json`, or a folder or checkpoint with one; a TensorBoard event file, or a
    folder with those of one run; a metric's file in MLflow's folder; what a trainer printed, a line
    a step. Text may be gzip, UTF-8 or UTF-16; "-" is the standard input.

    Records are taken in the order in which they were written. Where the step goes back (a resumed
    run), what was recorded before from that step on is dropped; a step recorded twice counts as it
    was recorded last; of several ranks the mean counts. Without a column of steps the rows are
    numbered from 0; so are they where steps are counted anew in each epoch. What does not count,
    such as records of an evaluation, is said in `notes`.

    Args:
        path: What to read.
        column: Column or tag to take for the loss; without it, one that is called like a loss.
        split: Split to read, as the file calls it; without it, what is called training.
        run: Run to read, where a file holds several: as the file calls it, `COLUMN=VALUE`, or
            "all" for records that one run wrote under several names.
        pattern: Regular expression for text: a line in which it is found is a record, its groups
            `loss` and, as there are, `step`, `grad_norm`, `epoch` and others are the values.
        group: Column that holds the kind of each step's batch, as any text. A run log has its own.

    Raises:
        AnalysisError: Nothing readable, no such column, split or run; or several that could be
            meant, with the choices; or a group's column was named for a run log.
        RunLogError: A run that this version cannot read.
    """
    path = located(path)
    choice = Choice(column=column, split=split, run=run, pattern=pattern, group=group)
    if path.is_dir() and is_run(path):
        _refuse_for_runs(choice, path)
        if group is not None:
            raise AnalysisError(
                f"{path} is a run log, which holds the groups that recorder.step(group=...) was "
                f"given; a column of them, here {group!r}, is named for files only"
            )
        with RunLog.open(path) as log:
            return run_curve(log, column=column)
    return _chosen_curve(read_source(path, choice), path, choice)


def read_text_curve(text: str, path: Path, choice: Choice) -> Curve:
    """Return the curve in the text of a file, `path` as it is called; as `read_curve`."""
    return _chosen_curve(read_as_text(text, path, choice), path, choice)


def _chosen_curve(recorded: Recorded, path: Path, choice: Choice) -> Curve:
    """Return the curve of the columns that were asked for, or are called like one."""
    column, group = choice.column, choice.group
    chosen = {
        name: found
        for name in SERIES
        if (found := column if name == "loss" and column else choose_column(recorded, name))
        is not None
    }
    for name in (column, group):
        if name is not None and name not in recorded.columns:
            hint = did_you_mean(name, recorded.columns)
            raise AnalysisError(
                f"{path} has no column {name!r}; it has {_listed(recorded.columns)}{hint}"
            )
    if not chosen:
        raise AnalysisError(
            f"{path} has no column that is called like a loss; name one with --column: "
            f"it has {_listed(recorded.columns)}"
        )
    if column is not None and chosen.get("grad_norm") == column:
        del chosen["grad_norm"]  # once, as what was asked for
    parts = {name: _ordered(recorded, found, path) for name, found in chosen.items()}
    main = next(iter(parts))  # the loss, if there is one
    if len(parts[main][0]) == 0:
        raise AnalysisError(
            f"the column {chosen[main]!r} of {path}, read as {recorded.source}, has no value at "
            "any step"
        )
    curve = _curve(parts, chosen, recorded.source)
    if group is not None:
        curve = _with_groups(curve, _groups_of(recorded, group, list(chosen.values()), path))
    notes = [*recorded.notes, *notes_of(recorded, chosen[main], len(parts[main][0]), choice)]
    return _by_record(replace(curve, notes=notes), recorded)


def run_curve(log: RunLog, *, column: str | None = None) -> Curve:
    """Return the curve of a run log: the mean over ranks at each step.

    It is the way to the model that there is in the end. Where a run went back and ended before it
    had caught up, the steps beyond are left out: their weights were thrown away, and the loss of
    the last step would otherwise be followed by that of another model.

    Args:
        log: The run.
        column: A name among the recorded scalars to take for the loss.

    Raises:
        AnalysisError: No such scalar, or the run recorded neither loss nor gradient norm.

    Numerics: a NaN or Inf of one rank is that of the step; a rank without a value counts for
    nothing.
    """
    is_scalar = column is not None and column not in SERIES
    others = ", scalars" if is_scalar else ""
    rows = log.sql(f'SELECT step, rank, loss, grad_norm, "group"{others} FROM steps')
    values = {name: rows[name] for name in SERIES}
    if is_scalar:
        scalars = [dict(pairs or ()) for pairs in rows["scalars"].to_pylist()]
        known = {name for row in scalars for name in row}
        if column not in known:
            raise AnalysisError(
                f"{log.path} has no scalar {column!r}; it has {_listed([*SERIES, *sorted(known)])}"
                f"{did_you_mean(column, [*SERIES, *known])}"
            )
        values["loss"] = pa.chunked_array([[row.get(column) for row in scalars]], pa.float64())
    elif column == "grad_norm":
        values["loss"] = values.pop("grad_norm")
    steps, ranks = (rows[name].to_numpy().astype(np.int64) for name in ("step", "rank"))
    parts = {
        name: column_means(steps, ranks, numbers)
        for name, numbers in values.items()
        if numbers.null_count < len(numbers)
    }
    if not parts:
        raise AnalysisError(
            f"the run {log.path} recorded neither loss nor gradient norm; "
            "pass them to recorder.step(loss=..., grad_norm=...)"
        )
    columns = {name: column if name == "loss" and column else name for name in parts}
    curve = _curve(parts, columns, "run log")
    if rows["group"].null_count == len(rows):
        return curve
    series = [values[name].to_pylist() for name in parts]
    groups = rows["group"].to_pylist()
    return _with_groups(curve, _groups_by_rank(steps.tolist(), ranks.tolist(), groups, series))


def run_losses(log: RunLog) -> Losses:
    """Return the losses of a run's curve; steps without one are left out.

    This is the series whose spikes `unclamp spikes` numbers and `unclamp explain` replays.

    Raises:
        AnalysisError: As `run_curve`.
    """
    curve = run_curve(log)
    losses = curve.series.get(SERIES[0], [])
    known = [i for i, value in enumerate(losses) if value is not None]
    return Losses(
        steps=curve.steps[known].tolist(),
        values=[value for value in losses if value is not None],
        groups=[curve.groups[i] for i in known] if curve.groups else [],
    )


def _refuse_for_runs(choice: Choice, path: Path) -> None:
    """Refuse options that say nothing of a run log."""
    asked = {"--split": choice.split, "--run": choice.run, "--pattern": choice.pattern}
    for option, value in asked.items():
        if value is not None:
            raise AnalysisError(
                f"{path} is the log of one run's training; {option} {value!r} is for files of "
                "other programs"
            )


def _ordered(recorded: Recorded, column: str, path: Path) -> tuple[np.ndarray, list[float | None]]:
    """Return rising steps and their values: the mean over ranks, where several wrote."""
    steps, values = recorded.numbers(column, path)
    if recorded.ranks:
        return _mean_over_ranks(steps, recorded.ranks, values)
    return _in_order(steps, values)


def _in_order(steps: Sequence[int], values: Sequence[Any]) -> tuple[np.ndarray, list[float | None]]:
    """Bring records into rising steps; what a later record went back behind is dropped."""
    at, kept = _last_records(steps, [i for i, value in enumerate(values) if value is not None])
    return at, [to_number(values[i]) for i in kept]


def _groups_of(
    recorded: Recorded, group: str, columns: Sequence[str], path: Path
) -> list[dict[int, Group]]:
    """Return the kind of each step of each rank, by the column `group` of a file."""
    at, cells = recorded.columns[group]
    groups = [_to_group(cell) for cell in cells]
    numbers = [recorded.numbers(column, path) for column in columns]
    series = [values for steps, values in numbers if list(steps) == list(at)]
    # Tags of TensorBoard have records of their own: then those of the kind say it.
    return _groups_by_rank(at, recorded.ranks or [0] * len(at), groups, series or [groups])


def _groups_by_rank(
    steps: Sequence[int],
    ranks: Sequence[int],
    groups: Sequence[Group],
    series: Sequence[Sequence[Any]],
) -> list[dict[int, Group]]:
    return [
        _groups_in_order(
            [steps[i] for i in own],
            [groups[i] for i in own],
            [[values[i] for i in own] for values in series],
        )
        for own in _rows_by_rank(ranks)
    ]


def _groups_in_order(
    steps: Sequence[int], groups: Sequence[Group], series: Sequence[Sequence[Any]]
) -> dict[int, Group]:
    """Return the kind of each step, also where that is none.

    It is that of the record whose value counts; the first of the series, the loss, comes first.
    An evaluation of the same step is another record, which need not name the kind.
    """
    found: dict[int, Group] = {}
    for values in reversed(series):
        at, kept = _last_records(steps, [i for i, value in enumerate(values) if value is not None])
        found |= dict(zip(at.tolist(), [groups[i] for i in kept], strict=True))
    return found


def _to_group(cell: Any) -> Group:
    """Return what a cell calls the kind of a batch; a number is a name like another."""
    return None if cell is None or not str(cell).strip() else str(cell).strip()


def _with_groups(curve: Curve, of_ranks: Sequence[dict[int, Group]]) -> Curve:
    """Return the curve with the kind of each step, joined over the ranks."""
    groups = [joined(own.get(step) for own in of_ranks) for step in curve.steps.tolist()]
    return replace(curve, groups=groups if has_kinds(groups) else ())


def _last_records(steps: Sequence[int], there: list[int]) -> tuple[np.ndarray, list[int]]:
    """Return rising steps and the record of each that counts, of the records `there`."""
    at, kept = last_records(np.asarray([steps[i] for i in there], dtype=np.int64))
    return at, [there[i] for i in kept.tolist()]


def _mean_over_ranks(
    steps: Sequence[int], ranks: Sequence[int], values: Sequence[float | None]
) -> tuple[np.ndarray, list[float | None]]:
    of_ranks = _rows_by_rank(ranks)
    if len(of_ranks) == 1:
        return _in_order(steps, values)
    parts = []
    for rows in of_ranks:
        at, numbers = _in_order([steps[i] for i in rows], [values[i] for i in rows])
        there = [i for i, number in enumerate(numbers) if number is not None]
        known = [number for number in numbers if number is not None]
        parts.append((at[there], np.asarray(known, dtype=np.float64)))
    at, means = means_over_ranks(parts)
    return at, means.tolist()


def _rows_by_rank(ranks: Sequence[int]) -> list[list[int]]:
    of_rank: dict[int, list[int]] = {}
    for i, rank in enumerate(ranks):
        of_rank.setdefault(rank, []).append(i)
    return list(of_rank.values())


def _curve(
    parts: dict[str, tuple[np.ndarray, list[float | None]]], columns: dict[str, str], source: str
) -> Curve:
    """Join series over the union of their steps."""
    steps = union([at for at, _ in parts.values()])
    series: dict[str, list[float | None]] = {}
    for name, (at, values) in parts.items():
        if len(at) == len(steps):
            series[name] = values
            continue
        known = dict(zip(at.tolist(), values, strict=True))
        series[name] = [known.get(step) for step in steps.tolist()]
    return Curve(steps=steps, series=series, columns=columns, source=source)


def _by_record(curve: Curve, recorded: Recorded) -> Curve:
    """Number a curve by records where the source counts steps anew in each epoch."""
    if not recorded.restarts:
        return curve
    named = [recorded.restarts[step] for step in curve.steps.tolist()]
    places = [f"epoch {epoch}, {recorded.step_name} {step}" for epoch, step in named]
    return replace(curve, steps=np.arange(len(named)), places=places)


def _listed(names: Iterable[str]) -> str:
    """Return names for an error, the first few of many."""
    every = list(names)
    rest = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(repr(name) for name in every[:_SHOWN]) or "none") + rest
