"""The sites that clamped in order of their evidence, each with what a person wants to know of it.

The weights are those of `evidence`; who is named in the end is for `association`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.evidence import Clamping, Weights
from unclamp.analysis.power import to_change
from unclamp.analysis.schedules import Doubt

TWO_SIDED_95 = 1.96
LEAST_APART = 0.5
"""A site that clamps at more of the steps around its clamped ones has no bound."""


@dataclass(frozen=True, kw_only=True)
class SiteEvidence:
    """What a run shows about clamping at one site.

    Attributes:
        site: Id in the run; `fqn` and `role` name it.
        clamped_steps: Steps at which it clamped.
        followed: Of those, how many had a spike begin within the lags after them.
        hits: Spikes with clamping at this site within the lags before them.
        expected_hits: How many that would be by chance.
        lag: Steps from clamping to the spike at which the mean clamp error before spikes is
            largest; None without a hit.
        p: Chance that any site would look like this without a link, all sites counted.
        by: What it is named by, "spikes" or "loss"; None where it is not named.
        loss_change: Mean change of the loss just after clamping, a fraction (in the loss's own
            unit where it is not positive throughout); None where that is unknown.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        bound: What the loss rose by at most, against steps around without clamping, in the unit of
            `loss_change`: an upper bound that holds for all cleared sites at once with a chance
            of 95 %; that of a site that is not cleared can be too low. None where unknown, and for
            a site that clamps too densely.
        clamp_error: Mean clamp error over the clamped steps; None where elements were not counted.
        sqnr_db: Least signal-to-noise ratio seen, decibel; None where none was measured.
        cleared: Whether the run shows it harmless: not named, `low` at most 0, `bound` at most
            `CLEARED` (a share of the median size of the loss), not before every spike.
        doubt: Why it is not named though its `p` is low: clamping and loss share a "period", or
            jumps of the "learning rate", or agree in a "few places" only; None otherwise.
        period: The shared one, in steps.
    """

    site: int
    fqn: str
    role: str
    clamped_steps: int
    followed: int
    hits: int
    expected_hits: float
    lag: int | None
    p: float
    by: Literal["spikes", "loss"] | None
    loss_change: float | None
    low: float | None
    high: float | None
    bound: float | None
    clamp_error: float | None
    sqnr_db: float | None = None
    cleared: bool = False
    doubt: Doubt | None = None
    period: int | None = None


def rank_sites(
    weights: Weights,
    clamping: Clamping,
    onsets: NDArray[np.int64],
    names: Sequence[tuple[int, str, str]],
    sqnr_db: dict[int, float],
    is_relative: bool,
    max_lag: int,
    level: float,
) -> list[SiteEvidence]:
    """Return the sites that clamped, heaviest first, then by how often they clamped."""
    highest = np.sort(weights.highest()) if clamping.sites else np.zeros(1)
    own = np.maximum(weights.spikes[:, 0], weights.loss[:, 0])
    p = 1 - np.searchsorted(highest, own, side="left") / len(highest)
    counts = clamping.counts()
    order = np.lexsort((np.arange(len(own)), -counts, -own))
    found = []
    bounds = _bounds(weights, clamping, is_relative)
    for row in order[counts[order] > 0]:
        part = slice(clamping.starts[row], clamping.starts[row + 1])
        steps, errors = clamping.steps[part], clamping.errors[part]
        lags = range(int(clamping.first_lags[row]), max_lag + 1)
        by_spikes = weights.spikes[row, 0] >= weights.loss[row, 0]
        number, fqn, role = names[row]
        change, low, high = _interval(
            float(weights.excess[row]), float(weights.excess_sd[row]), is_relative
        )
        found.append(
            SiteEvidence(
                site=number,
                fqn=fqn,
                role=role,
                clamped_steps=len(steps),
                followed=_followed(steps, onsets, lags),
                hits=_hits(steps, onsets, lags),
                expected_hits=float(weights.expected[row]),
                lag=_peak_lag(steps, errors, onsets, lags),
                p=float(p[row]),
                by=("spikes" if by_spikes else "loss") if p[row] <= level else None,
                loss_change=change,
                low=low,
                high=high,
                bound=bounds[row],
                clamp_error=float(errors.mean()),
                sqnr_db=sqnr_db.get(number),
            )
        )
    return found


def _bounds(weights: Weights, clamping: Clamping, is_relative: bool) -> list[float | None]:
    """Return the bound of each site, joint for those that get cleared; None where there is none.

    A rise at the clamped steps shows as that times the share of steps around without clamping.
    """
    apart = clamping.apart()
    with np.errstate(invalid="ignore", divide="ignore"):
        most = np.maximum(weights.excess + weights.joint * weights.excess_sd, 0.0) / apart
        known = np.isfinite(most) & (weights.excess_sd > 0) & (apart >= LEAST_APART)
    pairs = zip(most.tolist(), known.tolist(), strict=True)
    return [to_change(value, is_relative) if ok else None for value, ok in pairs]


def _hits(steps: NDArray[np.int64], onsets: NDArray[np.int64], lags: range) -> int:
    """Return how many onsets have one of `steps` at one of the lags before them."""
    return int(np.isin(onsets[:, None] - np.array(lags), steps).any(axis=1).sum())


def _followed(steps: NDArray[np.int64], onsets: NDArray[np.int64], lags: range) -> int:
    return int(np.isin(steps[:, None] + np.array(lags), onsets).any(axis=1).sum())


def _peak_lag(
    steps: NDArray[np.int64], errors: NDArray[np.float64], onsets: NDArray[np.int64], lags: range
) -> int | None:
    """Return the lag at which the event-synchronous average of the clamp error is largest."""
    sums = [errors[np.isin(steps, onsets - lag)].sum() for lag in lags]
    return lags[int(np.argmax(sums))] if max(sums, default=0) > 0 else None


def _interval(
    mean: float, sd: float, is_relative: bool
) -> tuple[float, float, float] | tuple[None, None, None]:
    if not np.isfinite(mean) or not sd > 0:
        return None, None, None
    ends = [mean, mean - TWO_SIDED_95 * sd, mean + TWO_SIDED_95 * sd]
    change, low, high = (to_change(x, is_relative) for x in ends)
    return change, low, high
