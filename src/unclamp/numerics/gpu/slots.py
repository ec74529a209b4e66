"""Memory of launches: zeros that programs count in, and scratch for what they find.

Counters are zero before a kernel and zero after it.

The last program of a launch to finish adds up what all of them found. It is known by a counter,
and puts that back to 0 for the next launch, so that nobody has to clear it: a clearing would be
one more launch a cast.

Two launches that run at once must not share a slot. Those of one stream run one after another, so
a stream has one slot. A launch that goes into a CUDA graph may be replayed on any stream, so it
has a slot of its own for as long as the process lives.

Scratch goes the same way: a stream has its own, for every launch that leaves nothing in it for a
later one, and so does each launch that is captured.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.numerics.gpu import is_capturing

WORDS = 4
"""int32 numbers of a slot: 16 bytes, so that every slot is aligned alike, and compiled for once."""
SLOTS = 1 << 16
"""Slots of a device, 1 MiB; whoever comes later has memory that is cleared each time."""
SCRATCH = 6 * 4096
"""float64 numbers of a stream's scratch, 192 KiB; whoever needs more has memory of its own."""


class Room(NamedTuple):
    """What a launch has to itself while it runs: int32 `[WORDS]`, zero, and float64 `[n]`."""

    slot: Tensor
    scratch: Tensor


class Slots:
    """The slots of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = _beside_pools(
            device, lambda: torch.zeros(SLOTS * WORDS, dtype=torch.int32, device=device)
        )
        self._next = itertools.count()  # counts whole even among threads
        self._of_stream: dict[int, Room] = {}

    def of_stream(self, stream: int) -> Room:
        """Return the room of a stream, with `SCRATCH` numbers."""
        room = self._of_stream.get(stream)
        if room is None:
            scratch = _beside_pools(self._device, lambda: _scratch(SCRATCH, self._device))
            room = self._of_stream.setdefault(stream, Room(self.fresh(), scratch))
        return room

    def fresh(self) -> Tensor:
        """Return a slot that nobody else has, int32 `[WORDS]`."""
        number = next(self._next)
        if number >= SLOTS:
            return self._memory.new_zeros(WORDS)
        return self._memory[number * WORDS : (number + 1) * WORDS]


def slot_for(device: torch.device) -> Tensor:
    """Return the slot of a launch on a device's current stream, int32 `[WORDS]`, all zero."""
    shared = _shared(device)
    return _captured_slot(device) if shared is None else shared.slot


def room_for(device: torch.device, numbers: int, *, leaves: bool = False) -> Room:
    """Return the room of a launch on a device's current stream.

    Args:
        device: Where it runs.
        numbers: How many numbers of scratch it needs, at least.
        leaves: Whether it leaves something in its scratch for a later launch: other threads may
            launch on the stream in between.
    """
    shared = _shared(device)
    if shared is None:
        return Room(_captured_slot(device), _scratch(numbers, device))
    if numbers > SCRATCH or leaves:
        return Room(shared.slot, _scratch(numbers, device))
    return shared


def _shared(device: torch.device) -> Room | None:
    """Return the room of a device's current stream; None where it is captured."""
    if device.type != "cuda":
        return _slots(device).of_stream(threading.get_ident())
    if is_capturing():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _slots(torch.device("cuda", index)).of_stream(_stream(index))


def _captured_slot(device: torch.device) -> Tensor:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _WITH_SLOTS:  # a graph cannot hold memory that is made for good
        return torch.zeros(WORDS, dtype=torch.int32, device=device)
    return _slots(torch.device("cuda", index)).fresh()


def _scratch(numbers: int, device: torch.device) -> Tensor:
    return torch.empty(numbers, dtype=torch.float64, device=device)


_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Triton asks it too; torch's public function makes an object for the number."""


def _stream(index: int) -> int:
    """Return the number of a device's current stream."""
    if _raw_stream is not None:
        return _raw_stream(index)
    return torch.cuda.current_stream(index).cuda_stream


_WITH_SLOTS: set[int] = set()
"""Devices that have their slots."""


@functools.cache
def _slots(device: torch.device) -> Slots:
    made = Slots(device)
    if device.type == "cuda":
        _WITH_SLOTS.add(device.index)
    return made


def _beside_pools(device: torch.device, memory: Callable[[], Tensor]) -> Tensor:
    """Return memory, made by a thread of its own: a CUDA graph that is about to be captured
    may have this thread's allocations, and would take them along when it ends.
    """  # noqa: D205
    made: list[Tensor] = []

    def make() -> None:
        made.append(memory())
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once in a process, and a stream

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
