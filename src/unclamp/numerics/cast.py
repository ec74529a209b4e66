"""The cast to FP8, and what it lost.

    q = round_to_nearest_even(saturate(x * scale))        codes of one byte
    x ~ q * scale_inv                                     what the GEMM sees

Three rules, each against an error that is easy to make:

- The product is taken in float32. A bf16 tensor times a 0-dim float32 scale stays bf16, and the
  second rounding changes one code in twenty.
- Saturation is explicit, before the native cast. What the native cast does with overflow
  differs between formats, torch versions and devices: silent saturation, Inf or NaN.
- *Saturated* means that the correctly rounded value would exceed the largest representable one
  (`Format.overflow_limit`), and not merely that x * scale > max: scaling by amax itself
  overshoots max by a float32 ulp, and that loses nothing.

Non-finite elements never decide a scale. NaN stays NaN, Inf saturates, both are counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.formats import Format
from unclamp.numerics.scale import scale_from_amax
from unclamp.numerics.stats import Stat


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A tensor in FP8: one byte an element and one scale.

    Attributes:
        codes: float8 tensor in the shape of the input.
        scale_inv: 0-d float32; multiplies the codes back to the input's units.
        stats: float64 `[len(Stat)]`, what the cast saw and lost.
    """

    codes: Tensor
    scale_inv: Tensor
    stats: Tensor


def torch_dtype(fmt: Format) -> torch.dtype:
    """Return torch's dtype of a format."""
    return getattr(torch, f"float8_{fmt.name}")


def cast(x: Tensor, scale: Tensor | float, fmt: Format) -> Tensor:
    """Return the codes of `x * scale`: float32 product, saturation, round to nearest even.

    Shapes: `x` any shape; `scale` broadcasts against it. The result has the shape of `x`.
    Numerics: NaN stays NaN; Inf and finite overflow become +-max; empty stays empty.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    return _saturating_cast(_as_float32(x) * scale, fmt)


def dequantize(quantized: Quantized) -> Tensor:
    """Return `codes * scale_inv` in float32, in the shape of the codes."""
    return quantized.codes.to(torch.float32) * quantized.scale_inv


def quantize(x: Tensor, fmt: Format, scale: Tensor | None = None, *, margin: int = 0) -> Quantized:
    """Cast a tensor and count what the cast lost.

    Args:
        x: Any shape, float32, bfloat16 or float16 (float64 is rounded to float32 first).
        fmt: The format of the codes.
        scale: 0-d float32, the scale to use. None takes it from `x` itself (dynamic scaling),
            and so does a scale of 0, which stands for "nothing measured yet": the choice is
            made on the device.
        margin: Powers of two of headroom of a scale taken from `x`.

    Numerics: amax is over finite elements; with none of them, or all zero, a scale taken from
    `x` is 1. NaN stays NaN, Inf saturates; both count as non-finite and as nothing else. An
    empty tensor gives empty codes and amax -1.

    Raises:
        UnsupportedError: `x` is not floating point.
    """
    values = _as_float32(x)
    finite = values.isfinite()
    magnitude = torch.where(finite, values, 0).abs_()
    amax = magnitude.amax() if x.numel() else magnitude.new_zeros(())
    own_scale = scale_from_amax(amax, fmt.max, margin=margin)
    scale = own_scale if scale is None else torch.where(scale > 0, scale, own_scale)
    scale_inv = scale.reciprocal()
    scaled = values * scale
    codes = _saturating_cast(scaled, fmt)
    stats = _statistics(magnitude, scaled.abs_(), finite, amax, scale_inv, own_scale, fmt)
    return Quantized(codes=codes, scale_inv=scale_inv, stats=stats)


def _as_float32(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError(f"expected a floating-point tensor, got {x.dtype}")
    return x.detach().to(torch.float32)


def _saturating_cast(scaled: Tensor, fmt: Format) -> Tensor:
    return scaled.clamp(-fmt.max, fmt.max).to(torch_dtype(fmt))


def _statistics(
    magnitude: Tensor,
    scaled: Tensor,
    finite: Tensor,
    amax: Tensor,
    scale_inv: Tensor,
    own_scale: Tensor,
    fmt: Format,
) -> Tensor:
    """Count from |x| with non-finite elements zeroed (`magnitude`) and |x * scale| (`scaled`)."""
    elements = finite.numel()
    saturated = (scaled > fmt.overflow_limit) & finite
    # Half the smallest value is a tie and goes to the even neighbour, zero.
    vanishing = torch.count_nonzero(scaled <= fmt.min_subnormal / 2)
    zeros = elements - torch.count_nonzero(magnitude)
    nonfinite = elements - torch.count_nonzero(finite)
    # Squares are summed of values brought to fmt.max by their own scale: float32 squares of raw
    # values overflow from 1.8e19 on, and a float64 copy costs as much as all the rest.
    unit = own_scale.to(torch.float64).reciprocal().square()
    removed = torch.where(saturated, (magnitude - fmt.max * scale_inv) * own_scale, 0)
    square = magnitude.mul_(own_scale).square_().sum()
    fields = {
        Stat.AMAX: torch.where(nonfinite < elements, amax, -1),
        Stat.SCALE_INV: scale_inv,
        Stat.ELEMENTS: zeros.new_tensor(elements),
        Stat.SATURATED: torch.count_nonzero(saturated),
        Stat.UNDERFLOWED: vanishing - (zeros - nonfinite),
        Stat.NONFINITE: nonfinite,
        Stat.RECAST: zeros.new_tensor(0),
        Stat.SQUARE: square * unit,
        Stat.SATURATED_SQUARE: removed.square_().sum() * unit,
        Stat.CASTS: zeros.new_tensor(1),
    }
    return torch.stack([fields[field].to(torch.float64) for field in Stat])
