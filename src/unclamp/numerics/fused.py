"""The fused kernels (numba), where this machine can run them, and the memory that they work in."""

import functools
import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from unclamp.errors import UnclampWarning


@functools.cache
def fused() -> Any:
    """Return the fused kernels, or None with one warning where numba cannot compile them."""
    try:
        from unclamp.numerics import compiled, cpu  # noqa: PLC0415  # numba is slow to import

        with compiled.announced():
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
