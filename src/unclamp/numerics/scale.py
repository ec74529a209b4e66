"""From an amax to the scale that multiplies.

    scale = fmt.max / amax / 2**margin

so that the largest element lands on the largest representable value, `margin` powers of two
below it. Rounding in float32 may put `amax * scale` one ulp past `fmt.max`; that is far below
the overflow limit, and nothing is lost by it.

A *power-of-two* scale is the exact quotient rounded down to a power of two. Down, because a
scale that is too large overflows; exact, because a logarithm taken in float32 may round across
a whole number and give the next power. So it is taken from exponents and mantissas:

    max = M * 2**m, amax = A * 2**a, M and A in [1/2, 1)
    floor(log2(max / amax)) = m - a - (1 if A > M else 0)
"""

import math

import torch
from torch import Tensor

from unclamp.reference import SCALE_MAX, SCALE_MIN
from unclamp.scaling import MAX_SCALE_EXPONENT

FLOAT32_BIAS = 127
FLOAT32_MANTISSA_BITS = 23


def scale_from_amax(
    amax: Tensor,
    format_max: float | Tensor,
    *,
    margin: float | Tensor = 0,
    power_of_two: bool | Tensor = False,
    previous: Tensor | None = None,
) -> Tensor:
    """Return `format_max / amax / 2**margin` in float32, elementwise.

    Shapes: `amax`, and whatever of the other arguments is a tensor, broadcast together.

    Args:
        amax: Largest absolute finite values, any floating dtype.
        format_max: `Format.max`, or one a row.
        margin: Powers of two of headroom.
        power_of_two: Round down to a power of two; a bool, or one a row.
        previous: What to keep where `amax` says nothing; 1 without it.

    Numerics: where `amax` is 0, NaN or Inf the result is `previous`. Elsewhere it is kept in
    [2**-126, 2**126], so that scale and 1 / scale are both normal float32. Empty in, empty out.
    Equal, bit for bit, to `unclamp.reference.scale_from_amax`.
    """
    amax = amax.to(torch.float32)
    known = (amax > 0) & (amax < torch.inf)
    if not isinstance(power_of_two, Tensor) and power_of_two:
        scale = _floor_power_of_two(format_max, amax, margin)
    else:
        # Numbers stay numbers: as tensors they would be copied to the device, which waits.
        headroom = torch.exp2(-margin) if isinstance(margin, Tensor) else 2.0**-margin
        # Headroom first: max / amax alone overflows for a tiny amax, and would lose the margin.
        largest = format_max * headroom
        if not isinstance(largest, Tensor):
            largest = torch.full_like(amax, largest)  # number / tensor would be a reciprocal
        scale = (largest / amax).clamp(SCALE_MIN, SCALE_MAX)
        if isinstance(power_of_two, Tensor):
            rounded = _floor_power_of_two(format_max, amax, margin)
            scale = torch.where(power_of_two, rounded, scale)
    return torch.where(known, scale, 1 if previous is None else previous)


def channel_scale(x: Tensor) -> Tensor:
    """Return for each channel the power of two that brings its amax into (1/2, 1].

    Shapes: `x` `[tokens, channels]`; the result float32 `[channels]`.
    Numerics: amax over finite elements; a channel of zeros, or without a finite element, gets 1,
    and the result is kept in [2**-126, 2**126]. Multiplying by it and by its inverse is exact but
    for elements that leave float32's normal range.
    """
    finite = torch.where(x.isfinite(), x, 0)
    amax = finite.abs().amax(0) if x.shape[0] else finite.new_zeros(x.shape[1])
    return scale_from_amax(amax, 1.0, power_of_two=True)


def _floor_power_of_two(maximum: float | Tensor, amax: Tensor, margin: float | Tensor) -> Tensor:
    frexp = torch.frexp if isinstance(maximum, Tensor) else math.frexp
    max_mantissa, max_exponent = frexp(maximum)  # pyright: ignore[reportArgumentType]
    mantissa, exponent = torch.frexp(amax)
    exponent = max_exponent - exponent - (mantissa > max_mantissa).to(torch.int32)
    exponent = exponent - (margin.to(torch.int32) if isinstance(margin, Tensor) else int(margin))
    limited = exponent.clamp(-MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT)
    # From bits: exp2 need not be exact everywhere.
    return ((limited + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS).to(torch.int32).view(torch.float32)
