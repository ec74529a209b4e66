"""The GEMM of quantised operands, emulated: `a @ b.T` with the contracted axis named per operand.

    out[m, n] = sum over k of a_hat[m, k] * b_hat[n, k]

With `accumulate="float32"` the operands are dequantised and multiplied by torch in float32.
"hopper" and "hopper_fast" add the products of the *codes* as a Hopper tensor core does
(`unclamp.numerics.hopper`) and apply the scales to the sums: once where a scale serves the whole
contracted axis, else after each block along it, which is where block-scaled kernels promote.
An operand in high precision is no operand of an FP8 tensor core: such a GEMM adds in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.formats import unknown_name
from unclamp.numerics.blocks import orient, spread
from unclamp.numerics.cast import dequantize_codes
from unclamp.numerics.gpu import goes_to_gpu
from unclamp.numerics.gpu.gemm import scaled_matmul
from unclamp.numerics.panels import multiply, panels_pay
from unclamp.numerics.record import GemmOperand, format_of
from unclamp.scaling import ACCUMULATES


def values_of(x: GemmOperand) -> Tensor:
    """Return what a GEMM multiplies, float32, `[rows, contracted]`."""
    if x.values is not None:
        return orient(x.values, x.axis)
    if x.scale_inv is None:
        return orient(x.tensor.to(torch.float32), x.axis)
    values = dequantize_codes(x.tensor, x.scale_inv, granularity=x.granularity, axis=x.axis)
    return orient(values, x.axis)


def matmul(
    a: GemmOperand,
    b: GemmOperand,
    bias: Tensor | None = None,
    *,
    accumulate: str = "float32",
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Return `a @ b.T + bias`, `[rows of a, rows of b]`: float32, rounded to `out_dtype`.

    It is put into `out`, if given, a tensor of that shape and dtype: the same bits. `scratch` is
    contiguous float32 memory with as many elements as `b`, free until the call returns, in which
    `b` may be decoded.

    On a CPU large operands are decoded by panels (`unclamp.numerics.panels`): beside codes and
    output a GEMM in float32 takes a few MiB.

    On a GPU the tensor cores add, and "hopper_fast" is their `use_fast_accum`; the other two mean
    without it (`unclamp.numerics.gpu.gemm`).

    Numerics: NaN and Inf spread as in any GEMM; an empty contracted axis gives zeros.

    Raises:
        RecipeError: `accumulate` is none of `ACCUMULATES`.
        ValueError: Contracted axes of different lengths, or a format that Hopper does not have.
        UnsupportedError: Hopper-like accumulation neither on a CPU nor on a GPU.
    """
    if accumulate not in ACCUMULATES:
        raise unknown_name("accumulate", accumulate, list(ACCUMULATES))
    if torch.is_autocast_enabled(a.tensor.device.type):  # F.linear would leave float32
        with torch.autocast(a.tensor.device.type, enabled=False):
            return matmul(
                a, b, bias, accumulate=accumulate, out_dtype=out_dtype, out=out, scratch=scratch
            )
    has_codes = a.scale_inv is not None or b.scale_inv is not None
    if has_codes and goes_to_gpu(a.tensor):
        fast = accumulate == "hopper_fast"
        made = scaled_matmul(a, b, bias, fast=fast, out_dtype=out_dtype)
        return made if out is None else out.copy_(made)
    bias = None if bias is None else bias.to(torch.float32)
    if accumulate == "float32" or a.scale_inv is None or b.scale_inv is None:
        if panels_pay(a, b):
            return multiply(a, b, bias, out_dtype=out_dtype, out=out, scratch=scratch)
        left, right = values_of(a), values_of(b)
        if out is None or out.dtype != torch.float32:
            return _put(F.linear(left, right, bias).to(out_dtype), out)
        if bias is None:
            return torch.mm(left, right.t(), out=out)
        return torch.addmm(bias, left, right.t(), out=out)
    made = _hopper(a, b, fast=accumulate == "hopper_fast")
    return _put((made if bias is None else made + bias).to(out_dtype), out)


def _put(made: Tensor, out: Tensor | None) -> Tensor:
    return made if out is None else out.copy_(made)


