"""The fused kernels (numba), where this machine can run them, and the memory that they work in."""

import ctypes
import functools
import mmap
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unclamp.errors import UnclampWarning


@functools.cache
def fused() -> Any:
    """Return the fused kernels, or None with one warning where numba cannot compile them."""
    try:
        from unclamp.numerics import compiled, cpu  # noqa: PLC0415  # numba is slow to import

        compiled.announce()
        cpu.warm_up()
    except Exception as error:
        warnings.warn(
            f"casts on the CPU run in plain torch, many times slower: numba failed ({error!r})",
            UnclampWarning,
            stacklevel=4,
        )
        return None
    return cpu


class _Workspace(threading.local):
    """A thread's buffers by slot, each as large as was ever asked for."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_workspace = _Workspace()


@torch.inference_mode(False)
def borrow(slot: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `size` elements of the calling thread, on the CPU, valid until the slot's next use.

    Fresh memory costs a page fault every 4 kB, which for large tensors is several times the cast.
    """
    buffer = _workspace.buffers.get(slot)
    if buffer is None or buffer.numel() < size:
        _workspace.buffers[slot] = buffer = torch.empty(size, dtype=dtype, device="cpu")
    return buffer[:size]


HUGE = 2**25
"""Bytes from which on an allocator asks the system for memory each time."""
_MADV_HUGEPAGE = 14


def large(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return memory to be filled, in the dtype and on the device of a tensor.

    Large memory of the CPU is asked for in huge pages, where the system has them (Linux): a fault
    every 2 MB in place of one every 4 kB, which for a gradient of a bank cost as much as its casts.
    """
    x = like.new_empty(shape)
    if (
        x.device.type == "cpu"
        and type(x) is Tensor
        and x.nbytes >= HUGE
        and (advise := _advise()) is not None
    ):
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = x.data_ptr() + x.nbytes - start
        advise(start, length - length % mmap.PAGESIZE, _MADV_HUGEPAGE)
    return x


@functools.cache
def _advise() -> Any:
    """Return libc's `madvise`; None where there is none."""
    if sys.platform != "linux":
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
