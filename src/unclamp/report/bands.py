"""What arms' plots show: losses and their differences over steps, and clamping as heat. Torch-free.

What is drawn of one run is in `runs`; how it is drawn is for `charts`.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.analysis.joining import union
from unclamp.report.recorded import HEAT_SITES, RunRecord
from unclamp.report.thinning import kept_places

FINAL_SHARE = 0.1
"""The final loss is the mean over this last share of the steps that are not planted."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A loss over the seeds: at each step its mean, and the smallest and the largest one."""

    step: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True, kw_only=True)
class Heat:
    """The clamped share, sites by windows: `share[i, j]` of `sites[i]` from `steps[j]` on."""

    sites: list[str]
    steps: list[int]
    share: np.ndarray
    window: int = 1


def final_loss(run: RunRecord) -> float | None:
    """Return the mean over the last tenth of the steps that recorded a loss, planted ones left out.

    Those are compared apart. None of a run that is not finished, whose last steps are not the
    last ones, or that recorded no loss. NaN where one of these losses is not finite.
    """
    if run.status != "finished":
        return None
    recorded = by_step(run)
    last = final_steps(list(recorded), set(run.planted))
    return mean([recorded[step] for step in last]) if last else None


def final_steps(steps: Sequence[int], planted: Container[int]) -> list[int]:
    """Return as many of the last steps that are not planted as are a tenth of all; at least one."""
    ordinary = [step for step in steps if step not in planted]
    return ordinary[-max(1, round(FINAL_SHARE * len(steps))) :]


def by_step(run: RunRecord) -> dict[int, float]:
    """Return the losses that were recorded, NaN and Inf among them."""
    return {s: x for s, x in zip(run.steps, run.loss, strict=True) if x is not None}


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN where a value is not finite, or where there is none."""
    is_known = bool(values) and all(map(math.isfinite, values))
    return float(np.mean(values)) if is_known else math.nan


def loss_band(runs: Iterable[RunRecord]) -> Band:
    """Return loss over steps: mean, smallest and largest over the seeds that got there.

    Thinned for a page, so that every peak of the largest and trough of the smallest stays. NaN at
    a step where a seed's loss is not finite; steps without a loss are left out.
    """
    return _band(map(by_step, runs))


def difference_band(runs: Mapping[int, RunRecord], baseline: Mapping[int, RunRecord]) -> Band:
    """Return, over steps, own loss minus that of the baseline on the same seed and step.

    Only steps and seeds that both recorded; as `loss_band` otherwise.
    """
    return _band(
        _differences(run, baseline[seed]) for seed, run in runs.items() if seed in baseline
    )


def _differences(run: RunRecord, other: RunRecord) -> dict[int, float]:
    own, theirs = by_step(run), by_step(other)
    return {step: own[step] - theirs[step] for step in own if step in theirs}


def _band(series: Iterable[Mapping[int, float]]) -> Band:
    parts = [
        (np.fromiter(one.keys(), np.int64, len(one)), np.fromiter(one.values(), float, len(one)))
        for one in series
        if one
    ]
    if not parts:
        return Band(step=[], mean=[], low=[], high=[])
    steps = union([at for at, _ in parts])
    low, high = np.full(len(steps), math.inf), np.full(len(steps), -math.inf)
    given = []
    for at, values in parts:
        known = np.where(np.isfinite(values), values, math.nan)
        places = np.searchsorted(steps, at)
        low[places] = np.minimum(low[places], known)  # NaN stays NaN
        high[places] = np.maximum(high[places], known)
        given.append((places, known))
    kept = kept_places(low, high)
    of_kept = []
    for places, known in given:
        there = np.isin(places, kept)
        of_kept.append(dict(zip(places[there].tolist(), known[there].tolist(), strict=True)))
    return Band(
        step=[float(steps[i]) for i in kept],
        mean=[mean([one[i] for one in of_kept if i in one]) for i in kept],
        low=[float(low[i]) for i in kept],
        high=[float(high[i]) for i in kept],
    )


def heat(runs: Sequence[RunRecord]) -> Heat:
    """Return the clamped share, sites by windows, mean over the runs cut alike; worst sites."""
    cut = max((run.cut for run in runs), key=lambda cut: cut.count * cut.size)
    same = [run.shares for run in runs if run.cut == cut]
    nothing = np.zeros(cut.count)
    order = dict.fromkeys(site for shares in same for site in shares)
    share = {site: np.mean([s.get(site, nothing) for s in same], axis=0) for site in order}
    worst = sorted(share, key=lambda site: -float(share[site].sum()))[:HEAT_SITES]
    rows = [site for site in order if site in set(worst)]
    return Heat(
        sites=[str(site) for site in rows],
        steps=cut.steps,
        share=np.array([share[site] for site in rows]).reshape(len(rows), cut.count),
        window=cut.size,
    )
