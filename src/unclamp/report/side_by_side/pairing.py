"""Which runs of two arms make pairs: the same weights and the same batches. Torch-free.

A run log does not hold its batches. Two runs are taken as a pair where their metadata give the
same `seed`, and the same `data` if any, and where their first recorded losses agree: with equal
weights and batches they differ before the first update by the rounding of FP8 alone. Everything
else is for the user to say. How it was decided is part of the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unclamp.report.side_by_side.groups import Arm
from unclamp.report.side_by_side.reading import Side, canonical
from unclamp.written import listed

SAME_FIRST_LOSS = 0.01
"""Largest gap of two first losses, a fraction. FP8 rounding moves the first loss of a small Llama
by 0.01 %, that of deep trained models by some 0.1 %; the first batches of different data usually
differ by more than 1 %, but of a model with fresh weights they may not."""

Design = Literal["paired", "unpaired"]


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which runs of an arm go with which of the baseline, and how that was decided.

    Attributes:
        pairs: Of own and other; empty where the arms are compared without pairs.
        how: A sentence.
        first_gap: How far the first losses of a pair are apart at most, a fraction; None where
            nobody looked.
    """

    pairs: list[tuple[Side, Side]]
    how: str
    first_gap: float | None = None

    @property
    def design(self) -> Design:
        """Whether there are pairs."""
        return "paired" if self.pairs else "unpaired"


def pair_runs(own: Arm, other: Arm, *, paired: bool | None) -> Pairing:
    """Return the pairs of two arms.

    Args:
        own: The arm.
        other: What it is compared with.
        paired: The user's word on whether the batches are the same; None to look.
    """
    if paired is False:
        return Pairing(pairs=[], how="Not paired, as you said.")
    by_seed = _by_seed(own, other)
    if paired:
        return _as_said(own, other, by_seed)
    if not by_seed:
        return Pairing(pairs=[], how=f"Not paired: {_no_seed(own, other)}")
    reasons = [reason for pair in by_seed if (reason := _not_a_pair(*pair))]
    if reasons:
        return Pairing(pairs=[], how=f"Not paired, though a seed is the same: {reasons[0]}")
    gap = max(_first_gap(*pair) for pair in by_seed)
    step = min(by_seed[0][0].losses)
    how = (
        f"Paired by seed: the metadata give the same seed, and the first losses (step {step:,}) "
        f"agree within {100 * SAME_FIRST_LOSS:g} %. The batches themselves are not in the log: if "
        "they were not the same, say --unpaired."
    )
    how += _left_over(own, other, by_seed)
    return Pairing(pairs=by_seed, how=how, first_gap=gap)


def _by_seed(own: Arm, other: Arm) -> list[tuple[Side, Side]]:
    others = {canonical(run.seed): run for run in other.runs if run.seed is not None}
    return [(run, others[canonical(run.seed)]) for run in own.runs if canonical(run.seed) in others]


def _as_said(own: Arm, other: Arm, by_seed: list[tuple[Side, Side]]) -> Pairing:
    if by_seed:
        how = "Paired by seed, as you said."
        return Pairing(pairs=by_seed, how=how + _left_over(own, other, by_seed))
    if len(own.runs) == len(other.runs) == 1:
        return Pairing(pairs=[(own.runs[0], other.runs[0])], how="Paired, as you said.")
    how = "Not paired, though you said --paired: no seed in the metadata is in both arms."
    return Pairing(pairs=[], how=how)


def _no_seed(own: Arm, other: Arm) -> str:
    silent = [run.name for arm in (own, other) for run in arm.runs if run.seed is None]
    if silent:
        why = f"the metadata of {listed(silent, most=4)} give no seed"
    else:
        why = "no seed is in both arms"
    if len(own.runs) == len(other.runs) == 1:
        gap = _first_gap(own.runs[0], other.runs[0])
        if gap <= SAME_FIRST_LOSS:
            why += f", though the first losses agree within {100 * SAME_FIRST_LOSS:g} %"
    return f"{why}. If the runs began with the same weights and saw the same batches, say --paired."


def _not_a_pair(own: Side, other: Side) -> str:
    """Say why two runs with the same seed are no pair; "" where they are."""
    data = [canonical(side.header.metadata.get("data")) for side in (own, other)]
    if data[0] != data[1]:
        return f"the metadata of {own.name} and {other.name} give other data."
    if not own.losses or not other.losses:
        silent = other if own.losses else own
        return f"{silent.name} recorded no loss."
    starts = min(own.losses), min(other.losses)
    if starts[0] != starts[1]:
        return (
            f"the first losses of {own.name} and {other.name} are of other steps ({starts[0]:,} "
            f"and {starts[1]:,}), so they cannot tell. If the batches are the same, say --paired."
        )
    gap = _first_gap(own, other)
    if gap <= SAME_FIRST_LOSS:
        return ""
    first = own.losses[starts[0]], other.losses[starts[0]]
    return (
        f"the first losses of {own.name} and {other.name} are {first[0]:.4g} and {first[1]:.4g}, "
        f"more than {100 * SAME_FIRST_LOSS:g} % apart, so weights or batches are not the same. "
        "If they are, say --paired."
    )


def _first_gap(own: Side, other: Side) -> float:
    """Return how far two first losses are apart, a fraction of the larger; Inf without an answer.

    They are of the same step, and finite, or there is none.
    """
    if not own.losses or not other.losses or min(own.losses) != min(other.losses):
        return math.inf
    pair = own.losses[min(own.losses)], other.losses[min(other.losses)]
    if not all(map(math.isfinite, pair)):
        return math.inf
    largest = max(map(abs, pair))
    return abs(pair[0] - pair[1]) / largest if largest else 0.0


def _left_over(own: Arm, other: Arm, pairs: Sequence[tuple[Side, Side]]) -> str:
    used = {side.name for pair in pairs for side in pair}
    rest = [run.name for arm in (own, other) for run in arm.runs if run.name not in used]
    return f" Without a partner, and left out: {listed(rest, most=4)}." if rest else ""
