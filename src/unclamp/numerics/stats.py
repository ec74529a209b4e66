"""The statistics of a cast: one float64 vector, made in the pass that casts.

A vector and not an object, so that a step's casts add up on the device without a host
synchronisation. AMAX and SCALE_INV merge by maximum, the other fields by addition; counts stay
exact up to 2**53 elements.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Stat(IntEnum):
    """Position of each statistic in the vector."""

    AMAX = 0
    """Largest absolute finite element; -1 where no finite element was seen."""
    SCALE_INV = 1
    """1 / scale of the cast; over merged casts the largest, so that of the smallest scale."""
    ELEMENTS = 2
    SATURATED = 3
    """Finite elements beyond the overflow limit."""
    UNDERFLOWED = 4
    """Non-zero elements that became zero."""
    NONFINITE = 5
    """NaN and Inf elements."""
    RECAST = 6
    """Casts repeated with the true scale."""
    SQUARE = 7
    """Sum of squares of the finite elements."""
    SATURATED_SQUARE = 8
    """Sum of squares of what saturation removed: (|x| - max / scale)**2 over saturated x."""
    CASTS = 9
    """Casts merged in this vector."""


MERGED_BY_MAX = 2
"""So many fields, the first of the vector (AMAX, SCALE_INV), merge by maximum."""


def empty_stats(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the neutral element of merging, float64 `[rows, len(Stat)]`."""
    stats = torch.zeros(rows, len(Stat), dtype=torch.float64, device=device)
    stats[:, Stat.AMAX] = -1
    return stats


def merge_stats(total: Tensor, stats: Tensor) -> None:
    """Merge the vector `stats` into `total`, in place: maximum and addition."""
    parts = (MERGED_BY_MAX, len(Stat) - MERGED_BY_MAX)
    largest, sums = total.split_with_sizes(parts, -1)
    other, terms = stats.split_with_sizes(parts, -1)
    torch.maximum(largest, other, out=largest)
    sums.add_(terms)


def merged_stats(stats: Tensor) -> Tensor:
    """Return the vectors `[n, len(Stat)]` merged into one; n is 1 or more."""
    largest = stats[:, :MERGED_BY_MAX].amax(0)
    return torch.cat([largest, stats[:, MERGED_BY_MAX:].sum(0)])
