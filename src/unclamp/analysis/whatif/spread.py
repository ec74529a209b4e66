"""Where the elements of tensors lie, as far as their histograms tell: on a grid of quarter octaves.

An inspected cast has its elements by octave and, since logs have them, by quarter of the six
highest octaves, with each quarter's mean. What is known of an octave or a quarter bounds what lies
in it (`Spread.unit`, for `bounds`); the element at the amax is known, and stands for itself.

The estimate needs more (`Spread.drawn`):

- A quarter with a mean has the shape of `tilted`. Tails fall, so where the mean of the quarter that
  holds the amax lies above its middle by more than chance, elements lie at the amax itself, as
  those of a clamped tensor do: as many as explain the mean, beside a uniform rest.
- Below, and in older logs everywhere, a smooth line goes through what is known, the number of
  elements above each power of two: on logarithmic axes, monotone (`PchipInterpolator`), in older
  logs down to the one element at the amax. Its quarters have their means from that line.
"""

from dataclasses import dataclass, fields

import numpy as np
from scipy.interpolate import PchipInterpolator

from unclamp.analysis.whatif.bounds import Bin, of_squares
from unclamp.analysis.whatif.tilted import mean_square
from unclamp.totals import share

PARTS = 4
"""Columns of the grid an octave."""
CHANCE = 4.0
"""Standard deviations by which the mean of uniform places is above 1/2 by chance."""
PIECES = 4
"""Places a column at which a line through octaves is looked at."""
_PLACES = 1 + np.arange(PARTS * PIECES) / (PARTS * PIECES)


