"""What a scale loses of a tensor of which only the exponents were counted: with an interval.

Elements of an octave may lie anywhere in it. The estimate draws a smooth line through what is
known, the number of elements above each power of two, down to the one element at the amax: on
logarithmic axes, monotone (`scipy.interpolate.PchipInterpolator`). That one counts
exactly. The interval knows of no line: its ends are those of all elements at one edge of their
octave, and of one at the amax.

    clamped      elements with |x| * scale above the format's overflow limit
    clamp error  sum of (|x| - max / scale)**2 over these, over the sum of x**2
    underflow    non-zero elements with |x| * scale at most half of the smallest subnormal
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from unclamp.formats import Format
from unclamp.totals import share

PIECES = 8
"""Parts of an octave in which the estimate places elements."""


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


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where the elements of tensors lie, as far as their exponents tell: `[rows, places]` each.

    Attributes:
        amax: Largest element, `[rows]`.
        low: Places of elements that lie at the lower edge of their octave.
        high: At the upper one, or at the amax.
        counts: How many lie there.
        at: Places by the estimate.
        number: How many lie there, without the one at the amax.
    """

    amax: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray
    at: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, lowest: int, amax: np.ndarray) -> "Spread":
        """Return it for tensors.

        Args:
            counts: Elements by floor(log2 |x|), `[rows, exponents]`.
            lowest: Exponent of the first column.
            amax: Largest element, `[rows]`.
        """
        octaves = np.arange(lowest, lowest + counts.shape[1], dtype=np.float64)
        low = np.broadcast_to(np.exp2(octaves), counts.shape)
        at = np.exp2(lowest + (np.arange(counts.shape[1] * PIECES) + 0.5) / PIECES)
        at = np.minimum(at, amax[:, None])
        number = np.array([_drawn(row, lowest, a) for row, a in zip(counts, amax, strict=True)])
        return cls(
            amax=amax,
            low=low,
            high=np.minimum(2 * low, amax[:, None]),
            counts=counts,
            at=at,
            number=number.reshape(at.shape),
        )

    def rows(self, wanted: np.ndarray) -> "Spread":
        """Return some rows."""
        return Spread(
            amax=self.amax[wanted],
            low=self.low[wanted],
            high=self.high[wanted],
            counts=self.counts[wanted],
            at=self.at[wanted],
            number=self.number[wanted],
        )


def losses(spread: Spread, scale: np.ndarray, fmt: Format) -> Losses:
    """Return what scales lose of tensors.

    Args:
        spread: The tensors' elements.
        scale: Of each, `[rows]`; above 0.
        fmt: The format.

    Numerics: float64. An amax of 0, or no elements, loses nothing.
    """
    amax, limit, most = spread.amax, fmt.overflow_limit / scale, fmt.max / scale
    least = fmt.min_subnormal / 2 / scale
    middle = _sums(spread.number, spread.at, limit, most, least)
    low = _sums(spread.counts, spread.low, limit, most, least)
    high = _sums(spread.counts, spread.high, limit, most, least)
    clamps = (amax > limit).astype(np.float64)
    one = clamps * np.square(np.maximum(amax - most, 0))
    total = spread.counts.sum(1)
    return Losses(
        clamped=Estimate(
            value=middle.clamped + clamps,
            low=np.maximum(low.clamped, clamps),
            high=high.clamped,
        ),
        clamp_error=Estimate(
            value=share(middle.removed + one, middle.square + amax**2),
            low=share(np.maximum(low.removed, one), high.square),
            high=np.minimum(share(high.removed, np.maximum(low.square, amax**2)), 1),
        ),
        underflow=Estimate(
            value=share(middle.zeros, total),
            low=share(high.zeros, total),
            high=share(low.zeros, total),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    clamped: np.ndarray
    removed: np.ndarray
    square: np.ndarray
    zeros: np.ndarray


def _sums(
    number: np.ndarray, at: np.ndarray, limit: np.ndarray, most: np.ndarray, least: np.ndarray
) -> _Sums:
    """Return the sums over elements that lie at certain places, `[rows, places]`."""
    is_clamped = at > limit[:, None]
    removed = np.where(is_clamped, np.square(at - most[:, None]), 0)
    return _Sums(
        clamped=(number * is_clamped).sum(1),
        removed=(number * removed).sum(1),
        square=(number * np.square(at)).sum(1),
        zeros=(number * (at <= least[:, None])).sum(1),
    )


def _drawn(counts: np.ndarray, lowest: int, amax: float) -> np.ndarray:
    """Return the elements in each piece of each octave, `[exponents * PIECES]`.

    What rounding leaves of the amax's own octave lies in its pieces below the amax.
    """
    above = np.cumsum(counts[::-1])[::-1]
    if not above[0]:
        return np.zeros(len(counts) * PIECES)
    top = int(np.flatnonzero(counts)[-1])
    grid = lowest + np.arange(len(counts) * PIECES + 1) / PIECES
    known = np.append(lowest + np.arange(top + 1), max(np.log2(amax), lowest + top + 1e-6))
    line = PchipInterpolator(known, np.log(np.append(np.maximum(above[: top + 1], 1), 1)))
    number = np.where(grid < known[-1], np.exp(line(np.minimum(grid, known[-1]))), 1)
    pieces = -np.diff(number)
    return np.maximum(pieces, 0)
