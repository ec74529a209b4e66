"""The casts of a log whose exponents were counted, and the scale that a policy gives to each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from unclamp.analysis.whatif.amaxes import Chunk, places_of
from unclamp.analysis.whatif.spread import PARTS, Quarters
from unclamp.runlog import RunLog
from unclamp.runlog.looks import QUARTERED_OCTAVES
from unclamp.runlog.sites import SiteInfo

MOST_ROWS = 8_000
"""Inspected casts that are looked at, spread evenly over steps where there are more."""

COUNT_SQL = """
    SELECT site, count(*) AS n FROM casts
    WHERE exponents IS NOT NULL AND nonfinite < elements AND amax > 0 GROUP BY site"""
SAMPLE_SQL = """
    SELECT step, site, amax, map_keys(exponents) AS exponents, map_values(exponents) AS counts,
        map_keys(quarters) AS quarter_keys, map_values(quarters) AS quarters
    FROM casts WHERE exponents IS NOT NULL AND nonfinite < elements AND amax > 0
        AND hash(step, 7) % $every = 0 ORDER BY step, site"""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """Casts whose exponents are known.

    Attributes:
        place: Which site, `[rows]`.
        step: Which step, `[rows]`.
        amax: Largest finite element, float64 `[rows]`.
        lowest: The smallest exponent of `counts`.
        counts: Elements by floor(log2 |x|), float64 `[rows, exponents]`.
        quarters: Elements of the highest octaves by quarter; of older logs none.
        known: All inspected casts of the log; more than rows where they are a sample.
    """

    place: np.ndarray
    step: np.ndarray
    amax: np.ndarray
    lowest: int
    counts: np.ndarray
    quarters: Quarters
    known: int

    def columns(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows lie in a chunk, and in which of its columns."""
        low, high = chunk.step[chunk.is_there].min(), chunk.step.max()
        rows = np.flatnonzero((self.step >= low) & (self.step <= high))
        columns = np.array(
            [
                np.searchsorted(chunk.step[p, : chunk.counts[p]], s)
                for p, s in zip(self.place[rows], self.step[rows], strict=True)
            ],
            np.int64,
        )
        return rows, columns


def read_inspected(log: RunLog, sites: Sequence[SiteInfo]) -> Inspected:
    """Return the inspected casts of sites, at most about `MOST_ROWS` of the log's."""
    places = places_of(log, sites)
    counts = log.sql(COUNT_SQL).to_pylist()
    known = sum(row["n"] for row in counts if places[row["site"]] >= 0)
    table = log.sql(SAMPLE_SQL, every=max(-(-known // MOST_ROWS), 1))
    place = places[table.column("site").to_numpy()] if len(table) else np.zeros(0, np.int64)
    keep = np.flatnonzero(place >= 0)
    table, place = table.take(pa.array(keep)), place[keep]
    lowest, numbers = _matrix(table)
    return Inspected(
        place=place,
        step=table.column("step").to_numpy(),
        amax=table.column("amax").to_numpy().astype(np.float64),
        lowest=lowest,
        counts=numbers,
        quarters=_quarters(table, lowest, numbers.shape[1]),
        known=known,
    )


def _matrix(table: pa.Table) -> tuple[int, np.ndarray]:
    """Return the counts of rows as a matrix, and the exponent of its first column."""
    keys, values = (table.column(n).combine_chunks() for n in ("exponents", "counts"))
    exponents, numbers = keys.flatten().to_numpy(), values.flatten().to_numpy()
    if not len(exponents):
        return 0, np.zeros((len(table), 1))
    lengths = np.diff(keys.offsets.to_numpy())
    lowest = int(exponents.min())
    counts = np.zeros((len(table), int(exponents.max()) - lowest + 1))
    counts[np.repeat(np.arange(len(table)), lengths), exponents - lowest] = numbers
    return lowest, counts


def _quarters(table: pa.Table, lowest: int, octaves: int) -> Quarters:
    """Return the quarters of rows as matrices, from the first octave that a row has all of."""
    keys, values = (table.column(n).combine_chunks() for n in ("quarter_keys", "quarters"))
    lengths = np.diff(keys.offsets.to_numpy())
    row = np.repeat(np.arange(len(table)), lengths)
    flat = values.flatten()
    elements, means = (flat.field(name).to_numpy() for name in ("elements", "mean"))
    found = Quarters.none(len(table), octaves * PARTS)
    if not len(row):
        return found
    column = keys.flatten().to_numpy().astype(np.int64) - lowest * PARTS
    counts, sums = np.zeros(found.counts.shape), np.zeros(found.counts.shape)
    counts[row, column] = elements
    sums[row, column] = elements * means.astype(np.float64)
    is_last = np.append(row[1:] != row[:-1], True)
    first = found.first.copy()
    first[row[is_last]] = np.maximum(column[is_last] // PARTS - QUARTERED_OCTAVES + 1, 0) * PARTS
    return Quarters(counts=counts, sums=sums, first=first)
