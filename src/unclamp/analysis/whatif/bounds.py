"""Between what a sum over a bin's elements lies, of which number, edges and perhaps mean are known.

With a mean the sharp bounds of a function's sum are its convex envelope from below and its concave
one from above, at the mean (Jensen; attained by elements at two places). Every bound here grows
with the mean, so a mean that was rounded is taken a little lower for the one and a little higher
for the other. Without a mean all elements lie at one edge, or at the other.
"""

from dataclasses import dataclass

import numpy as np

from unclamp.totals import share

ROUNDING = 1e-6
"""Relative error that a logged mean may have: of float32, and without the largest element."""

Bounds = tuple[np.ndarray, np.ndarray]


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return a part over a whole; of no meaning where the whole is not above 0, and finite."""
    return share(part, np.maximum(whole, 0))


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bin of each tensor, `[rows]` each.

    Attributes:
        low: Where it begins.
        high: Where it ends; the amax, if that is in it.
        number: Its elements.
        mean: Their mean; NaN where it is not known.
    """

    low: np.ndarray
    high: np.ndarray
    number: np.ndarray
    mean: np.ndarray

    def means(self) -> Bounds:
        """Return between what the mean lies."""
        known = np.isfinite(self.mean)
        slack = ROUNDING * np.abs(self.mean)
        low = np.where(known, np.clip(self.mean - slack, self.low, self.high), self.low)
        high = np.where(known, np.clip(self.mean + slack, self.low, self.high), self.high)
        return low, high


def of_squares(each: Bin) -> Bounds:
    """Return between what the mean of squares lies."""
    low, high = each.means()
    return low**2, (each.low + each.high) * high - each.low * each.high


def of_count(each: Bin, limit: np.ndarray) -> Bounds:
    """Return between what the number of elements above a limit lies, whole numbers."""
    low, high = each.means()
    inside = (limit >= each.low) & (limit < each.high)
    least = np.where(low > limit, _over(low - limit, each.high - limit), 0.0)
    most = np.where(limit > each.low, _over(high - each.low, limit - each.low), 1.0)
    above = (each.low > limit).astype(np.float64)
    return (
        np.ceil(each.number * np.where(inside, least, above) * (1 - ROUNDING) - ROUNDING),
        np.floor(each.number * np.where(inside, np.minimum(most, 1), above) + ROUNDING),
    )


def of_removed(each: Bin, limit: np.ndarray, most: np.ndarray) -> Bounds:
    """Return between what the sum of (x - most)**2 over elements above a limit lies.

    `most` is at most the limit. The function is 0 up to the limit, jumps to a parabola, and rises.
    """
    low, high = each.means()
    limit = np.clip(limit, each.low, each.high)
    top, edge = np.square(each.high - most), np.square(limit - most)
    # From below: along the parabola, and before it on the line from the limit that touches it.
    touch = np.minimum(2 * limit - most, each.high)
    line = _over(low - limit, touch - limit) * np.square(touch - most)
    least = np.where(low >= touch, np.square(low - most), np.maximum(line, 0))
    # From above: along the lines between the two edges and the top of the jump.
    whole = top * _over(high - each.low, each.high - each.low)
    rising = edge * _over(high - each.low, limit - each.low)
    after = edge + (top - edge) * _over(high - limit, each.high - limit)
    bent = np.where(high <= limit, rising, after)
    cut = limit > each.low
    chord = np.square(each.low - most) + (each.high + each.low - 2 * most) * (high - each.low)
    largest = np.where(cut, np.maximum(whole, bent), chord)
    none = limit >= each.high
    # Elements are whole, so that few of them have fewer ways to lie.
    fewest, at_most = of_count(each, limit)
    least = each.number * np.where(cut, least, np.square(low - most))
    return (
        np.where(none, 0, np.maximum(least, fewest * edge)),
        np.where(none, 0, np.minimum(each.number * largest, at_most * top)),
    )
