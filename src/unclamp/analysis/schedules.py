"""Is what links a site with the loss more than a schedule that both follow?

Restarts of the learning rate, epochs and changes of the data move loss and clamping at the same
steps, and no shift in time shows that neither follows the other. What is weighed here is what a
schedule does not foretell: against the same phase of other periods, where something repeats;
away from jumps of the learning rate, where the log has it; and place by place, so that one change
counts once however many steps it moves.

A site is asked this only after it weighed more than chance; a run without a schedule loses
nothing by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.evidence import (
    SHORT_LAGS,
    TOP_SHARES,
    Clamping,
    clamp_levels,
    score_weights,
    window_max,
)
from unclamp.analysis.repeats import find_repeat, repeat_of_changes, same_phase
from unclamp.analysis.response import LEVEL_STEPS, Response

Doubt = Literal["period", "learning rate", "few places"]
"""Why a site that weighs more than chance is not named."""
PLACE_STEPS = LEVEL_STEPS
"""The loss is measured against a median over so many steps: one change moves as many."""
MIN_PLACES_Z = 3.0
"""Places count one each at most, so that nine have to agree."""
LEAST_PLACES = round(MIN_PLACES_Z**2)
JUMP = 0.05
"""A change of the learning rate from a step to the next, as a share of its largest nearby."""
NEAR_STEPS = 50
MOST_NEAR = 0.5
"""Where more of the run is near jumps, they are no exceptions that could be left out."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is known of a run's schedule, whatever clamps.

    Attributes:
        periods: Distances in steps at which the loss or the learning rate repeats itself.
        jumps: Steps at which the learning rate jumps, the first of each jump, at no fixed
            distance.
        near: Whether a step is near one of those.
    """

    periods: tuple[float, ...]
    jumps: NDArray[np.int64]
    near: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Doubted:
    """Why a schedule may be what links a site with the loss.

    Attributes:
        doubt: What kind of schedule.
        period: In steps, where it is a period.
    """

    doubt: Doubt
    period: int | None = None


def read_schedule(
    response: Response | None, lr: NDArray[np.float64] | None, length: int
) -> Schedule:
    """Return what loss and learning rate show of a schedule.

    Args:
        response: The loss without its trend, None where it says nothing.
        lr: Learning rate at each step, NaN where it is unknown; None without any.
        length: Steps of the run.
    """
    found = [] if response is None else [find_repeat(np.clip(response.scores, -3, 3))]
    jumps = np.zeros(0, dtype=np.int64) if lr is None else find_jumps(lr)
    regular = repeat_of_changes(jumps)
    if regular is not None:
        found.append(regular)
        jumps = jumps[:0]
    near = np.zeros(length, dtype=bool)
    for jump in jumps.tolist():
        near[max(0, jump - LEVEL_STEPS // 2) : jump + NEAR_STEPS + 1] = True
    if near.mean() > MOST_NEAR:
        jumps, near = jumps[:0], np.zeros(length, dtype=bool)
    periods = tuple(period for period in found if period is not None)
    return Schedule(periods=periods, jumps=jumps, near=near)


def find_jumps(lr: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return where the learning rate jumps, up or down; of a jump over some steps the first."""
    known = np.where(np.isfinite(lr), lr, 0.0)
    padded = np.pad(np.abs(known), NEAR_STEPS)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEAR_STEPS + 1)
    changes = np.abs(np.diff(known, prepend=known[:1])) * np.isfinite(lr)
    changes[1:] *= np.isfinite(lr[:-1])
    steps = np.flatnonzero(changes > JUMP * windows.max(axis=1))
    return steps[np.diff(steps, prepend=-NEAR_STEPS - 1) > NEAR_STEPS].astype(np.int64)


def doubt_loss(
    schedule: Schedule, clamping: Clamping, site: int, response: Response, *, max_lag: int
) -> Doubted | None:
    """Return why the loss after clamping at `site` may be raised by a schedule, None if it is not.

    It is not where the loss is raised in many places, against the same phase of other periods and
    away from jumps of the learning rate.
    """
    first = int(clamping.first_lags[site])
    windows = sorted({min(first + SHORT_LAGS - 1, max_lag), max_lag})
    news = [response.ahead(response.calm_scores(), first, last) for last in windows]
    steps, weights = _clamped(clamping, site)
    for period in _periods(schedule, clamping, site):
        left = [each - same_phase(each, period) for each in news]
        if max(places_z(each, steps, weights) for each in left) < MIN_PLACES_Z:
            return Doubted(doubt="period", period=round(period))
    if max(places_z(each, steps, weights) for each in news) < MIN_PLACES_Z:
        return Doubted(doubt="few places")
    left = [np.where(schedule.near, 0.0, each) for each in news]
    if max(places_z(each, steps, weights) for each in left) < MIN_PLACES_Z:
        return Doubted(doubt="learning rate")
    return None


