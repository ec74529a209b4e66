"""How fast a loss fell, and how fast compared with another run's: slopes with intervals.

Torch-free.

A straight line is laid through the logarithms of the losses by least squares; its slope is how
fast the loss fell, as a share of itself. A loss does not fall along a straight line, so what the
interval is made of is not the distance from it. It is the noise of the batches around a smooth
curve, neighbours that move together counted as such.

The slope of such a line through a curved fall depends on where the steps lie: a curve is steep at
first. So only losses at the same steps are compared, those of two runs. Two kinds of batches of one
run lie at different steps, and their slopes would differ on one and the same curve.

The ratio of two slopes has Fieller's interval (1954), which is wider the less the other slope is
known, and none where the other loss did not clearly fall.

The interval is over the batches of these runs. What another seed would give is not in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.paired import LEVEL
from unclamp.written import counted, percent, times

Numbers = Sequence[float] | NDArray[Any]
LEAST_BATCHES = 20
CURVE_TERMS = 4
"""Terms of the smooth curve, a cubic in the logarithm of time: a fall is steep at first."""
EARLY = 0.02
"""The logarithm begins after this share of the steps."""
MOST_TOGETHER = 0.95
"""More autocorrelation cannot be told from a trend."""

Verdict = Literal["slower", "faster", "not distinguishable", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class Fall:
    """How fast a loss fell.

    Attributes:
        batches: Losses, count.
        first: Step of the first.
        last: Step of the last.
        slope: Of the logarithm of the loss, a step; below 0 where it falls.
        error: Standard error of the slope.
    """

    batches: int
    first: int
    last: int
    slope: float
    error: float

    @property
    def share(self) -> float:
        """Share of the loss that is gone from the first step to the last; below 0 if it rose."""
        return -math.expm1(self.slope * (self.last - self.first))


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a loss fell compared with another.

    Attributes:
        own: The loss in question.
        other: What it is compared with.
        ratio: Own slope over the other's; NaN where the other did not clearly fall.
        interval: Ends of the ratio's 95 % interval; None likewise.
        verdict: "slower" or "faster" where the whole interval is below or above 1. "cannot tell"
            where there is no interval.
    """

    own: Fall
    other: Fall
    ratio: float
    interval: tuple[float, float] | None
    verdict: Verdict


@dataclass(frozen=True)
class _Line:
    fall: Fall
    noise: NDArray[np.float64]


def measure_fall(steps: Numbers, losses: Numbers) -> Fall | None:
    """Return how fast a loss fell; None for fewer than 20 losses, or one not above 0 or not finite.

    Args:
        steps: Rising.
        losses: One for each.
    """
    line = _line(steps, losses)
    return None if line is None else line.fall


def compare_falls(steps: Numbers, losses: Numbers, other_losses: Numbers) -> Pace | None:
    """Return how fast a loss fell compared with another at the same steps.

    They count as of the same batches, so that noise which both have falls out.

    Args:
        steps: Rising.
        losses: One for each.
        other_losses: One for each.

    Returns:
        The comparison; None where one of them has no slope, as for `measure_fall`.
    """
    own, other = _line(steps, losses), _line(steps, other_losses)
    if own is None or other is None:
        return None
    ratio, interval = _fieller(own.fall, other.fall, _covariance(own, other))
    return Pace(
        own=own.fall,
        other=other.fall,
        ratio=ratio,
        interval=interval,
        verdict=_verdict(interval),
    )


def pace_in_words(pace: Pace, *, own: str, other: str) -> str:
    """Say how fast one loss fell compared with another; no full stop.

    Args:
        pace: The comparison.
        own: What the loss is of, as "batches of kind 'answers'".
        other: What the other is of.
    """
    span = f"from step {pace.own.first:,} on"
    falls = f"{_fell(pace.own)} against {_fell(pace.other)} {span}"
    if pace.interval is None:
        return (
            f"how fast the loss of {own} fell compared with that of {other} cannot be told, since "
            f"the latter did not clearly fall ({falls})"
        )
    low, high = (f"{end:.2g}" for end in pace.interval)
    size = counted(pace.own.batches, "batch", "batches")
    said = f"the loss of {own} fell {times(pace.ratio)} as fast as that of {other}"
    if pace.ratio < 0:
        said = f"the loss of {own} rose while that of {other} fell"
    told = f"{said} (95 %: {low} to {high} over {size}; {falls})"
    if pace.verdict == "not distinguishable":
        return f"{told}, which is not distinguishable from as fast"
    return told


def _fell(fall: Fall) -> str:
    return f"by {percent(fall.share)}" if fall.share >= 0 else f"a rise by {percent(-fall.share)}"


def _line(steps: Numbers, losses: Numbers) -> _Line | None:
    values = np.asarray(losses, dtype=np.float64)
    if len(values) < LEAST_BATCHES or not np.all(np.isfinite(values) & (values > 0)):
        return None
    at, logs = np.asarray(steps, dtype=np.float64), np.log(values)
    centred = at - at.mean()
    weights = centred / (centred @ centred)
    noise = _noise(at, logs)
    fall = Fall(
        batches=len(values),
        first=int(steps[0]),
        last=int(steps[-1]),
        slope=float(weights @ logs),
        error=_error(noise) * math.sqrt(weights @ weights),
    )
    return _Line(fall, noise)


def _noise(at: NDArray[np.float64], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a smooth curve leaves of the logarithms."""
    time = np.log((at - at[0]) / (at[-1] - at[0]) + EARLY)
    terms = np.vander((time - time.mean()) / time.std(), CURVE_TERMS)
    return logs - terms @ np.linalg.lstsq(terms, logs, rcond=None)[0]


def _error(noise: NDArray[np.float64]) -> float:
    """Return the standard deviation of the noise, as much larger as neighbours move together.

    Of first-order autocorrelation r a sum has (1 + r) / (1 - r) times the variance. The curve
    takes slow noise with it, about one part in n a term, which makes r look smaller than it is.
    """
    count = len(noise)
    square = float(noise @ noise)
    if square == 0:
        return 0.0
    seen = float(noise[1:] @ noise[:-1]) / square
    together = min(max(seen + (CURVE_TERMS + 1 + 3 * max(seen, 0.0)) / count, 0.0), MOST_TOGETHER)
    return math.sqrt(square / (count - CURVE_TERMS) * (1 + together) / (1 - together))


def _covariance(own: _Line, other: _Line) -> float:
    """Return the covariance of the slopes of losses of the same batches."""
    size = math.sqrt(float(own.noise @ own.noise) * float(other.noise @ other.noise))
    alike = float(own.noise @ other.noise) / size if size > 0 else 0.0
    return alike * own.fall.error * other.fall.error


def _fieller(own: Fall, other: Fall, shared: float) -> tuple[float, tuple[float, float] | None]:
    from scipy.special import stdtrit  # noqa: PLC0415  # slow to load, seldom needed

    free = own.batches - CURVE_TERMS
    square = float(stdtrit(free, (1 + LEVEL) / 2)) ** 2
    a, b = own.slope, other.slope
    known = b * b - square * other.error**2
    if b >= 0 or known <= 0:
        return math.nan, None
    middle = a * b - square * shared
    rest = a * a - square * own.error**2
    half = math.sqrt(max(middle * middle - known * rest, 0.0)) / known
    return a / b, (middle / known - half, middle / known + half)


def _verdict(interval: tuple[float, float] | None) -> Verdict:
    if interval is None:
        return "cannot tell"
    if interval[1] < 1:
        return "slower"
    return "faster" if interval[0] > 1 else "not distinguishable"
