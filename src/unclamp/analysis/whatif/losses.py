"""What a scale loses of a tensor of which only a histogram is known: with an interval.

    clamped      elements with |x| * scale above the format's overflow limit
    clamp error  sum of (|x| - max / scale)**2 over these, over the sum of x**2
    underflow    non-zero elements with |x| * scale at most half of the smallest subnormal

The interval assumes nothing of where a bin's elements lie but what is known (`bounds`). The
estimate takes a shape within each bin (`unclamp.analysis.whatif.spread`).
"""

from dataclasses import dataclass

import numpy as np

from unclamp.analysis.whatif.bounds import Bin, of_count, of_removed
from unclamp.analysis.whatif.spread import Spread
from unclamp.analysis.whatif.tilted import share_below, upper_part
from unclamp.formats import Format
from unclamp.totals import share

ROUNDING = 1e-12
"""Elements that become zero are a difference of two numbers: a share below this is its rounding."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure a cast, and between what it lies: `[rows]` each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What casts lose.

    Attributes:
        clamped: Elements clamped.
        clamp_error: Share of the squares that clamping removes.
        underflow: Share of the non-zero elements that become zero.
    """

    clamped: Estimate
    clamp_error: Estimate
    underflow: Estimate


def losses(spread: Spread, scale: np.ndarray, fmt: Format) -> Losses:
    """Return what scales lose of tensors.

    Args:
        spread: The tensors' elements.
        scale: Of each, `[rows]`; above 0.
        fmt: The format.

    Numerics: float64. An amax of 0, or no elements, loses nothing.
    """
    limit, most = fmt.overflow_limit / scale, fmt.max / scale
    total, tiny = spread.total, _above(spread, fmt.min_subnormal / 2 / scale)
    removed = _removed(spread, limit, most)
    value, low, high = spread.squares
    gone = total - tiny.value
    return Losses(
        clamped=_above(spread, limit),
        clamp_error=Estimate(
            value=np.minimum(share(removed.value, value), 1),
            low=share(removed.low, high),
            high=np.minimum(share(removed.high, low), 1),
        ),
        underflow=Estimate(
            value=share(np.where(gone > ROUNDING * total, gone, 0), total),
            low=share(total - tiny.high, total),
            high=share(total - tiny.low, total),
        ),
    )


def _above(spread: Spread, limit: np.ndarray) -> Estimate:
    """Count elements above a limit: in bins wholly above, in the bin that it cuts, at the amax."""
    column = spread.column_of(limit)
    unit, cut = spread.unit(column), spread.drawn(column)
    one = (spread.amax > limit).astype(np.float64)
    beyond = spread.beyond(spread.low, unit.after).number + one
    fewest, most = of_count(unit.bin, limit)
    shape, place = _shape(cut, limit)
    value = spread.beyond(spread.middle, column + 1).number + one * (1 + spread.at_amax)
    value = value + cut.number * (1 - share_below(shape, place))
    total = spread.total
    return _between(value, np.minimum(beyond + fewest, total), np.minimum(beyond + most, total))


def _removed(spread: Spread, limit: np.ndarray, most: np.ndarray) -> Estimate:
    """Sum up (x - most)**2 over elements above a limit, likewise."""
    column = spread.column_of(limit)
    unit, cut = spread.unit(column), spread.drawn(column)
    one = (spread.amax > limit) * np.square(spread.amax - most)
    least, largest = of_removed(unit.bin, limit, most)
    shape, place = _shape(cut, limit)
    at = cut.low[:, None] + (cut.high - cut.low)[:, None] * upper_part(shape, place)
    of_cut = cut.number * (1 - share_below(shape, place))
    of_cut = of_cut * np.square(at - most[:, None]).mean(1)
    beyond = spread.beyond(spread.middle, column + 1).about(most)
    return _between(
        beyond + of_cut + one * (1 + spread.at_amax),
        spread.beyond(spread.low, unit.after).about(most) + least + one,
        spread.beyond(spread.high, unit.after).about(most) + largest + one,
    )


def _between(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Estimate:
    """Return an estimate that its own interval holds: what is known stands above a shape."""
    return Estimate(value=np.clip(value, low, high), low=low, high=high)


def _shape(cut: Bin, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where a bin's mean and a limit lie in it, from 0 at its lower edge to 1."""
    width = cut.high - cut.low
    place = np.where(width > 0, share(limit - cut.low, width), 1)
    return np.clip(share(cut.mean - cut.low, width), 0, 1), np.clip(place, 0, 1)