def doubt_spikes(
    schedule: Schedule,
    clamping: Clamping,
    site: int,
    onsets: NDArray[np.int64],
    *,
    max_lag: int,
    level: float,
) -> Doubted | None:
    """Return why clamping at `site` may precede spikes by a schedule, None if it does not.

    The chance that a spike has clamping before it is that at the same phase of other periods, or
    at the same distance after other jumps of the learning rate.
    """
    seen = _seen(clamping, site, max_lag)
    tests = len(seen)
    for period in _periods(schedule, clamping, site):
        cycles = np.arange(1, int(clamping.length / period) + 1)
        offsets = np.round(np.concatenate([-cycles, cycles]) * period).astype(np.int64)
        alike = [onset + offsets for onset in onsets]
        if tests * min(_tail(each, onsets, alike) for each in seen) > level:
            return Doubted(doubt="period", period=round(period))
    if len(schedule.jumps):
        alike = [_after_jumps(onset, schedule) for onset in onsets.tolist()]
        if tests * min(_tail(each, onsets, alike) for each in seen) > level:
            return Doubted(doubt="learning rate")
    return None


def places_z(
    news: NDArray[np.float64], steps: NDArray[np.int64], weights: NDArray[np.float64]
) -> float:
    """Return how many standard deviations the news at `steps` is above 0, a place counting once.

    A sum over stretches of the run, over the root of the sum of its squares: at most the root of
    the number of stretches that have any.
    """
    parts = np.bincount(steps // PLACE_STEPS, weights=weights * (news[steps] - news.mean()))
    size = float(np.sqrt(parts @ parts))
    return float(parts.sum()) / size if size > 0 else 0.0


def places(clamping: Clamping) -> NDArray[np.int64]:
    """Return in how many places each site clamps."""
    place = clamping.steps // PLACE_STEPS
    is_new = np.ones(len(place), dtype=bool)
    is_new[1:] = place[1:] != place[:-1]
    # Where a site begins in the place in which the one before it ends, that is another's place.
    is_new[clamping.starts[:-1][clamping.counts() > 0]] = True
    before = np.concatenate([[0], np.cumsum(is_new)])
    return before[clamping.starts[1:]] - before[clamping.starts[:-1]]


def _clamped(clamping: Clamping, site: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    own = slice(clamping.starts[site], clamping.starts[site + 1])
    return clamping.steps[own], score_weights(clamping.errors[own]).astype(np.float64)


def _periods(schedule: Schedule, clamping: Clamping, site: int) -> list[float]:
    """Return the periods of loss, learning rate and this site's clamping."""
    dense = np.zeros(clamping.length)
    dense[_clamped(clamping, site)[0]] = 1.0
    own = find_repeat(dense)
    return [*schedule.periods, *([] if own is None else [own])]


def _seen(clamping: Clamping, site: int, max_lag: int) -> list[NDArray[np.bool_]]:
    """Return whether clamping preceded each step, by window and level as it is weighed."""
    first = int(clamping.first_lags[site])
    levels = clamp_levels(clamping, np.array([site]))
    windows = sorted({min(first + SHORT_LAGS - 1, max_lag), max_lag})
    found = [window_max(levels, first, last)[0] for last in windows]
    return [each >= level for each in found for level in range(1, len(TOP_SHARES) + 1)]


def _after_jumps(onset: int, schedule: Schedule) -> NDArray[np.int64]:
    """Return the steps as long after other jumps as `onset` is after its own; none if far."""
    last = int(np.searchsorted(schedule.jumps, onset, side="right")) - 1
    if not schedule.near[onset]:
        return schedule.jumps[:0]
    own = schedule.jumps[max(last, 0)]
    return schedule.jumps[schedule.jumps != own] + (onset - own)


def _tail(
    seen: NDArray[np.bool_], onsets: NDArray[np.int64], alike: Sequence[NDArray[np.int64]]
) -> float:
    """Return the chance of as many hits, each onset's own chance being that at steps alike."""
    usual = float(seen.mean())
    left = np.ones(1)  # left[h]: chance of h hits so far
    for others in alike:
        inside = others[(others >= 0) & (others < len(seen))]
        share = (float(seen[inside].sum()) + 0.5) / (len(inside) + 1) if len(inside) else usual
        chance = max(share, usual)
        left = np.convolve(left, [1 - chance, chance])
    return float(left[int(seen[onsets].sum()) :].sum())
