"""Is a scaling state an average of several?

A scale is the inverse of an amax, and the mean of inverses is not the inverse of the mean: in a
state of one model scale and history say the same, in an average of unequal ones they do not. So no
key has to mark a state, and any arithmetic over the values of a state_dict shows. Where they agree
to rounding, the averaged scale is as right as each of its own.

A state may have been saved under another format, margin or window: then scale times amax is the
largest value of a format and a power of two. Rounding to bfloat16 says no more than that allows.
"""

import math

import torch
from torch import Tensor

from unclamp.formats import FORMATS

EPSILONS = 8
"""Roundings by which scale and history may differ."""
HALF = 0.5
"""The mantissa of a power of two."""


def is_average(scale: Tensor, history: Tensor, made: Tensor) -> Tensor:
    """Return whether saved scales and histories cannot be of one state, 0-d bool.

    Shapes: `scale` and `made`, what the loader makes of the history, `[scales]`; `history`
    `[scales, length]`, newest first. Where nothing was measured, nothing can be said.
    """
    if not history.shape[-1]:
        return torch.zeros((), dtype=torch.bool, device=made.device)
    coarse = max(_epsilon(scale), _epsilon(history), torch.finfo(torch.float32).eps)
    scale, history = scale.to(made), history.to(made)
    near = EPSILONS * coarse

    def is_near(a: Tensor, b: Tensor | float) -> Tensor:
        return (a - b).abs() <= near * b

    peak, newest = history.amax(-1), history[:, 0]
    is_known = (scale > 0) & scale.isfinite() & (peak > 0) & peak.isfinite()
    may_be = is_near(scale, made) | (scale.frexp().mantissa == HALF)
    for amax in (peak, newest):
        landed = (scale * amax).frexp().mantissa
        for largest in sorted({math.frexp(fmt.max)[0] for fmt in FORMATS.values()}):
            may_be |= is_near(landed, largest)
    return (is_known & ~may_be).any()


def is_fraction(updates: float) -> bool:
    """Whether a number of updates is none: an average's, and not one that was rounded."""
    return abs(updates - round(updates)) > 1e-6 * max(abs(updates), 1.0)


def _epsilon(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.dtype.is_floating_point else 0.0
