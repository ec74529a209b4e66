"""From an amax to the scale that multiplies.

    scale = fmt.max / amax / 2**margin

so that the largest element lands on the largest representable value, `margin` powers of two
below it. Rounding in float32 may put `amax * scale` one ulp past `fmt.max`; that is far below
the overflow limit, and nothing is lost by it. The arithmetic is that of `unclamp.policy`.
"""

import torch
from torch import Tensor

from unclamp.policy import scale_for


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
    # Headroom first: max / amax alone overflows for a tiny amax, and would lose the margin.
    headroom = torch.exp2(-margin) if isinstance(margin, Tensor) else 2.0**-margin
    return scale_for(
        amax.to(torch.float32),
        format_max * headroom,
        power_of_two=power_of_two,
        previous=1 if previous is None else previous,
        xp=torch,
    )


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


def choose_scale(
    scale: Tensor | None, own_scale: Tensor, amax: Tensor, limit: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scale to use, and 1 where a block's given scale would pass the limit."""
    if scale is None:
        return own_scale, own_scale.new_zeros(())
    check_scale(scale, amax.shape)
    scale = scale.detach().to(torch.float32)
    passed = amax * scale > limit
    recast = passed.any() if passed.ndim else passed
    return torch.where((scale > 0) & ~passed, scale, own_scale), recast


def check_scale(scale: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError unless there is a scale for each block."""
    if scale.shape != shape:
        raise ValueError(f"expected a scale for each block, {list(shape)}, got {list(scale.shape)}")
