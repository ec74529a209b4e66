"""Which way a tensor goes: decided once for a cast, and asked by whoever wants to tell.

    triton    Triton kernels: memory of a GPU, in a dtype that they take
    numba     one pass of compiled code: memory of this process, where numba works
    plain     torch's own operations: everything else, stand-ins for tensors and empty ones too

A GEMM goes the way of its device: a GPU's scaled matmul, or emulated.
"""

from enum import Enum

import torch
from torch import Tensor

from unclamp.numerics.cast import is_memory
from unclamp.numerics.fused import fused
from unclamp.numerics.gpu import goes_to_gpu, has_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What compiled kernels take."""


class Path(Enum):
    """What computes a cast."""

    TRITON = "Triton kernels"
    NUMBA = "one pass, compiled by numba"
    PLAIN = "plain torch operations"


def path_of(x: Tensor) -> Path:
    """Return what casts this tensor, as the machine stands now."""
    if x.dtype not in DTYPES or x.numel() == 0:
        return Path.PLAIN
    if goes_to_gpu(x):
        return Path.TRITON if has_kernels(x) else Path.PLAIN
    return Path.NUMBA if is_memory(x) and fused() is not None else Path.PLAIN
