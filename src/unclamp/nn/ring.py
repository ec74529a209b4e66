"""Amax histories as rings: an update writes one number a row, and reads few.

Each row is a ring of its own with a cursor, because a row that measured nothing must keep what
it has. To find the largest amax of a window without reading all of it, largest amaxes are kept of
every 16 entries or so, and again of every 16 of those, up to a level that can be read whole:

    level 1    [         7] [         9] [   5]     the largest of four entries each
    level 0      0  2  7  1   3  1  9  4   5  2     the newest is 2; its unit has two so far
                          |---- window ----|
    the window's largest: of its whole units on level 1, 9 and 5, and of what is left below, 1

So the cost grows with the logarithm of a history's length. All of it runs on the device without a
look at it, inside of a CUDA graph too. The outside sees histories newest first.

Rows lie side by side in memory, entries of one age together: most rows measure at every update,
their cursors move in step, and what an update touches is a few contiguous lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ONE_LEVEL_BITS = 6
"""Histories of up to 2**6 entries are read whole."""
LEVEL_BITS = 4
"""Of longer ones, at most 2**4 units of a level are read: few enough that no operation on a
thousand rows is worth a second thread, whose start may wait for a busy core."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    """The largest amaxes of units of entries; of the unit that is being written, since it began.

    Attributes:
        peaks: The largest amax of each unit, `[units, rows]`.
        bits: A unit has `2**bits` entries.
        width: `2**width` units make one of the level above; of the top level, all of them.
        slots: The numbers of so many units, `[2**width, 1]`.
        places: Where so many units lie, counted from the first, `[2**width, rows]`.
    """

    peaks: Tensor
    bits: int
    width: int
    slots: Tensor
    places: Tensor


@dataclass(frozen=True)
class _Window:
    """What is looked at of each row: from its newest position to its oldest, both inside.

    Positions count on from lap to lap: the newest one is a lap ahead of the cursor, so that the
    oldest one is not negative.
    """

    newest: Tensor
    oldest: Tensor


@dataclass(frozen=True)
class _View:
    """The part of a level that a window's answer is in.

    Attributes:
        peaks: The largest amaxes of some units, `[some, rows]`.
        ages: How many units before the newest one each is, `[some, rows]`.
        is_inside: Whether all that a unit has so far lies in the window.
        last: The newest unit, `[rows]`.
        below: The unit, one before the first inside, in which the window's oldest entries are.
    """

    peaks: Tensor
    ages: Tensor
    is_inside: Tensor
    last: Tensor
    below: Tensor


class Ring:
    """The last `length` amaxes of each row, 0 where nothing was measured yet."""

    @torch.inference_mode(False)  # its tensors have no version, and could not train
    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        # A power of two, so that a remainder, which is slow, is a mask.
        self._bits = max(length - 1, 0).bit_length()
        self._capacity = 1 << self._bits
        self._cursor = torch.full((rows,), self._capacity - 1, dtype=torch.int64, device=device)
        self._levels = [self._level(bits, width, device) for bits, width in _levels_of(self._bits)]

    def _level(self, bits: int, width: int, device: torch.device) -> _Level:
        slots = torch.arange(1 << width, dtype=torch.int64, device=device).unsqueeze(1)
        row = torch.arange(self.rows, dtype=torch.int64, device=device)
        units = self._capacity >> bits
        return _Level(
            peaks=torch.zeros(units, self.rows, dtype=torch.float32, device=device),
            bits=bits,
            width=width,
            slots=slots,
            places=slots * self.rows + row,
        )

    @property
    def _entries(self) -> Tensor:
        return self._levels[-1].peaks

    def push(self, newest: Tensor, measured: Tensor) -> None:
        """Enter each row's newest amax where it `measured` one, a bool a row."""
        self._cursor.copy_((self._cursor + measured) & (self._capacity - 1))
        cursor = self._cursor.unsqueeze(0)
        # A row that measured nothing writes what it has once more.
        value = torch.where(measured, newest, self._entries.gather(0, cursor))
        self._entries.scatter_(0, cursor, value)
        for level in self._levels[:-1]:
            unit, begins = cursor >> level.bits, (cursor & ((1 << level.bits) - 1)) == 0
            peak = torch.maximum(level.peaks.gather(0, unit), value)
            level.peaks.scatter_(0, unit, torch.where(begins, value, peak))

    def amax(self, window: Tensor) -> Tensor:
        """Return the largest of the newest `window[i]` amaxes of each row, `[rows]`."""
        span = self._window(window)
        largest, above = None, None
        for level in self._levels:
            view = self._view(level, span, above)
            found = torch.where(view.is_inside, view.peaks, 0).amax(0)
            largest = found if largest is None else torch.maximum(largest, found)
            above = view.below
        assert largest is not None
        return largest

    def age_of(self, amax: Tensor, window: Tensor) -> Tensor:
        """Return how many updates ago each row's `amax` was the newest, int64 `[rows]`.

        The newest of equals in the row's window counts, 1 for the last update; 0 where there is
        none.
        """
        span = self._window(window)
        unit, is_held = None, torch.zeros_like(amax, dtype=torch.bool)
        for level in self._levels:
            view = self._view(level, span, unit)
            holds = view.is_inside & (view.peaks == amax)
            # Where no whole unit holds it, only the window's oldest entries can.
            unit = torch.where(holds, view.last - view.ages, view.below).max(0).values
            is_held = holds.any(0)
        assert unit is not None
        return torch.where(is_held, span.newest - unit + 1, 0)

    def newest(self, rows: Tensor, length: int) -> Tensor:
        """Return a copy of some rows' newest amaxes, newest first: `[len(rows), length]`."""
        ages = torch.arange(length, device=self._cursor.device)
        at = (self._cursor[rows].unsqueeze(1) - ages) & (self._capacity - 1)
        return self._entries[at, rows.unsqueeze(1)]

    def write(self, rows: Tensor, newest: Tensor) -> None:
        """Replace the histories of some rows: `newest` is `[len(rows), n]`, newest first.

        What is longer than the ring loses its oldest, what is shorter is filled up with zeros.
        """
        oldest_first = newest[:, : self.length].to(self._entries).flip(1).t()
        missing = self._capacity - len(oldest_first)
        entries = torch.cat([oldest_first.new_zeros(missing, len(rows)), oldest_first])
        for level in self._levels:
            units = entries.view(len(level.peaks), 1 << level.bits, len(rows))
            level.peaks[:, rows] = units.amax(1)
        self._cursor[rows] = self._capacity - 1

    def _window(self, length: Tensor) -> _Window:
        newest = self._cursor + self._capacity
        return _Window(newest, newest - length + 1)

    def _view(self, level: _Level, window: _Window, above: Tensor | None) -> _View:
        """Return what a window wants of a level: of the unit `above` it, or of all at the top.

        An entry of an earlier lap than its place suggests is never inside, for a window is no
        longer than a lap.
        """
        last = window.newest >> level.bits
        below = (window.oldest - 1) >> level.bits
        if above is None:
            peaks = level.peaks
            ages = (last - level.slots) & (len(peaks) - 1)
            is_inside = ages < last - below
        else:
            begin = above << level.width
            places = (begin & (len(level.peaks) - 1)) * self.rows + level.places
            peaks = level.peaks.view(-1).index_select(0, places.view(-1)).view_as(places)
            ages = last - begin - level.slots
            is_inside = (ages >= 0) & (ages < last - below)
        return _View(peaks, ages, is_inside, last, below)


def _levels_of(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the bits of a level's units, and of how many make one above; coarsest first."""
    count = 1 if bits <= ONE_LEVEL_BITS else -(-bits // LEVEL_BITS)
    for level in reversed(range(count)):
        low, high = bits * level // count, bits * (level + 1) // count
        yield low, high - low
