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

A *guarded* cast compares the true amax, which it measures anyway, with the scale it was given:
where the largest element would saturate, the block's own scale takes the given one's place. The
outcome is a function of tensor and scale alone, so that a recomputed forward repeats it.
"""

import torch
from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.formats import Format
from unclamp.numerics.blocks import block_amax, orient, spread
from unclamp.numerics.fused import fused
from unclamp.numerics.record import CastPlan, Quantized, format_of, torch_dtype
from unclamp.numerics.scale import choose_scale, scale_from_amax
from unclamp.numerics.stats import Stat
from unclamp.scaling import PER_TENSOR, Granularity


def cast(x: Tensor, scale: Tensor | float, fmt: Format) -> Tensor:
    """Return the codes of `x * scale`: float32 product, saturation, round to nearest even.

    Shapes: `x` any shape; `scale` broadcasts against it. The result has the shape of `x`.
    Numerics: NaN stays NaN; Inf and finite overflow become +-max; empty stays empty.
    """
    check_types(x, fmt)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    return _saturating_cast(_as_float32(x) * scale, fmt)


def check_types(x: Tensor, fmt: Format, scale: Tensor | None = None) -> None:
    """Raise an UnsupportedError that names what was expected, where it is something else."""
    if not isinstance(x, Tensor):
        raise UnsupportedError(f"expected a tensor to cast, got {x!r}")
    if not isinstance(fmt, Format):
        raise UnsupportedError(f"expected a Format such as unclamp.E4M3FN, got {fmt!r}")
    if scale is not None and not isinstance(scale, Tensor):
        raise UnsupportedError(f"expected the scale as a float32 tensor, got {scale!r}")


def dequantize(quantized: Quantized) -> Tensor:
    """Return `codes * scale_inv` in float32, in the shape of the codes."""
    q = quantized
    return dequantize_codes(q.codes, q.scale_inv, granularity=q.granularity, axis=q.axis)


def dequantize_codes(
    codes: Tensor, scale_inv: Tensor, *, granularity: Granularity, axis: int
) -> Tensor:
    """Return `codes * scale_inv` in float32; the arguments are attributes of `Quantized`."""
    # Only a matrix, or a contiguous tensor, is oriented as a view that can be scaled in place.
    codes = codes if codes.ndim == 2 else codes.contiguous()
    cpu = fused() if is_memory(codes) and codes.is_contiguous() else None
    if granularity.is_whole:
        if cpu is not None:
            return cpu.decode(codes, format_of(codes.dtype), scale_inv)
        return codes.to(torch.float32).mul_(scale_inv)
    if cpu is not None:
        values = cpu.decode(codes, format_of(codes.dtype), None)
    else:
        values = codes.to(torch.float32)
    oriented = orient(values, axis)
    oriented.mul_(spread(scale_inv, oriented.shape, granularity.block))
    return values


def is_memory(x: Tensor) -> bool:
    """Whether a tensor is memory of this process, and no stand-in for it."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


def quantize_plain(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None = None,
    *,
    granularity: Granularity = PER_TENSOR,
    axis: int = -1,
    margin: int = 0,
    power_of_two: bool = False,
    guard: bool = False,
) -> Quantized:
    """Cast a tensor in plain torch; see `unclamp.numerics.quantize`."""
    plan = CastPlan(
        format=fmt, granularity=granularity, margin=margin, power_of_two=power_of_two, guard=guard
    )
    return quantize_in_torch(x, plan, scale, axis)


def quantize_in_torch(x: Tensor, plan: CastPlan, scale: Tensor | None, axis: int) -> Quantized:
    """Do the same by a plan."""
    fmt, granularity = plan.format, plan.granularity
    values = _as_float32(x).contiguous()
    if not granularity.is_whole:
        values = orient(values, axis)
    block = granularity.block
    finite = values.isfinite()
    magnitude = torch.where(finite, values, 0).abs_()
    amax = _amax(magnitude, granularity)
    own_scale = scale_from_amax(amax, plan.largest, power_of_two=plan.power_of_two)
    limit = fmt.overflow_limit if plan.guard else torch.inf
    used, recast = choose_scale(scale, own_scale, amax, limit)
    scale_inv = used.reciprocal()
    if granularity.is_whole:
        each, each_inv = used, scale_inv
    else:
        each, each_inv = (spread(t, values.shape, block) for t in (used, scale_inv))
    scaled = values * each
    codes = _saturating_cast(scaled, fmt)
    stats = _statistics(magnitude, scaled.abs_(), finite, amax, each_inv, fmt)
    stats[Stat.SCALE_INV] = scale_inv.max() if scale_inv.numel() else 1
    stats[Stat.RECAST] = recast
    seen = stats[Stat.AMAX] >= 0
    return Quantized(
        _as_given(codes, x, granularity, axis),
        scale_inv,
        torch.where(seen, amax, -1),
        stats,
        plan,
        axis,
    )


def _as_float32(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError(f"expected a floating-point tensor, got {x.dtype}")
    return x.detach().to(torch.float32)


def _amax(magnitude: Tensor, granularity: Granularity) -> Tensor:
    if not granularity.is_whole:
        return block_amax(magnitude, granularity.block)
    return magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())


def _as_given(codes: Tensor, x: Tensor, granularity: Granularity, axis: int) -> Tensor:
    """Return oriented codes in the tensor's own shape, contiguous."""
    if not granularity.is_whole:
        codes = orient(codes, axis) if x.ndim == 2 else codes.reshape(x.shape)
    return codes.contiguous()


def _saturating_cast(scaled: Tensor, fmt: Format) -> Tensor:
    return scaled.clamp(-fmt.max, fmt.max).to(torch_dtype(fmt))


def _statistics(
    magnitude: Tensor,
    scaled: Tensor,
    finite: Tensor,
    amax: Tensor,
    scale_inv: Tensor,
    fmt: Format,
) -> Tensor:
    """Count from |x| with non-finite elements zeroed (`magnitude`) and |x * scale| (`scaled`).

    `scale_inv` broadcasts against them; its own statistic is left to the caller.
    """
    elements = finite.numel()
    saturated = (scaled > fmt.overflow_limit) & finite
    # Half the smallest value is a tie and goes to the even neighbour, zero.
    vanishing = torch.count_nonzero(scaled <= fmt.min_subnormal / 2)
    zeros = elements - torch.count_nonzero(magnitude)
    nonfinite = elements - torch.count_nonzero(finite)
    # Squares are summed of values brought to fmt.max by one scale: float32 squares of raw
    # values overflow from 1.8e19 on, and a float64 copy costs as much as all the rest.
    largest = amax.amax() if amax.numel() else amax.new_zeros(())
    common = scale_from_amax(largest, fmt.max)
    unit = common.to(torch.float64).reciprocal().square()
    removed = torch.where(saturated, (magnitude - fmt.max * scale_inv) * common, 0)
    square = magnitude.mul_(common).square_().sum()
    fields = {
        Stat.AMAX: torch.where(nonfinite < elements, largest, -1),
        Stat.SCALE_INV: largest,
        Stat.ELEMENTS: torch.full_like(zeros, elements),
        Stat.SATURATED: torch.count_nonzero(saturated),
        Stat.UNDERFLOWED: vanishing - (zeros - nonfinite),
        Stat.NONFINITE: nonfinite,
        Stat.RECAST: torch.zeros_like(zeros),
        Stat.SQUARE: square * unit,
        Stat.SATURATED_SQUARE: removed.square_().sum() * unit,
        Stat.CASTS: torch.ones_like(zeros),
    }
    return torch.stack([fields[field].to(torch.float64) for field in Stat])