def _hopper(a: GemmOperand, b: GemmOperand, *, fast: bool) -> Tensor:
    if a.tensor.device.type != "cpu":
        raise UnsupportedError(
            "Hopper-like accumulation is emulated on the CPU: expected operands there, got them on "
            f"{a.tensor.device}; use accumulate='float32'"
        )
    # numba takes a while to import, and only these modes need it.
    from unclamp.numerics.hopper import hopper_matmul  # noqa: PLC0415

    codes = [orient(x.tensor.to(torch.float32), x.axis) for x in (a, b)]
    if codes[0].shape[1] != codes[1].shape[1]:
        lengths = " and ".join(str(code.shape[1]) for code in codes)
        raise ValueError(f"expected contracted axes of one length, got {lengths}")
    formats = [format_of(x.tensor.dtype) for x in (a, b)]
    contracted = codes[0].shape[1]
    step = _segment(a, b, contracted)
    scales = [_scales(x, code.shape[0]) for x, code in zip((a, b), codes, strict=True)]
    out = codes[0].new_zeros(codes[0].shape[0], codes[1].shape[0])
    for first in range(0, contracted, step):
        a_part, b_part = (code[:, first : first + step] for code in codes)
        a_scale, b_scale = (
            _scale_at(x, scale, first) for x, scale in zip((a, b), scales, strict=True)
        )
        sums = hopper_matmul(a_part, b_part, fast=fast, a_format=formats[0], b_format=formats[1])
        out += sums * a_scale * b_scale.t()
    return out


def _segment(a: GemmOperand, b: GemmOperand, contracted: int) -> int:
    """Return how far along the contracted axis one pair of scales serves."""
    lengths = [x.granularity.block[1] for x in (a, b)]
    return math.gcd(*(length for length in lengths if length is not None)) or max(contracted, 1)


def _scales(x: GemmOperand, rows: int) -> Tensor:
    """Return one scale a row and block along: `[rows or 1, blocks along]`."""
    assert x.scale_inv is not None
    scale = x.scale_inv.reshape(1, 1) if x.scale_inv.ndim == 0 else x.scale_inv
    return spread(scale, (rows, scale.shape[1]), (x.granularity.block[0], None))


def _scale_at(x: GemmOperand, scale: Tensor, first: int) -> Tensor:
    along = x.granularity.block[1]
    column = 0 if along is None else first // along
    return scale[:, column : column + 1]


def matmul_each(
    a: GemmOperand,
    b: GemmOperand,
    *,
    accumulate: str = "float32",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `a @ b.T` for each matrix of a batch, `[G, rows of a, rows of b]`.

    Both operands have one scale a batch, or are in high precision: `[G, rows, contracted]` with
    `axis` 1, `[G, contracted, rows]` with `axis` 0.

    Numerics: on a GPU as on a CPU float32 products of what the codes decode to; the tensor cores
    multiply no batches of FP8 matrices.

    Raises:
        RecipeError: `accumulate` is none of `ACCUMULATES`.
    """
    if accumulate not in ACCUMULATES:
        raise unknown_name("accumulate", accumulate, list(ACCUMULATES))
    if accumulate == "float32" or a.scale_inv is None or b.scale_inv is None:
        with torch.autocast(a.tensor.device.type, enabled=False):
            return torch.bmm(_values_each(a), _values_each(b).mT).to(out_dtype)
    pairs = zip(a.tensor.unbind(0), b.tensor.unbind(0), strict=True)
    made = [
        matmul(
            a._replace(tensor=one, values=None),
            b._replace(tensor=two, values=None),
            accumulate=accumulate,
            out_dtype=out_dtype,
        )
        for one, two in pairs
    ]
    if made:
        return torch.stack(made)
    rows = [x.tensor.shape[-2 if x.axis == 1 else -1] for x in (a, b)]
    return a.tensor.new_empty(0, *rows, dtype=out_dtype)


def _values_each(x: GemmOperand) -> Tensor:
    """Return what a batch of GEMMs multiplies, float32, `[G, rows, contracted]`."""
    if x.values is not None:
        values = x.values
    elif x.scale_inv is None:
        values = x.tensor.to(torch.float32)
    else:
        values = dequantize_codes(x.tensor, x.scale_inv, granularity=x.granularity, axis=-1)
    return values if x.axis == 1 else values.mT
