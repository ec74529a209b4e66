"""From an amax to the scale that multiplies.

    scale = fmt.max / amax / 2**margin

so that the largest element lands on the largest representable value, `margin` powers of two
below it. Rounding in float32 may put `amax * scale` one ulp past `fmt.max`; that is far below
the overflow limit, and nothing is lost by it.
"""

import torch
from torch import Tensor

from unclamp.reference import SCALE_MAX, SCALE_MIN


def scale_from_amax(
    amax: Tensor,
    format_max: float | Tensor,
    *,
    margin: float | Tensor = 0,
    previous: Tensor | None = None,
) -> Tensor:
    """Return `format_max / amax / 2**margin` in float32, elementwise.

    Shapes: `amax`, and whatever of the other arguments is a tensor, broadcast together.

    Args:
        amax: Largest absolute finite values, any floating dtype.
        format_max: `Format.max`, or one a row.
        margin: Powers of two of headroom.
        previous: What to keep where `amax` says nothing; 1 without it.

    Numerics: where `amax` is 0, NaN or Inf the result is `previous`. Elsewhere it is kept in
    [2**-126, 2**126], so that scale and 1 / scale are both normal float32. Empty in, empty out.
    Equal, bit for bit, to `unclamp.reference.scale_from_amax`.
    """
    amax = amax.to(torch.float32)
    headroom = torch.exp2(-torch.as_tensor(margin, dtype=torch.float32, device=amax.device))
    maximum = torch.as_tensor(format_max, dtype=torch.float32, device=amax.device)
    # Headroom first: max / amax alone overflows for a tiny amax, and would lose the margin.
    scale = (maximum * headroom / amax).clamp(SCALE_MIN, SCALE_MAX)
    known = (amax > 0) & (amax < torch.inf)
    return torch.where(known, scale, torch.ones_like(scale) if previous is None else previous)
