"""The cast of a tensor, by the path that is fastest for it: fused on a CPU, Triton on a GPU, else
plain torch.

All give the same bits (`tests/numerics/test_fused.py`, `test_gpu.py`); sums of squares agree to
1e-6 on a CPU, and 1e-5 on a GPU.
"""  # noqa: D205

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclamp.formats import Format
from unclamp.numerics.blocks import orient
from unclamp.numerics.cast import (
    Quantized,
    check_scale,
    check_types,
    choose_scale,
    quantize_plain,
    torch_dtype,
)
from unclamp.numerics.fused import fused, is_plain
from unclamp.numerics.gpu import goes_to_gpu, has_kernels
from unclamp.numerics.scale import scale_from_amax
from unclamp.numerics.stats import Stat
from unclamp.reference import float32
from unclamp.reference import scale_from_amax as scalar_scale_from_amax
from unclamp.scaling import MX, PER_TENSOR, Granularity, PerTensor

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    room: Tensor | None = None,
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
        room: Contiguous uint8 with as many elements as `x`, where the fused path puts the codes;
            in fresh memory without it.
        turned: Give a matrix's codes in column-major memory too, `Quantized.turned`: on a GPU out
            of the same read, elsewhere as a copy.

    On a GPU the codes of blocks along a matrix's first axis lie in column-major memory.

    Numerics: amax is over finite elements; with none of them, or all zero, a scale taken from
    `x` is 1. NaN stays NaN, Inf saturates; both count as non-finite and as nothing else. An
    empty tensor gives empty codes and amax -1.

    Raises:
        UnsupportedError: `x` is not a floating-point tensor, or another argument no such thing.
        ValueError: Blocks along an axis that the tensor does not have, or a scale that is not
            one a block.
    """
    check_types(x, fmt, scale)
    settings = {
        "granularity": granularity,
        "axis": axis,
        "margin": margin,
        "power_of_two": power_of_two or isinstance(granularity, MX),
        "guard": guard,
    }
    if goes_to_gpu(x):
        return _on_gpu(x, fmt, scale, turned=turned, **settings)
    q = _off_gpu(x, fmt, scale, values=values, room=room, **settings)
    return replace(q, turned=_turned(q.codes)) if turned else q


def _on_gpu(x: Tensor, fmt: Format, scale: Tensor | None, *, turned: bool, **settings: Any) -> Any:
    """Cast by Triton what it takes; the rest in plain torch, with codes laid out the same way."""
    q = None
    is_whole = isinstance(settings["granularity"], PerTensor)
    if has_kernels(x) and x.dtype in FUSED_DTYPES and x.numel():
        # Triton is imported where there is something for it to do.
        from unclamp.numerics.gpu import cast, cast_blocks  # noqa: PLC0415

        if is_whole:
            own = {key: settings[key] for key in ("margin", "power_of_two", "guard")}
            q = cast.quantize_tensor(x, fmt, scale, turned=turned, **own)
            q = replace(q, axis=settings["axis"])
        else:
            q = cast_blocks.quantize_blocks(x, fmt, scale, turned=turned, **settings)
    if q is None:
        q = quantize_plain(x, fmt, scale, **settings)
        if x.ndim == 2 and settings["axis"] in (0, -2) and not is_whole:
            q = replace(q, codes=_turned(q.codes))
    return replace(q, turned=_turned(q.codes)) if turned and q.turned is None else q


def _turned(codes: Tensor) -> Tensor:
    """Return a copy of a matrix of codes in column-major memory."""
    raw = codes.view(torch.uint8).t().contiguous() if codes.is_contiguous() else codes.t().clone()
    return raw.view(codes.dtype).t()


def _off_gpu(
    x: Tensor, fmt: Format, scale: Tensor | None, *,
    values: Tensor | None, room: Tensor | None, **settings: Any,
) -> Quantized:  # fmt: skip
    granularity = settings["granularity"]
    if not (is_plain(x) and x.dtype in FUSED_DTYPES and x.numel() and fused()):
        return quantize_plain(x, fmt, scale, **settings)
    if isinstance(granularity, PerTensor):
        return _fused_tensor(x, fmt, scale, values=values, room=room, **settings)
    return _fused_blocks(x, fmt, scale, values=values, room=room, **settings)


def _fused_tensor(
    x: Tensor, fmt: Format, scale: Tensor | None, *, values: Tensor | None, room: Tensor | None,
    margin: int, power_of_two: bool, guard: bool, granularity: Granularity, axis: int,
) -> Quantized:  # fmt: skip
    cpu = fused()
    data = x.detach().contiguous().view(1, -1)
    blocks = cpu.Blocks(1, data.shape[1], 1, data.shape[1])
    if scale is not None:
        check_scale(scale, torch.Size())
    settings = {"margin": 0 if guard else margin, "power_of_two": power_of_two}
    used = 0.0 if scale is None else float32(float(scale.detach()))
    recast = False
    if not used > 0:
        used = scalar_scale_from_amax(float(cpu.block_amax(data, blocks)[0, 0]), fmt, **settings)
        guard = False
    made = cpu.cast(data, *_pair(used), blocks, fmt, values=values, room=room)
    if guard and float32(made.amax * used) > fmt.overflow_limit:
        recast = True
        used = scalar_scale_from_amax(made.amax, fmt, **settings)
        made = cpu.cast(data, *_pair(used), blocks, fmt, values=values, room=room)
    (_, inv) = _pair(used)
    amax = made.amax if made.nonfinite < x.numel() else -1.0
    return Quantized(
        codes=made.codes.view(torch_dtype(fmt)).view(x.shape),
        scale_inv=torch.from_numpy(inv).view(()),
        amax=torch.tensor(amax, dtype=torch.float32),
        stats=_stats(made, amax=amax, scale_inv=float(inv[0, 0]), recast=recast),
        granularity=granularity,
        axis=axis,
        values=None if values is None else values.view(x.shape),
    )


def _fused_blocks(
    x: Tensor, fmt: Format, scale: Tensor | None, *, values: Tensor | None, room: Tensor | None,
    margin: int, power_of_two: bool, guard: bool, granularity: Granularity, axis: int,
) -> Quantized:  # fmt: skip
    cpu = fused()
    oriented = orient(x.detach(), axis)  # raises for an axis that is not there
    transposed = x.ndim == 2 and axis in (0, -2)
    data = x.detach().contiguous().view(oriented.shape[::-1] if transposed else oriented.shape)
    across, along = (
        size if block is None else block
        for size, block in zip(oriented.shape, granularity.block, strict=True)
    )
    rows, columns = data.shape
    blocks = cpu.Blocks(rows, columns, *((along, across) if transposed else (across, along)))
    amax = torch.from_numpy(cpu.block_amax(data, blocks))
    amax = amax.t() if transposed else amax
    own = scale_from_amax(amax, fmt.max, margin=0 if guard else margin, power_of_two=power_of_two)
    used, recast = choose_scale(scale, own, amax, fmt.overflow_limit if guard else torch.inf)
    inv = used.reciprocal()
    grids = [(t.t() if transposed else t).contiguous().numpy() for t in (used, inv)]
    made = cpu.cast(data, *grids, blocks, fmt, values=values, room=room)
    is_seen = made.nonfinite < x.numel()
    return Quantized(
        codes=made.codes.view(torch_dtype(fmt)).view(x.shape),
        scale_inv=inv.contiguous(),
        amax=amax.contiguous() if is_seen else torch.full_like(inv, -1),
        stats=_stats(
            made,
            amax=made.amax if is_seen else -1.0,
            scale_inv=float(inv.max()),
            recast=bool(recast),
        ),
        granularity=granularity,
        axis=axis,
        values=None if values is None else values.view(x.shape),
    )


def _pair(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return one scale and its inverse, float32 `[1, 1]`."""
    value = np.full((1, 1), scale, np.float32)
    with np.errstate(divide="ignore", over="ignore"):  # as silent as torch
        return value, np.float32(1) / value


def _stats(made: Any, *, amax: float, scale_inv: float, recast: bool) -> Tensor:
    fields = {
        Stat.AMAX: amax,
        Stat.SCALE_INV: scale_inv,
        Stat.ELEMENTS: made.codes.numel(),
        Stat.SATURATED: made.saturated,
        Stat.UNDERFLOWED: made.underflowed,
        Stat.NONFINITE: made.nonfinite,
        Stat.RECAST: recast,
        Stat.SQUARE: made.square,
        Stat.SATURATED_SQUARE: made.saturated_square,
        Stat.CASTS: 1,
    }
    return torch.tensor([fields[field] for field in Stat], dtype=torch.float64)
