"""A format's numbers as integer rounding wants them, for the kernels on a CPU and on a GPU.

normal     round the bits to the format's mantissa, ties to even, and shift
subnormal  add 2**(emin - mantissa + 23): the adder rounds; the sum's low bits are the code
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from unclamp.formats import Format


class Layout(NamedTuple):
    """A format's numbers as the kernels want them; see the module's two cases."""

    shift: np.int32
    half: np.int32
    mask: np.int32
    rebias: np.int32
    min_normal_bits: np.int32
    span: np.int32
    """Added to the bits of a power of two, gives the number whose addition rounds what is in it."""
    magic: np.float32
    magic_bits: np.int32
    max: np.float32
    limit: np.float32
    vanishing: np.float32
    nan_code: np.int32
    nan_is_signed: np.int32
    zero_is_signed: np.int32


@cache
def layout(fmt: Format) -> Layout:
    """Return the kernels' numbers for a format."""
    shift = 23 - fmt.mantissa_bits
    magic = np.float32(fmt.min_subnormal * 2.0**23)
    dtype = getattr(torch, f"float8_{fmt.name}")
    nan, minus_nan = torch.tensor([np.nan, -np.nan]).to(dtype).view(torch.uint8).tolist()
    return Layout(
        shift=np.int32(shift),
        half=np.int32((1 << (shift - 1)) - 1),
        mask=np.int32(-(1 << shift)),
        rebias=np.int32((127 - fmt.bias) << fmt.mantissa_bits),
        min_normal_bits=float_bits(fmt.min_normal),
        span=np.int32(shift << 23),
        magic=magic,
        magic_bits=float_bits(magic),
        max=np.float32(fmt.max),
        limit=np.float32(fmt.overflow_limit),
        vanishing=np.float32(fmt.min_subnormal / 2),
        nan_code=np.int32(nan & 0x7F if nan != minus_nan else nan),
        nan_is_signed=np.int32(nan != minus_nan),
        zero_is_signed=np.int32(fmt.has_negative_zero),
    )


def float_bits(value: float | np.float32) -> np.int32:
    """Return the bits of a float32."""
    return np.float32(value).view(np.int32)
