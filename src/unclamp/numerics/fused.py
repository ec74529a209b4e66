"""Whether the fused kernels (numba) can run: on this machine, and on a tensor."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from unclamp.errors import UnclampWarning


@functools.cache
def fused() -> Any:
    """Return the fused kernels, or None with one warning where numba cannot compile them."""
    try:
        from unclamp.numerics import cpu  # noqa: PLC0415  # numba is slow to import

        cpu.warm_up()
    except Exception as error:
        warnings.warn(
            f"casts on the CPU run in plain torch, many times slower: numba failed ({error!r})",
            UnclampWarning,
            stacklevel=4,
        )
        return None
    return cpu


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is memory of this process, and no stand-in for it."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
