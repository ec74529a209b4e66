"""Which column of a file is the loss and which the gradient norm, and what that leaves unsaid."""

import itertools
import re

from unclamp.analysis.records import Recorded
from unclamp.analysis.selections import (
    AmbiguousCurveError,
    Choice,
    is_like_loss,
    is_training_loss,
    plain_name,
    runs_of_columns,
)
from unclamp.written import counted, listed

SERIES = ("loss", "grad_norm")
SERIES_NAMES = {
    "loss": ("loss", "train_loss", "training_loss", "loss_train", "train_loss_step", "lm_loss",
             "lm_loss_training_lm_loss", "total_loss", "train_total_loss", "train_cross_entropy",
             "train_crossentropyloss", "ce_loss", "train_ce_loss", "optim_loss"),
    "grad_norm": ("grad_norm", "train_grad_norm", "gradient_norm", "train_gradient_norm",
                  "total_grad_norm", "optim_total_grad_norm", "gradnorm", "gnorm", "norm"),
}  # fmt: skip
"""What a series is called elsewhere, the likeliest first; case and punctuation do not count."""
WHOLE_LOSSES = ("loss", "train_loss", "training_loss", "loss_train", "train_loss_step",
                "total_loss", "train_total_loss")  # fmt: skip
"""Names of all that is minimised; where two of them differ, one is not what it is called."""
_PART = re.compile(r"(^|_)(z|aux|auxiliary|load_balanc\w*|router|moe\w*|mtp_\d+|kl)_?loss(_|$)")
"""A part of a loss, or what is added to it."""
_TENSORBOARD_CSV = {"wall_time", "value"}
"""The columns besides the step in the CSV of one tag that TensorBoard's page downloads."""
_EXTREME = re.compile(r"(^|_)(min|max)(_|$)")


def notes_of(recorded: Recorded, column: str, count: int, choice: Choice) -> list[str]:
    """Say what of a column's records does not count by itself; `count` steps are left."""
    steps, cells = recorded.columns[column]
    there = [step for step, cell in zip(steps, cells, strict=True) if cell is not None]
    notes = []
    others = _other_losses(recorded, column) if choice.column is None else []
    if others:
        notes.append(f"{column!r} is taken for the loss, not {listed(others, 'or', most=6)}.")
    if missing := len(cells) - len(there):
        notes.append(f"{counted(missing, 'record')} without a value of {column!r} left out.")
    if recorded.ranks:
        ranks = len(set(recorded.ranks))
        notes.append(f"Of {ranks} ranks that wrote, the mean counts.")
    dropped = len(there) - count
    if recorded.ranks or dropped < 1:
        return notes
    back = [(one, other) for one, other in itertools.pairwise(there) if other < one]
    name = recorded.step_name
    were = counted(dropped, "record was", "records were")
    if back and not recorded.restarts:
        first = f"from {name} {back[0][0]} to {back[0][1]}" + (
            ", the first time" if back[1:] else ""
        )
        notes.append(
            f"The {name} went back {counted(len(back), 'time')} ({first}): {were} dropped, since "
            f"of a {name} what was recorded last counts."
        )
    else:
        notes.append(f"{were} dropped whose {name} was recorded again: the last counts.")
    return notes


def _other_losses(recorded: Recorded, column: str) -> list[str]:
    """Return the other columns that are called like a loss of training."""
    if not is_training_loss(plain_name(column)):
        return []
    return [
        repr(other)
        for other, (_, cells) in recorded.columns.items()
        if other != column
        and is_training_loss(plain_name(other))
        and not _EXTREME.search(plain_name(other))
        and any(cell is not None for cell in cells)
    ]


def choose_column(recorded: Recorded, series: str) -> str | None:
    """Return the column that holds a series, None if there is none.

    Raises:
        AnalysisError: Several that could be the loss.
    """
    plain: dict[str, list[str]] = {}
    for column in recorded.columns:
        plain.setdefault(plain_name(recorded.same.get(column, column)), []).append(column)
    likely = next((plain[name] for name in SERIES_NAMES[series] if name in plain), [])
    if series == "loss":
        whole = [column for name in WHOLE_LOSSES for column in plain.get(name, ())]
        likely = _without_doubles(recorded, whole) or likely
    if series != "loss":
        return likely[0] if len(likely) == 1 else None
    likely = likely or [
        column
        for name, columns in plain.items()
        for column in columns
        if is_training_loss(name) and not _EXTREME.search(name)
    ]
    likely = likely or [
        column
        for name, columns in plain.items()
        for column in columns
        if is_like_loss(name) and not _EXTREME.search(name)
    ]
    likely = [one for one in likely if not _PART.search(plain_name(one))] or likely
    if not likely and set(plain) == _TENSORBOARD_CSV:
        likely = plain["value"]
    if len(likely) > 1:
        runs = runs_of_columns(recorded.columns)
        or_run = f"; or a run with --run: {runs}" if len(runs) > 1 else ""
        raise AmbiguousCurveError(
            f"several columns could be the loss; name one with --column: {likely}{or_run}"
        )
    return likely[0] if likely else None


def _without_doubles(recorded: Recorded, columns: list[str]) -> list[str]:
    """Leave out columns that say the same as an earlier one, or something at none of its records.

    Hugging Face's Trainer writes `train_loss` once, at the end, and `loss` before.
    """
    kept: list[str] = []
    for column in columns:
        cells = recorded.columns[column][1]
        for other in kept:
            pairs = zip(cells, recorded.columns[other][1], strict=False)
            if all(one is None or two is None or str(one) == str(two) for one, two in pairs):
                break
        else:
            kept.append(column)
    return kept
