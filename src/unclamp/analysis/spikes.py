"""Where a loss jumps up: one-sided, against the local level, with a robust spread.

At each step the level is the median of the latest points that were no spikes, and the spread is
the median absolute deviation of past points from their own level. Medians, so that a spike
hides neither itself nor its neighbour; the local level, so that a decaying loss raises no alarm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL_POINTS = 9
SPREAD_POINTS = 100
FIRST_POINTS = 16
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """Consecutive steps far above the local level.

    Attributes:
        onset: First step.
        peak: Step of the largest value; the first non-finite one where there is one.
        end: Last step.
        height: Peak over the level before it, a ratio; Inf for a non-finite loss.
    """

    onset: int
    peak: int
    end: int
    height: float


def find_spikes(
    values: Sequence[float],
    *,
    steps: Sequence[int] | None = None,
    threshold: float = 8.0,
    min_height: float = 1.1,
) -> list[Spike]:
    """Return the upward spikes of a positive series such as a loss.

    Args:
        values: One a step. A NaN or Inf is a spike and enters no level.
        steps: Their step numbers; 0, 1, ... without them.
        threshold: Robust standard deviations above the local level.
        min_height: Least ratio of a spike to the level.

    Numerics: empty or short series have no spikes but non-finite ones.
    """
    numbers = list(range(len(values))) if steps is None else list(steps)
    calm: list[float] = []
    deviations: list[float] = []
    spikes: list[Spike] = []
    previous_is_spike = False
    for step, value in zip(numbers, values, strict=True):
        level = float(np.median(calm[-LEVEL_POINTS:])) if calm else float("nan")
        is_spike = not np.isfinite(value)
        if not is_spike and len(calm) >= FIRST_POINTS:
            recent = np.asarray(deviations[-SPREAD_POINTS:])
            spread = NORMAL_MAD * float(np.median(np.abs(recent - np.median(recent))))
            # A spike that has begun ends at half its thresholds: one spike stays one.
            ease = 0.5 if previous_is_spike else 1.0
            rises = value - level > ease * threshold * spread
            is_spike = rises and value / level - 1 > ease * (min_height - 1)
        if is_spike:
            height = float(value / level) if np.isfinite(value) else float("inf")
            spikes = _extend(spikes, step, height, joins=previous_is_spike)
        else:
            if calm:
                deviations.append(value - level)
            calm.append(float(value))
        previous_is_spike = is_spike
    return spikes


def _extend(spikes: list[Spike], step: int, height: float, *, joins: bool) -> list[Spike]:
    if not joins:
        return [*spikes, Spike(onset=step, peak=step, end=step, height=height)]
    last = spikes[-1]
    higher = height > last.height
    grown = Spike(
        onset=last.onset,
        peak=step if higher else last.peak,
        end=step,
        height=max(height, last.height),
    )
    return [*spikes[:-1], grown]
