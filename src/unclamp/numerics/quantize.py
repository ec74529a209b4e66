"""The cast of a tensor, by the path that is fastest for it: fused on a CPU, Triton on a GPU, else
plain torch.

All give the same bits (`tests/numerics/test_fused.py`, `test_gpu.py`); sums of squares agree to
1e-6 on a CPU, and 1e-5 on a GPU.
"""  # noqa: D205

import functools
from types import ModuleType

import torch
from torch import Tensor

from unclamp.formats import Format
from unclamp.numerics import panels
from unclamp.numerics.cast import check_types, quantize_in_torch
from unclamp.numerics.fused import borrow, fused
from unclamp.numerics.gpu import goes_to_gpu
from unclamp.numerics.paths import Path, path_of
from unclamp.numerics.record import CastPlan, Quantized
from unclamp.scaling import PER_TENSOR, Granularity


def quantize(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None = None,
    *,
    granularity: Granularity = PER_TENSOR,
    axis: int = -1,
    margin: int = 0,
    power_of_two: bool = False,
    guard: bool = False,
    values: Tensor | None = None,
    out: Tensor | None = None,
    turned: bool = False,
) -> Quantized:
    """Cast a tensor and count what the cast lost.

    Args:
        x: Any shape, float32, bfloat16 or float16 (float64 is rounded to float32 first).
        fmt: The format of the codes.
        scale: float32, the scale to use, in the shape of `Quantized.scale_inv`. None takes it
            from `x` itself (dynamic scaling), and so does a scale of 0, which stands for
            "nothing measured yet": the choice is made on the device. Others lie in
            [2**-126, 2**126].
        granularity: Which elements share a scale.
        axis: The axis that the GEMM contracts: the last, or either one of a matrix.
        margin: Powers of two of headroom of a scale taken from `x`; none with `guard`.
        power_of_two: Whether a scale taken from `x` is a power of two; under `MX` always.
        guard: Where the given scale would saturate a finite element, take the scale from `x`,
            without margin, and count the cast as re-cast.
        values: Contiguous float32 with as many elements as `x`, to be filled with what the codes
            decode to. Only the fused path does; whether it did is seen by `Quantized.values`.
        out: Contiguous uint8 with as many elements as `x`, where the fused path puts the codes;
            in fresh memory without it.
        turned: Give a matrix's codes in column-major memory too, `Quantized.turned`: on a GPU out
            of the same read, elsewhere as a copy.

    On a GPU the codes of blocks along a matrix's first axis lie in column-major memory.

    Numerics: amax is over finite elements; with none of them, or all zero, a scale taken from
    `x` is 1. NaN stays NaN, Inf saturates; both count as non-finite and as nothing else. An
    empty tensor gives empty codes and amax -1.

    Raises:
        UnsupportedError: `x` is not a floating-point tensor, or another argument has a wrong type.
        ValueError: Blocks along an axis that the tensor does not have, a scale that is not one a
            block, or memory to be filled that is not as told above.
    """
    check_types(x, fmt, scale)
    check_memory("values", values, x, torch.float32)
    check_memory("out", out, x, torch.uint8)
    plan = CastPlan(
        format=fmt, granularity=granularity, margin=margin, power_of_two=power_of_two, guard=guard
    )
    q = quantize_by(x, plan, scale, axis, values=values, out=out, turned=turned)
    return with_turned(q) if turned else q


def with_turned(q: Quantized) -> Quantized:
    """Return a cast of a matrix with its codes in column-major memory too, if it has not."""
    return q._replace(turned=_turned(q.codes)) if q.turned is None else q


def check_memory(name: str, given: Tensor | None, x: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError unless memory that compiled code is to fill is as large as it thinks."""
    if given is None:
        return
    fits = given.dtype == dtype and given.is_contiguous() and given.device == x.device
    if not fits or given.numel() != x.numel():
        raise ValueError(
            f"expected {name} as contiguous {str(dtype)[6:]} of {x.numel()} elements on "
            f"{x.device}, got {str(given.dtype)[6:]} {list(given.shape)} on {given.device}"
        )


def quantize_by(
    x: Tensor,
    plan: CastPlan,
    scale: Tensor | None,
    axis: int,
    *,
    values: Tensor | None = None,
    out: Tensor | None = None,
    turned: bool = False,
    slot: str | None = None,
    keeps_codes: bool = True,
    is_whole: bool = True,
    measured: bool = False,
    apart: bool = False,
    shows_wild: bool = False,
) -> Quantized:
    """Cast as a plan says; see `quantize`. `turned` is for GPUs: elsewhere nothing is copied.

    With a `slot` values come too where they are cheap, in the workspace of that name: they last
    until the slot is used again. Without `keeps_codes` so do the codes. Without `is_whole` only
    small tensors have values: a GEMM decodes larger ones by panels. `measured` says that the
    scale is hardly 0, "nothing measured yet": on a GPU that saves a launch. With `apart` no two
    results on a GPU share memory. With `shows_wild` NaN takes the place of `scale_inv` where an
    element is not finite, if the kernel can do it: `Quantized.shows_wild` says whether it does.
    """
    path = path_of(x)
    if path is Path.NUMBA:
        if slot is not None:
            has_values = is_whole or x.numel() <= panels.ONE_PANEL
            values = borrow(slot, x.numel()) if has_values else None
            out = None if keeps_codes else borrow(f"{slot} codes", x.numel(), torch.uint8)
        return fused().quantize(x, plan, scale, axis, values=values, out=out)
    if path is Path.TRITON:
        return _by_triton(
            x, plan, scale, axis,
            turned=turned, measured=measured, apart=apart, shows_wild=shows_wild,
        )  # fmt: skip
    q = _in_torch(x, plan, scale, axis)
    return with_turned(q) if turned and goes_to_gpu(x) else q


@functools.cache  # an import that is made already takes a microsecond, in each cast
def _kernels() -> tuple[ModuleType, ModuleType]:
    # Triton is imported where there is something for it to do.
    from unclamp.numerics.gpu import cast, cast_blocks  # noqa: PLC0415

    return cast, cast_blocks


def _by_triton(
    x: Tensor, plan: CastPlan, scale: Tensor | None, axis: int, *,
    turned: bool, measured: bool, apart: bool, shows_wild: bool,
) -> Quantized:  # fmt: skip
    cast, cast_blocks = _kernels()
    if plan.granularity.is_whole:
        return cast.quantize(
            x, plan, scale, axis,
            turned=turned, measured=measured, apart=apart, shows_wild=shows_wild,
        )  # fmt: skip
    made = cast_blocks.quantize(x, plan, scale, axis, turned=turned)
    q = _in_torch(x, plan, scale, axis) if made is None else made
    return with_turned(q) if turned else q


def _in_torch(x: Tensor, plan: CastPlan, scale: Tensor | None, axis: int) -> Quantized:
    """Cast in plain torch; on a GPU codes lie as the kernels there would have laid them."""
    q = quantize_in_torch(x, plan, scale, axis)
    is_turned = x.ndim == 2 and axis in (0, -2) and not plan.granularity.is_whole
    return q._replace(codes=_turned(q.codes)) if is_turned and goes_to_gpu(x) else q


def _turned(codes: Tensor) -> Tensor:
    """Return a copy of a matrix of codes in column-major memory."""
    raw = codes.view(torch.uint8).t().contiguous() if codes.is_contiguous() else codes.t().clone()
    return raw.view(codes.dtype).t()
