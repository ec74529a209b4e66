"""Memory that is zero before a kernel and zero after it: what programs of a launch count in.

The last program of a launch to finish adds up what all of them found. It is known by a counter,
and puts that back to 0 for the next launch, so that nobody has to clear it: a clearing would be
one more launch a cast.

Two launches that run at once must not share a slot. Those of one stream run one after another, so
a stream has one slot. A launch that goes into a CUDA graph may be replayed on any stream, so it
has a slot of its own for as long as the process lives.
"""

import functools
import itertools
import threading

import torch
from torch import Tensor

from unclamp.numerics.gpu import is_capturing

WORDS = 4
"""int32 numbers of a slot: 16 bytes, so that every slot is aligned alike, and compiled for once."""
SLOTS = 1 << 16
"""Slots of a device, 1 MiB; whoever comes later has memory that is cleared each time."""


class Slots:
    """The slots of one device."""

    def __init__(self, device: torch.device) -> None:
        self._memory = _zeros_beside_pools(device)
        self._next = itertools.count()  # counts whole even among threads
        self._of_stream: dict[int, Tensor] = {}

    def of_stream(self, stream: int) -> Tensor:
        """Return the slot of a stream, int32 `[WORDS]`."""
        slot = self._of_stream.get(stream)
        if slot is None:
            slot = self._of_stream.setdefault(stream, self.fresh())
        return slot

    def fresh(self) -> Tensor:
        """Return a slot that nobody else has, int32 `[WORDS]`."""
        number = next(self._next)
        if number >= SLOTS:
            return self._memory.new_zeros(WORDS)
        return self._memory[number * WORDS : (number + 1) * WORDS]


def slot_for(device: torch.device) -> Tensor:
    """Return the slot of a launch on a device's current stream, int32 `[WORDS]`, all zero."""
    if device.type != "cuda":
        return _slots(device).of_stream(threading.get_ident())
    index = torch.cuda.current_device() if device.index is None else device.index
    if not is_capturing():
        return _slots(torch.device("cuda", index)).of_stream(
            torch.cuda.current_stream(index).cuda_stream
        )
    if index not in _WITH_SLOTS:  # a graph cannot hold memory that is made for good
        return torch.zeros(WORDS, dtype=torch.int32, device=device)
    return _slots(torch.device("cuda", index)).fresh()


_WITH_SLOTS: set[int] = set()
"""Devices that have their slots."""


@functools.cache
def _slots(device: torch.device) -> Slots:
    made = Slots(device)
    if device.type == "cuda":
        _WITH_SLOTS.add(device.index)
    return made


def _zeros_beside_pools(device: torch.device) -> Tensor:
    """Return the memory, made by a thread of its own: a CUDA graph that is about to be captured
    may have this thread's allocations, and would take them along when it ends.
    """  # noqa: D205
    made: list[Tensor] = []

    def make() -> None:
        made.append(torch.zeros(SLOTS * WORDS, dtype=torch.int32, device=device))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once in a process

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
