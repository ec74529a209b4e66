"""How the losses of two arms differ, at the steps that both recorded. Torch-free.

What is compared is the mean over the last tenth of the common steps: a run that stopped early or
recorded seldom is compared where there is something to compare it with. Steps of one run are no
sample of anything: their differences depend on each other, so a single pair of runs gets facts
and no interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclamp.analysis import Spike
from unclamp.analysis.paired import PairedDifference, paired_difference
from unclamp.analysis.unpaired import UnpairedDifference, unpaired_difference
from unclamp.report.bands import Band, final_steps, mean
from unclamp.report.side_by_side.groups import Arm
from unclamp.report.side_by_side.pairing import Design, Pairing
from unclamp.report.side_by_side.reading import Side
from unclamp.report.thinning import kept_places

LEAST_CHANGES = 20
"""Changes from step to step that it takes to tell whether two losses move together."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where the losses of two runs that make a pair come apart.

    Attributes:
        is_equal: Whether they are equal in every digit at all common steps.
        usual_change: Median change of the other's loss from one common step to the next; None
            where there is none.
        beyond: Steps at which the two are further apart than that, or one is not finite, count.
        first_beyond: The first of them.
        furthest: Step at which they are furthest apart, of those where both are finite.
        furthest_by: Own minus other there.
        together: Rank correlation of the changes of the two losses from step to step: near 1 on
            the same batches, near 0 on others; None of fewer than 20 changes, or constant ones.
        own_spikes: Onsets of own spikes at whose steps the other has none.
        other_spikes: Onsets of the other's, likewise.
        shared_spikes: Onsets of own spikes at whose steps the other has one too.
    """

    own: str
    other: str
    is_equal: bool
    usual_change: float | None
    beyond: int
    first_beyond: int | None
    furthest: int | None
    furthest_by: float | None
    together: float | None
    own_spikes: list[int]
    other_spikes: list[int]
    shared_spikes: list[int]


@dataclass(frozen=True, kw_only=True)
class LossDifference:
    """An arm's loss minus the baseline's.

    Attributes:
        how: How it was decided which runs make pairs, a sentence.
        pairs: Names of the runs that do, own and other.
        first_gap: How far their first losses are apart at most, a fraction; None where nobody
            looked.
        steps: Steps at which all runs that are compared recorded a loss, count.
        first: The first of them; None without any.
        last: The last one.
        end_first: First step of those whose mean is compared: the last tenth, but planted steps.
        end_steps: How many they are.
        own_loss: Mean loss over them and the arm's runs; NaN where one is not finite.
        other_loss: The same of the baseline.
        paired: What the pairs show of it; None without pairs.
        unpaired: What the two groups show; None with pairs.
        partings: Where the losses come apart, for each pair.
        curve: The difference over steps: mean, smallest and largest over the pairs, or of the
            means where there are none. Thinned so that every peak stays.
    """

    arm: str
    baseline: str
    design: Design
    how: str
    pairs: list[tuple[str, str]]
    first_gap: float | None
    steps: int
    first: int | None
    last: int | None
    end_first: int | None
    end_steps: int
    own_loss: float | None
    other_loss: float | None
    paired: PairedDifference | None
    unpaired: UnpairedDifference | None
    partings: list[Parting]
    curve: Band

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the interval of the difference, if there is one."""
        found = self.paired or self.unpaired
        return None if found is None else found.interval


def loss_difference(own: Arm, other: Arm, pairing: Pairing) -> LossDifference:
    """Compare the losses of an arm with those of the baseline."""
    mine = [a for a, _ in pairing.pairs] or list(own.runs)
    theirs = [b for _, b in pairing.pairs] or list(other.runs)
    steps = common_steps([*mine, *theirs])
    end = final_steps(steps, {s for run in (*mine, *theirs) for s in run.record.planted})
    own_ends, other_ends = ([_mean_at(run, end) for run in runs] for runs in (mine, theirs))
    return LossDifference(
        arm=own.name,
        baseline=other.name,
        design=pairing.design,
        how=pairing.how,
        pairs=[(a.name, b.name) for a, b in pairing.pairs],
        first_gap=pairing.first_gap,
        steps=len(steps),
        first=steps[0] if steps else None,
        last=steps[-1] if steps else None,
        end_first=end[0] if end else None,
        end_steps=len(end),
        own_loss=mean(own_ends) if end else None,
        other_loss=mean(other_ends) if end else None,
        paired=paired_difference(own_ends, other_ends) if end and pairing.pairs else None,
        unpaired=None if pairing.pairs or not end else unpaired_difference(own_ends, other_ends),
        partings=[_parting(a, b) for a, b in pairing.pairs],
        curve=_difference(mine, theirs, steps, is_paired=bool(pairing.pairs)),
    )


