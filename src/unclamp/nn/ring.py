"""Amax histories as rings: an update writes one number a row, and reads few.

Each row is a ring of its own with a cursor, because a row that measured nothing must keep what
it has. To find the largest amax of a window without reading all of it, the ring is cut into
chunks of about the square root of its length, and each chunk's largest amax is kept:

    age in chunks      last .............. 1      0
                    [a b c d] [e f g h] [i j k l] [m n . .]      n is the newest, at the cursor
    window of 11:         d    e f g h   i j k l   m n           the maxima of three whole chunks,
                                                                 and the end of the oldest one

So the cost grows with the square root of the history's length. All of it runs on the device
without a look at it, inside of a CUDA graph too. The outside sees histories newest first.

Rows lie side by side in memory, entries of one age together: most rows measure at every update,
their cursors move in step, and what an update touches is a few contiguous lines.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ONE_CHUNK = 64
"""Histories up to this length are read whole."""


@dataclass(frozen=True)
class _Place:
    """Where each row's cursor stands: in which chunk, and where in it."""

    chunk: Tensor
    offset: Tensor


class Ring:
    """The last `length` amaxes of each row, 0 where nothing was measured yet."""

    @torch.inference_mode(False)  # its tensors have no version, and could not train
    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        # Powers of two, so that a remainder, which is slow, is a mask.
        bits = max(length - 1, 0).bit_length()
        self._bits = bits if length <= ONE_CHUNK else (bits + 1) // 2
        self._size, self._chunks = 1 << self._bits, 1 << (bits - self._bits)
        self._capacity = self._size * self._chunks
        float32, int64 = ({"dtype": d, "device": device} for d in (torch.float32, torch.int64))
        self._entries = torch.zeros(self._capacity, rows, **float32)
        # The largest entry of each chunk; of the one that is being written, since it began.
        self._peaks = torch.zeros(self._chunks, rows, **float32)
        self._cursor = torch.full((rows,), self._capacity - 1, **int64)
        self._chunk_numbers = torch.arange(self._chunks, **int64).unsqueeze(1)
        self._offsets = torch.arange(self._size, **int64).unsqueeze(1)
        self._within_chunk = self._offsets * rows + torch.arange(rows, **int64)

    def push(self, newest: Tensor, measured: Tensor) -> None:
        """Enter each row's newest amax where it `measured` one, a bool a row."""
        self._cursor.copy_((self._cursor + measured) & (self._capacity - 1))
        cursor = self._cursor.unsqueeze(0)
        # A row that measured nothing writes what it has once more.
        value = torch.where(measured, newest, self._entries.gather(0, cursor))
        self._entries.scatter_(0, cursor, value)
        if self._chunks == 1:
            return
        place = self._place()
        chunk = place.chunk.unsqueeze(0)
        peak = torch.maximum(self._peaks.gather(0, chunk), value)
        self._peaks.scatter_(0, chunk, torch.where(place.offset == 0, value, peak))

    def amax(self, window: Tensor) -> Tensor:
        """Return the largest of the newest `window[i]` amaxes of each row, `[rows]`."""
        if self._chunks == 1:
            age = (self._cursor - self._offsets) & (self._size - 1)
            return torch.where(age < window, self._entries, 0).amax(0)
        place = self._place()
        inside = self._oldest_whole_chunk(place, window)
        whole = torch.where(self._ages_of_chunks(place) <= inside, self._peaks, 0).amax(0)
        entries, ages = self._chunk_of_age(place, inside + 1)
        part = torch.where((ages >= 0) & (ages < window), entries, 0).amax(0)
        return torch.maximum(whole, part)

    def age_of(self, amax: Tensor, window: Tensor) -> Tensor:
        """Return how many updates ago each row's `amax` was the newest, int32 `[rows]`.

        The newest of equals in the row's window counts, 1 for the last update; 0 where there is
        none.
        """
        place = self._place()
        if self._chunks == 1:
            entries = self._entries
            ages = (self._cursor - self._offsets) & (self._size - 1)
        else:
            inside = self._oldest_whole_chunk(place, window)
            chunks = self._ages_of_chunks(place)
            holds = (self._peaks == amax) & (chunks <= inside)
            newest = torch.where(holds, chunks, inside + 1).to(torch.int32).amin(0)
            entries, ages = self._chunk_of_age(place, newest)
        found = (ages >= 0) & (ages < window) & (entries == amax)
        age = torch.where(found, ages, self._capacity).to(torch.int32).amin(0)
        return torch.where(age < self._capacity, age + 1, 0)

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
        self._entries[:, rows] = entries
        self._peaks[:, rows] = entries.view(self._chunks, self._size, len(rows)).amax(1)
        self._cursor[rows] = self._capacity - 1

    def _place(self) -> _Place:
        return _Place(self._cursor >> self._bits, self._cursor & (self._size - 1))

    def _ages_of_chunks(self, place: _Place) -> Tensor:
        """Return how many chunks before the newest one each chunk was begun, `[chunks, rows]`."""
        return (place.chunk - self._chunk_numbers) & (self._chunks - 1)

    def _oldest_whole_chunk(self, place: _Place, window: Tensor) -> Tensor:
        """Return the age of the oldest chunk that lies in the window whole; -1 if none does."""
        return (window - 1 - place.offset) >> self._bits

    def _chunk_of_age(self, place: _Place, age: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chunk of this age of each row, and its entries' ages: `[size, rows]`.

        In the newest chunk, entries beyond the cursor are not of this round: their age is
        negative. They are those of a chunk whose age is the number of chunks.
        """
        first = ((place.chunk - age) & (self._chunks - 1)) << self._bits
        at = first * self.rows + self._within_chunk
        entries = self._entries.view(-1).index_select(0, at.view(-1)).view_as(at)
        return entries, (age << self._bits) + place.offset - self._offsets
