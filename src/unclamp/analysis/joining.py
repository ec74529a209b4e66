"""Records brought into one order of steps, and ranks into one value a step, as arrays.

Which records of a source there are, and what the curve of them is called, is for `curves`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def last_records(steps: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rising steps, and the place of the record of each that counts.

    What was recorded before a later record went back behind it is dropped. Records of which each
    is of an earlier step than the one before were written newest first.
    """
    at, places = steps, np.arange(len(steps))
    if len(at) > 1 and np.all(np.diff(at) < 0):
        at, places = at[::-1], places[::-1]
    if len(at) == 0:
        return at, places
    later = np.minimum.accumulate(at[::-1])[::-1][1:]
    kept = np.flatnonzero(at < np.append(later, np.iinfo(np.int64).max))
    return at[kept], places[kept]


def union(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the steps of any of the parts, each of rising steps; most often they are the same."""
    first, *others = parts
    if all(np.array_equal(first, other) for other in others):
        return first
    every = np.sort(np.concatenate(parts))
    return every[np.append(True, np.diff(every) != 0)]


def by_rank(ranks: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Give the places of the records of each rank, ranks in the order in which they appear."""
    found, first = np.unique(ranks, return_index=True)
    for rank in found[np.argsort(first)]:
        yield np.flatnonzero(ranks == rank)


def means_over_ranks(
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps that any rank recorded, rising, and the mean of those that did.

    Args:
        parts: Rising steps and values of each rank.

    Numerics: NaN or Inf of one rank is that of the step; Inf and -Inf of two are NaN.
    """
    if len(parts) == 1:
        return parts[0]
    steps = np.concatenate([at for at, _ in parts])
    order = np.argsort(steps, kind="stable")  # within a step the ranks keep their order
    values = np.concatenate([numbers for _, numbers in parts])[order]
    found, begins, counts = np.unique(steps[order], return_index=True, return_counts=True)
    means = np.empty(len(found))
    with np.errstate(invalid="ignore"):
        for count in np.unique(counts).tolist():  # rows of equal length are added as each alone
            of_so_many = np.flatnonzero(counts == count)
            rows = values[begins[of_so_many][:, None] + np.arange(count)]
            means[of_so_many] = rows.mean(axis=1)
    return found, means


def column_means(
    steps: NDArray[np.int64], ranks: NDArray[np.int64], column: pa.ChunkedArray
) -> tuple[NDArray[np.int64], list[float | None]]:
    """Return a column of a run log over rising steps, the mean over ranks; null is no record."""
    there = np.flatnonzero(column.is_valid().to_numpy())
    numbers = column.drop_null().to_numpy().astype(np.float64)
    steps, ranks, parts = steps[there], ranks[there], []
    for places in by_rank(ranks):
        at, kept = last_records(steps[places])
        parts.append((at, numbers[places][kept]))
    at, means = means_over_ranks(parts)
    return at, means.tolist()