def comparisons_of(differences: Sequence[LossDifference]) -> int:
    """Count the differences that have an interval: any of them could stand out by chance."""
    return sum(found.interval is not None for found in differences)


def common_steps(runs: Sequence[Side]) -> list[int]:
    """Return the steps at which all runs recorded a loss, rising."""
    return sorted(set.intersection(*(set(run.losses) for run in runs)))


def loss_band(runs: Sequence[Side]) -> Band:
    """Return loss over steps: mean, smallest and largest over the runs that got there.

    Thinned so that every peak stays; NaN where a run's loss is not finite.
    """
    steps = sorted(set().union(*(run.losses for run in runs)))
    values = np.full((len(runs), len(steps)), np.nan)
    place = {step: i for i, step in enumerate(steps)}
    for row, run in zip(values, runs, strict=True):
        row[[place[step] for step in run.losses]] = [
            x if math.isfinite(x) else np.inf for x in run.losses.values()
        ]
    present = ~np.isnan(values)
    low = np.where(present, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(present, values, -np.inf).max(axis=0, initial=-np.inf)
    total = np.where(present, values, 0.0).sum(axis=0)
    return _thinned(steps, low, total / np.maximum(present.sum(axis=0), 1), high)


def _difference(
    mine: Sequence[Side], theirs: Sequence[Side], steps: list[int], *, is_paired: bool
) -> Band:
    own, other = (
        np.array([[run.losses[s] for s in steps] for run in runs]).reshape(len(runs), len(steps))
        for runs in (mine, theirs)
    )
    if not is_paired:
        own, other = own.mean(axis=0, keepdims=True), other.mean(axis=0, keepdims=True)
    with np.errstate(invalid="ignore"):  # Inf minus Inf is a gap in the line
        gaps = own - other
        return _thinned(steps, gaps.min(axis=0), gaps.mean(axis=0), gaps.max(axis=0))


def _thinned(steps: list[int], low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> Band:
    known = np.isfinite(low) & np.isfinite(high)
    low, middle, high = (np.where(known, line, np.nan) for line in (low, middle, high))
    kept = kept_places(low.tolist(), high.tolist())
    return Band(
        step=[float(steps[i]) for i in kept],
        mean=middle[kept].tolist(),
        low=low[kept].tolist(),
        high=high[kept].tolist(),
    )


def _mean_at(run: Side, steps: Sequence[int]) -> float:
    return mean([run.losses[step] for step in steps])


def _parting(own: Side, other: Side) -> Parting:
    steps = common_steps([own, other])
    mine, theirs = (np.array([run.losses[s] for s in steps]) for run in (own, other))
    finite = np.isfinite(mine) & np.isfinite(theirs)
    with np.errstate(invalid="ignore"):
        gap = np.where(finite, mine - theirs, np.nan)
        changes = np.abs(np.diff(theirs))
    usual = float(np.median(changes[np.isfinite(changes)])) if np.isfinite(changes).any() else None
    same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
    beyond = ~same & ~(np.abs(gap) <= (usual or 0.0))
    furthest = int(np.nanargmax(np.abs(gap))) if finite.any() else None
    only_own, shared = _spikes_apart(own, other)
    only_other, _ = _spikes_apart(other, own)
    return Parting(
        own=own.name,
        other=other.name,
        is_equal=bool(len(steps)) and bool(same.all()),
        usual_change=usual,
        beyond=int(beyond.sum()),
        first_beyond=steps[int(np.argmax(beyond))] if beyond.any() else None,
        furthest=None if furthest is None else steps[furthest],
        furthest_by=None if furthest is None else float(gap[furthest]),
        together=_together(np.diff(mine[finite]), np.diff(theirs[finite])),
        own_spikes=only_own,
        other_spikes=only_other,
        shared_spikes=shared,
    )


def _together(mine: np.ndarray, theirs: np.ndarray) -> float | None:
    if len(mine) < LEAST_CHANGES or not np.ptp(mine) or not np.ptp(theirs):
        return None
    from scipy.stats import spearmanr  # noqa: PLC0415  # half a second, for pairs only

    found: Any = spearmanr(mine, theirs)  # scipy's own annotations lack its fields
    return float(found.statistic)


def _spikes_apart(own: Side, other: Side) -> tuple[list[int], list[int]]:
    """Return the onsets of own spikes that the other run does not have, and of those it has.

    Spikes beyond the other's last step are neither.
    """
    theirs = _loss_spikes(other)
    last = max(other.losses, default=-1)
    alone, shared = [], []
    for spike in _loss_spikes(own):
        if spike.onset > last:
            continue
        met = any(s.onset <= spike.end and spike.onset <= s.end for s in theirs)
        (shared if met else alone).append(spike.onset)
    return alone, shared


def _loss_spikes(run: Side) -> list[Spike]:
    return [spike for spike in run.record.spikes if spike.series == "loss"]
