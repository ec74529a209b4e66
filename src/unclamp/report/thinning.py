"""Curves of any length as at most so many points, with every peak and trough kept."""

from collections.abc import Sequence

import numpy as np

MOST_POINTS = 2_000


def kept_places(*series: Sequence[float | None] | np.ndarray, most: int = MOST_POINTS) -> list[int]:
    """Return the places of a curve's points to draw, rising.

    The curve is cut into buckets of equal numbers of points. Of each bucket the first point, and
    the lowest and the highest of every series, are kept; and its first NaN, Inf or missing value,
    so that a gap stays one. Several series that are drawn together keep the same places.

    Args:
        series: Of equal length.
        most: About how many places to keep.

    Numerics: all places of a curve that has no more than `most`; none of an empty one.
    """
    length = len(series[0])
    if length <= most:
        return list(range(length))
    numbers = [_numbers(one) for one in series]
    buckets = max(1, most // (1 + 2 * len(series)))
    edges = np.linspace(0, length, buckets + 1).astype(int)
    kept = {0, length - 1}
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        kept.add(begin)
        for values in numbers:
            piece = values[begin:end]
            finite = np.isfinite(piece)
            if not finite.all():
                kept.add(begin + int(np.argmin(finite)))
            if finite.any():
                kept.add(begin + int(np.argmin(np.where(finite, piece, np.inf))))
                kept.add(begin + int(np.argmax(np.where(finite, piece, -np.inf))))
    return sorted(kept)


def _numbers(series: Sequence[float | None] | np.ndarray) -> np.ndarray:
    if isinstance(series, np.ndarray):
        return series
    return np.array([np.nan if value is None else value for value in series], dtype=np.float64)
