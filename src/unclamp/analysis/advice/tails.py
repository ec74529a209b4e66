"""What the past of a run says of its future: a trend, and a tail with an interval.

*Trend*: clamped casts are counted in windows of at least a history's length, since those within
one are not independent, and Kendall's tau of count and time is tested.

*Tail*: how far amaxes outrun their histories is fitted with a generalised Pareto distribution of
log2(overshoot) (peaks over a threshold, which is 1x), by probability-weighted moments (Hosking and
Wallis 1987, Technometrics 29(3)), which for few values are better than the likelihood. The
interval is of what will be seen, the largest of the casts to come: bootstrap over steps for what is
not known of the tail, and a drawn largest for what chance adds. Its upper end takes no tail to end
(shape 0 or above), since few values cannot show that one does; value and lower end may. It is a
forecast up to ten times as many steps as were seen.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST_EXCEEDANCES = 50
"""Clamped steps below which no tail is fitted."""
SUPPORTED = 10
"""Times as many steps as a log has, up to which a fitted tail is a forecast."""
WINDOWS = 20
BOOTSTRAPS = 1000
MOST_OCTAVES = 60.0
"""A forecast beyond is none: nothing bounds it."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Whether clamped casts become more.

    Attributes:
        rates: Clamped casts a step, in windows of time.
        p: Two-sided, of Kendall's tau; 1 where it cannot be told.
        tau: In [-1, 1]; above 0 they become more.
    """

    rates: tuple[float, ...]
    p: float
    tau: float


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The largest overshoot that is to be expected.

    Attributes:
        steps: Within so many further steps; fewer than asked for where no forecast reaches those.
        value: Median of the largest.
        low: 2.5 % of what may be seen lie below.
        high: 2.5 % lie above.
        asked: Steps that were asked about.
    """

    steps: int
    value: float
    low: float
    high: float
    asked: int

    @property
    def reaches(self) -> bool:
        """Whether the forecast reaches what was asked."""
        return self.steps >= self.asked


def trend(step: np.ndarray, *, first: int, last: int, shortest: int) -> Trend:
    """Return whether events at these steps become more frequent.

    Args:
        step: Of each event.
        first: First step of the log.
        last: Its last.
        shortest: Steps of a window, at least.
    """
    windows = min(WINDOWS, (last - first + 1) // max(shortest, 1))
    if windows < 5 or not len(step):
        return Trend(rates=(), p=1.0, tau=0.0)
    edges = np.linspace(first, last + 1, windows + 1)
    counts, _ = np.histogram(step, edges)
    rates = counts / np.diff(edges)
    if (counts == counts[0]).all():
        return Trend(rates=tuple(rates.tolist()), p=1.0, tau=0.0)
    tau, p = stats.kendalltau(np.arange(windows), counts)
    return Trend(rates=tuple(rates.tolist()), p=float(p), tau=float(tau))


def tail(
    step: np.ndarray, overshoot: np.ndarray, *, steps: int, ahead: int, seed: int = 0
) -> Tail | None:
    """Return the largest overshoot of the steps to come; None where too few were seen.

    Args:
        step: Step of each clamped cast.
        overshoot: Its overshoot, above 1.
        steps: Steps of the log.
        ahead: Steps to come.
        seed: Of the bootstrap.
    """
    if not len(step):
        return None
    clamped, where = np.unique(step, return_inverse=True)
    largest = np.zeros(len(clamped))
    np.maximum.at(largest, where, np.log2(overshoot))
    if len(clamped) < LEAST_EXCEEDANCES or ahead < 1:
        return None
    asked, ahead = ahead, min(ahead, SUPPORTED * steps)
    generator = np.random.default_rng(seed)
    numbers = np.maximum(generator.poisson(len(largest), BOOTSTRAPS), LEAST_EXCEEDANCES // 2)
    drawn = [
        (generator.choice(largest, number), number / steps * ahead, chance)
        for number, chance in zip(
            numbers.tolist(), generator.uniform(size=BOOTSTRAPS).tolist(), strict=True
        )
    ]
    value = _largest(largest, len(largest) / steps * ahead, 0.5, may_end=True)
    low = np.quantile([_largest(*each, may_end=True) for each in drawn], 0.025)
    high = np.quantile([_largest(*each, may_end=False) for each in drawn], 0.975)
    return Tail(
        steps=ahead,
        value=_times(value),
        low=_times(float(low)),
        high=_times(float(high)),
        asked=asked,
    )


def _times(octaves: float) -> float:
    return 2.0 ** min(octaves, MOST_OCTAVES)


def _largest(octaves: np.ndarray, expected: float, chance: float, *, may_end: bool) -> float:
    """Return the value that the largest of as many as are expected has this chance to stay below.

    In powers of two; of `n` the largest lies below x with probability F(x)**n.
    """
    shape, scale = _fitted(octaves, may_end=may_end)
    beyond = -math.expm1(math.log(chance) / max(expected, 1.0))
    octaves_beyond = -math.log(beyond)
    if shape == 0:
        return scale * octaves_beyond
    return scale * math.expm1(shape * octaves_beyond) / shape


def _fitted(octaves: np.ndarray, *, may_end: bool) -> tuple[float, float]:
    """Return shape and scale of a generalised Pareto distribution; shape above 0: a heavy tail."""
    ordered, count = np.sort(octaves), len(octaves)
    mean = float(ordered.mean())
    weight = 1 - (np.arange(1, count + 1) - 0.35) / count
    second = float((weight * ordered).mean())
    shape = 2 - mean / (mean - 2 * second) if mean > 2 * second else 0.0
    if shape >= 1 or (shape < 0 and not may_end):
        shape = 0.0
    return shape, mean * (1 - shape)