@dataclass(frozen=True, kw_only=True)
class Quarters:
    """Quarters of the highest octaves of tensors, on the grid of `Spread`.

    Attributes:
        counts: Elements, `[rows, columns]`.
        sums: Sum of |x| of each.
        first: First column of each row of which they are known, `[rows]`; `columns` for none. It
            begins an octave.
    """

    counts: np.ndarray
    sums: np.ndarray
    first: np.ndarray

    @classmethod
    def none(cls, rows: int, columns: int) -> "Quarters":
        """Return those of logs that have none."""
        empty = np.zeros((rows, columns))
        return cls(counts=empty, sums=empty, first=np.full(rows, columns))


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over elements beyond a column: of 1, of |x|, of x**2, `[rows]` each."""

    number: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def about(self, most: np.ndarray) -> np.ndarray:
        """Return the sum of (|x| - most)**2."""
        return np.maximum(self.second - 2 * most * self.first + most**2 * self.number, 0)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Number, sum and sum of squares of each column's elements, `[rows, columns]` each."""

    number: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def beyond(self) -> "Columns":
        """Return the sums from each column on, with a last column of nothing."""
        return Columns(**{each.name: _summed(getattr(self, each.name)) for each in fields(self)})

    def of(self, rows: np.ndarray, column: np.ndarray) -> Sums:
        """Return those of a column of each row."""
        return Sums(
            number=self.number[rows, column],
            first=self.first[rows, column],
            second=self.second[rows, column],
        )


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is known of the bin that a column belongs to: a quarter, or a whole octave.

    Attributes:
        bin: Edges, number and mean.
        after: First column behind it, `[rows]`.
    """

    bin: Bin
    after: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where the elements of tensors lie; all but the one at the amax of each.

    Attributes:
        amax: Largest element, `[rows]`.
        total: Elements, with that one, `[rows]`.
        at_amax: Further elements at the amax, by the estimate, `[rows]`.
        edges: Of the grid, `[columns + 1]`.
        number: Elements by the estimate, `[rows, columns]`.
        mean: Their means by the estimate, likewise.
        known: What is known of units, each at its first column: number, sum.
        fine: First column of each row whose quarter is known, `[rows]`.
        middle: Sums from a column on by the estimate, `[rows, columns + 1]`.
        low: The least that they can be.
        high: The most.
    """

    amax: np.ndarray
    total: np.ndarray
    at_amax: np.ndarray
    edges: np.ndarray
    number: np.ndarray
    mean: np.ndarray
    known: np.ndarray
    known_mean: np.ndarray
    fine: np.ndarray
    middle: Columns
    low: Columns
    high: Columns

    @classmethod
    def of(
        cls, counts: np.ndarray, lowest: int, amax: np.ndarray, quarters: Quarters | None = None
    ) -> "Spread":
        """Return it for tensors.

        Args:
            counts: Elements by floor(log2 |x|), `[rows, exponents]`.
            lowest: Exponent of the first column.
            amax: Largest element, `[rows]`.
            quarters: Those of the same exponents, `[rows, exponents * PARTS]`; None for none.
        """
        rows, octaves = counts.shape
        columns = octaves * PARTS
        if quarters is None:
            quarters = Quarters.none(rows, columns)
        octave = np.exp2(lowest + np.arange(octaves + 1, dtype=np.float64))
        edges = np.append((octave[:-1, None] * (1 + np.arange(PARTS) / PARTS)).ravel(), octave[-1])
        fine = np.arange(columns) >= quarters.first[:, None]
        top = np.clip(np.searchsorted(edges, amax, side="right") - 1, 0, columns - 1)
        known, known_mean = _known(counts, quarters, fine, top, amax)
        high = _upper(edges[1:], edges[:-1], amax)
        drawn, mean = _drawn(counts, lowest, amax, quarters.first)
        drawn = np.where(fine, known, drawn)
        mean = np.clip(np.where(fine & (known > 0), known_mean, mean), edges[:-1], high)
        at_amax = _at_amax(drawn, mean, fine, edges, amax, top)
        low_sums, high_sums = _ends(edges, amax, fine, known, known_mean)
        return cls(
            amax=amax,
            total=counts.sum(1),
            at_amax=at_amax,
            edges=edges,
            number=drawn,
            mean=mean,
            known=known,
            known_mean=known_mean,
            fine=quarters.first,
            middle=_middle(drawn, mean, edges[:-1], high).beyond(),
            low=low_sums.beyond(),
            high=high_sums.beyond(),
        )

    def rows(self, wanted: np.ndarray) -> "Spread":
        """Return some rows."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in parts.items():
            if isinstance(value, Columns):
                each = {f.name: getattr(value, f.name)[wanted] for f in fields(value)}
                parts[name] = Columns(**each)
            elif name != "edges":
                parts[name] = value[wanted]
        return Spread(**parts)

    @property
    def squares(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sum of squares: by the estimate, the least, and the most."""
        value, low, high = (
            each.second[:, 0] + self.amax**2 for each in (self.middle, self.low, self.high)
        )
        return value + self.at_amax * self.amax**2, low, high

    def column_of(self, limit: np.ndarray) -> np.ndarray:
        """Return the column that each row's limit lies in; -1 before the first."""
        return np.searchsorted(self.edges, limit, side="right") - 1

    def beyond(self, sums: Columns, column: np.ndarray) -> Sums:
        """Return sums from a column of each row on."""
        last = len(self.edges) - 1
        return sums.of(np.arange(len(self.amax)), np.clip(column, 0, last))

    def drawn(self, column: np.ndarray) -> Bin:
        """Return a column of each row by the estimate; without elements outside of the grid."""
        return self._bin(self.number, self.mean, column, column + 1)

    def unit(self, column: np.ndarray) -> Unit:
        """Return the bin that a column of each row belongs to."""
        is_fine = column >= self.fine
        begin = np.where(is_fine, column, column // PARTS * PARTS)
        after = np.where(is_fine, column + 1, begin + PARTS)
        return Unit(bin=self._bin(self.known, self.known_mean, begin, after), after=after)

    def _bin(self, number: np.ndarray, mean: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Bin:
        last = len(self.edges) - 1
        inside = (begin >= 0) & (begin < last)
        begin, end = np.clip(begin, 0, last - 1), np.clip(end, 1, last)
        rows, low = np.arange(len(self.amax)), self.edges[begin]
        return Bin(
            low=low,
            high=np.clip(self.amax, low, self.edges[end]),
            number=np.where(inside, number[rows, begin], 0),
            mean=mean[rows, begin],
        )


def _upper(upper: np.ndarray, lower: np.ndarray, amax: np.ndarray) -> np.ndarray:
    return np.clip(amax[:, None], lower, upper)


def _known(
    counts: np.ndarray, quarters: Quarters, fine: np.ndarray, top: np.ndarray, amax: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return number and mean of each unit at its first column, without the element at the amax."""
    rows = np.arange(len(amax))
    whole = np.zeros(fine.shape)
    whole[:, ::PARTS] = counts
    number = np.where(fine, quarters.counts, whole)
    sums = quarters.sums.copy()
    place = np.where(fine[rows, top], top, top // PARTS * PARTS)
    number[rows, place] = np.maximum(number[rows, place] - 1, 0)
    sums[rows, place] -= amax
    return number, np.where(fine & (number > 0), share(sums, number), np.nan)


def _ends(
    edges: np.ndarray, amax: np.ndarray, fine: np.ndarray, number: np.ndarray, mean: np.ndarray
) -> tuple[Columns, Columns]:
    """Return the least and the most that the sums of units can be, each at its first column."""
    begin = np.arange(len(edges) - 1)
    end = np.where(fine, begin + 1, np.minimum(begin // PARTS * PARTS + PARTS, len(edges) - 1))
    low = np.broadcast_to(edges[:-1], fine.shape)
    each = Bin(low=low, high=_upper(edges[end], low, amax), number=number, mean=mean)
    means, squares = each.means(), of_squares(each)
    least, most = (
        Columns(number=number, first=number * first, second=number * second)
        for first, second in zip(means, squares, strict=True)
    )
    return least, most


def _middle(number: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> Columns:
    width = high - low
    squares = mean_square(np.clip(share(mean - low, width), 0, 1))
    second = low**2 + 2 * low * (mean - low) + width**2 * squares
    return Columns(number=number, first=number * mean, second=number * second)


def _at_amax(
    number: np.ndarray,
    mean: np.ndarray,
    fine: np.ndarray,
    edges: np.ndarray,
    amax: np.ndarray,
    top: np.ndarray,
) -> np.ndarray:
    """Take the elements that lie at the amax out of its quarter, in place, and return them."""
    rows = np.arange(len(amax))
    low, many = edges[top], number[rows, top]
    place = share(mean[rows, top] - low, np.maximum(amax - low, 0))
    sure = (place - 0.5) * np.sqrt(12 * np.maximum(many, 0)) > CHANCE
    found = np.where(sure & fine[rows, top], many * np.clip(2 * place - 1, 0, 1), 0)
    number[rows, top] -= found
    mean[rows, top] = np.where(found > 0, (low + amax) / 2, mean[rows, top])
    return found


def _drawn(
    counts: np.ndarray, lowest: int, amax: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return number and mean of each column by a line through octaves, `[rows, columns]` each."""
    rows, octaves = counts.shape
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    known = np.log(np.maximum(np.concatenate([above, np.zeros((rows, 1))], 1), 1))
    places = np.append((np.arange(octaves)[:, None] + np.log2(_PLACES)).ravel(), octaves)
    line = PchipInterpolator(np.arange(octaves + 1), known, axis=1)
    pieces = -np.diff(np.exp(line(places)))
    for row in np.flatnonzero((first == octaves * PARTS) & (above[:, 0] > 0)):
        pieces[row] = _to_amax(above[row], places, np.log2(amax[row]) - lowest)
    # What max(..., 1) made of an octave without elements above: nothing lies there.
    pieces = np.where(np.repeat(counts > 0, PARTS * PIECES, axis=1), np.maximum(pieces, 0), 0)
    edges = np.exp2(lowest + places)
    low, high = edges[:-1], _upper(edges[1:], edges[:-1], amax)
    shape = (rows, octaves * PARTS, PIECES)
    number = pieces.reshape(shape).sum(2)
    return number, share((pieces * (low + high) / 2).reshape(shape).sum(2), number)


def _to_amax(above: np.ndarray, places: np.ndarray, end: float) -> np.ndarray:
    """Return the elements between places of a tensor, by a line that ends at its amax.

    What rounding leaves of the amax's own octave lies in its pieces below the amax.
    """
    top = int(np.flatnonzero(above)[-1])
    known = np.append(np.arange(top + 1), max(end, top + 1e-6))
    line = PchipInterpolator(known, np.log(np.append(np.maximum(above[: top + 1], 1), 1)))
    number = np.where(places < known[-1], np.exp(line(np.minimum(places, known[-1]))), 1)
    return -np.diff(number)


def _summed(values: np.ndarray) -> np.ndarray:
    out = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values[:, ::-1], axis=1, out=out[:, -2::-1])
    return out
