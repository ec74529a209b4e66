"""`matmul` on a GPU: by torch's scaled matmul where the device has one, else dequantised.

    out[m, n] = sum over k of a_hat[m, k] * b_hat[n, k]

`plan_gemm` decides from plain data, so that the rules of a device can be tested without it. An
FP8 tensor core wants both operands with the contracted axis last in memory (in torch's words: the
first row-major, the second column-major), which is what the casts write, and sizes that are
multiples of 16, to which operands are padded with zeros.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclamp.errors import UnclampWarning
from unclamp.formats import E4M3FN, E5M2, E5M2FNUZ
from unclamp.numerics.blocks import orient
from unclamp.numerics.cast import dequantize_codes
from unclamp.numerics.gpu import architecture
from unclamp.numerics.record import GemmOperand, format_of
from unclamp.scaling import Granularity

ALIGNMENT = 16
BLOCK = 128
Route = Literal["tensor", "row", "block", "dequantised"]
"""How a GEMM is done: scales of whole tensors; of rows; of blocks of 128; or by a GEMM in high
precision of what the codes stand for."""


class Given(NamedTuple):
    """An operand in plain data: its format's name and granularity, None in high precision."""

    format: str | None
    granularity: str | None


@dataclass(frozen=True, kw_only=True)
class GemmPlan:
    """How a GEMM `[m, k] @ [n, k].T` is done.

    Attributes:
        route: See `Route`.
        why: Why it is dequantised; None otherwise.
        pad_n: Rows of zeros that the second operand gets.
        pad_k: Columns of zeros that both get.
    """

    route: Route
    why: str | None = None
    pad_n: int = 0
    pad_k: int = 0


def has_fp8_gemm(arch: str) -> bool:
    """Whether a device multiplies FP8: NVIDIA's from Ada and Hopper, AMD's from MI300 on."""
    if arch.startswith("sm_"):
        return int(arch.removeprefix("sm_")) >= 89
    return arch.startswith(("gfx94", "gfx95", "gfx12"))


def plan_gemm(a: Given, b: Given, *, m: int, n: int, k: int, arch: str) -> GemmPlan:
    """Return how `[m, k] @ [n, k].T` is done on a device of this architecture."""
    why = _why_not(a, b, n=n, k=k, arch=arch)
    if why is not None:
        return GemmPlan(route="dequantised", why=why)
    grains = {a.granularity, b.granularity}
    route: Route = "tensor" if grains == {"tensor"} else "row" if "row" in grains else "block"
    return GemmPlan(route=route, pad_n=-n % ALIGNMENT, pad_k=-k % ALIGNMENT)


@functools.lru_cache(4096)
def _planned(
    formats: tuple[torch.dtype | None, torch.dtype | None],
    grains: tuple[Granularity, Granularity],
    sizes: tuple[int, int, int],
    arch: str,
) -> tuple[GemmPlan, tuple[str, str]]:
    """Return the plan of a GEMM, and its granularities in words: asked alike at every step."""
    names = [None if dtype is None else format_of(dtype).name for dtype in formats]
    a, b = (Given(name, str(grain)) for name, grain in zip(names, grains, strict=True))
    m, n, k = sizes
    plan = plan_gemm(a, b, m=m, n=n, k=k, arch="sm_90" if arch == "cpu" else arch)
    return plan, (str(grains[0]), str(grains[1]))


def _why_not(a: Given, b: Given, *, n: int, k: int, arch: str) -> str | None:
    """Return why a device cannot multiply these codes; None where it can."""
    if a.format is None or b.format is None:
        return "an operand is in high precision"
    if not has_fp8_gemm(arch):
        return f"{arch} has no FP8 tensor cores"
    wide = (E5M2.name, E5M2FNUZ.name)
    if a.format in wide and b.format in wide:
        return f"no device multiplies {a.format} by {b.format}"
    grains = {a.granularity, b.granularity}
    if grains <= {"tensor", "row"}:
        if "row" in grains and b.format in wide:
            return f"scales of rows want {b.format} as the first operand"
        return None
    if not grains <= {"1x128", "128x128"}:
        return f"torch multiplies no scales of {a.granularity} by {b.granularity} here"
    if {a.format, b.format} != {E4M3FN.name}:
        return f"torch multiplies blocks of e4m3fn alone, not of {a.format} and {b.format}"
    if arch != "sm_90":
        return f"scales of {a.granularity} and {b.granularity} are multiplied on sm_90 alone"
    if grains == {"128x128"}:
        return "one operand of 128x128 wants the other to be 1x128"
    if k % BLOCK or n % BLOCK:
        return f"blocks of 128 want sizes that are multiples of it, got n {n} and k {k}"
    return None


def scaled_matmul(
    a: GemmOperand, b: GemmOperand, bias: Tensor | None, *, fast: bool, out_dtype: torch.dtype
) -> Tensor:
    """Return `a @ b.T + bias` of two operands; see `unclamp.numerics.matmul`.

    Args:
        a: The first operand.
        b: The second one.
        bias: `[n]`, or None.
        fast: Whether tensor cores keep sums where they add them (`use_fast_accum`).
        out_dtype: Of the result; sums of rows' and blocks' products come as bfloat16.
    """
    left = a.tensor if a.axis == 1 else orient(a.tensor, a.axis)
    # Contracted along its rows, as torch wants the second operand, and as casts lay it out turned.
    column = b.tensor if b.axis == 0 else orient(b.tensor, b.axis).t()
    (m, k), (contracted, n) = left.shape, column.shape
    if contracted != k:
        raise ValueError(f"expected contracted axes of one length, got {k} and {contracted}")
    a_inv, b_inv = a.scale_inv, b.scale_inv
    plan, grains = _planned(
        (None if a_inv is None else a.tensor.dtype, None if b_inv is None else b.tensor.dtype),
        (a.granularity, b.granularity), (m, n, k), architecture(left.device),
    )  # fmt: skip
    if (
        plan.route == "tensor" and a_inv is not None and b_inv is not None
        and not (plan.pad_n or plan.pad_k or out_dtype == torch.float32 or 0 in (m, n, k))
        and left.stride() == (k, 1) and column.stride() == (1, k)
    ):  # fmt: skip  # as it lies: nothing to pad, to turn, or to add
        bias = None if bias is None else bias.to(out_dtype)
        return _scaled_mm(left, column, a_inv, b_inv, grains, bias, fast, out_dtype)
    right = column.t()
    if 0 in (m, n, k):
        out = left.new_zeros((m, n), dtype=out_dtype)
        return out if bias is None else out + bias.to(out_dtype)
    if plan.route == "dequantised":
        return _dequantised(a, b, bias, out_dtype=out_dtype, why=plan.why)
    left, right = _padded(left, 0, plan.pad_k), _padded(right, plan.pad_n, plan.pad_k)
    scales = [
        _scales(x, t, plan.route, grain=grain)
        for x, t, grain in zip((a, b), (left, right), grains, strict=True)
    ]
    fused = plan.route != "block" and out_dtype != torch.float32
    fused_bias = _padded_bias(bias, plan.pad_n, out_dtype) if fused and bias is not None else None
    out = _multiply(
        left, right, scales, plan.route, grains,
        bias=fused_bias, fast=fast, out_dtype=out_dtype,
    )  # fmt: skip
    out = out[:, :n] if plan.pad_n else out
    return out if fused or bias is None else out + bias.to(out.dtype)


def _multiply(
    left: Tensor, right: Tensor, scales: list[Tensor], route: Route, grains: tuple[str, str], *,
    bias: Tensor | None, fast: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Call torch's scaled matmul with what it wants for a route."""
    b = right.t()
    if route == "row":
        scales = [scales[0], scales[1].t()]
    if route == "row" and out_dtype == torch.float32:
        # Row scales give bfloat16 alone: scale the sums instead.
        one = scales[0].new_ones(())
        sums = _scaled_mm(left, b, one, one, ("tensor", "tensor"), None, fast, torch.float32)
        return sums * scales[0] * scales[1]
    if route == "row":
        half = bias if bias is None else bias.to(torch.bfloat16)
        grains = ("row", "row")
        return _scaled_mm(left, b, scales[0], scales[1], grains, half, fast, torch.bfloat16).to(
            out_dtype
        )
    if route == "block":
        return _scaled_mm(left, b, scales[0], scales[1], grains, None, False, torch.bfloat16).to(
            out_dtype
        )
    return _scaled_mm(left, b, scales[0], scales[1], grains, bias, fast, out_dtype)


def _scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, grains: tuple[str, str],
    bias: Tensor | None, fast: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    first, second = _recipe(grains[0]), _recipe(grains[1])
    if _direct is not None:
        return _direct(
            a, b, [a_scale], [first.value], [], [b_scale], [second.value], [],
            bias, out_dtype, (), fast,
        )  # fmt: skip
    return F.scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b, a_scale, first, b_scale, second,
        bias=bias, output_dtype=out_dtype, use_fast_accum=fast,
    )  # fmt: skip


SCHEMA = (
    "aten::_scaled_mm_v2(Tensor self, Tensor mat2, Tensor[] scale_a, int[] recipe_a, "
    "int[] swizzle_a, Tensor[] scale_b, int[] recipe_b, int[] swizzle_b, Tensor? bias, "
    "ScalarType? out_dtype, int[] contraction_dim=[], bool use_fast_accum=False) -> Tensor"
)


def direct_scaled_mm() -> Callable[..., Tensor] | None:
    """Return what `scaled_mm` calls, if it is what it was when this was written; else None.

    Its twenty calls in Python, which turn arguments into lists, take the host as long as a launch.
    """
    try:
        known = str(torch.ops.aten._scaled_mm_v2.default._schema) == SCHEMA
    except AttributeError:
        return None
    return getattr(torch, "_scaled_mm_v2", None) if known else None


_direct = direct_scaled_mm()


@functools.cache
def _recipe(grain: str) -> Any:
    kinds = F.ScalingType  # pyright: ignore[reportPrivateImportUsage]
    return {
        "tensor": kinds.TensorWise,
        "row": kinds.RowWise,
        "1x128": kinds.BlockWise1x128,
        "128x128": kinds.BlockWise128x128,
    }[grain]


def _scales(x: GemmOperand, codes: Tensor, route: Route, *, grain: str | None) -> Tensor:
    """Return an operand's scales as torch's scaled matmul wants them for a route."""
    scale = x.scale_inv
    assert scale is not None
    if route == "tensor":
        return scale
    if route == "row":
        rows = codes.shape[0]
        if grain == "tensor":
            column = scale.reshape(1, 1).expand(rows, 1)
        else:  # rows that padding added are zero whatever their scale
            column = F.pad(scale, (0, 0, 0, rows - scale.shape[0]), value=1.0)
        return column.contiguous()
    if grain == "1x128":
        return scale.t().contiguous().t()  # rows of the matrix side by side
    return F.pad(scale, (0, -scale.shape[1] % 4)).contiguous().t()


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Return codes row-major, with zeros appended."""
    raw = codes.view(torch.uint8) if codes.is_contiguous() else _turned_bytes(codes)
    raw = F.pad(raw, (0, columns, 0, rows)) if rows or columns else raw.contiguous()
    return raw.view(codes.dtype)


def _turned_bytes(codes: Tensor) -> Tensor:
    """Return the bytes of codes that do not lie row by row."""
    if codes.stride(0) == 1:
        return codes.t().view(torch.uint8).t()
    return codes.contiguous().view(torch.uint8)


def _padded_bias(bias: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    bias = bias.to(dtype)
    return F.pad(bias, (0, rows)) if rows else bias


def _dequantised(
    a: GemmOperand, b: GemmOperand, bias: Tensor | None, *, out_dtype: torch.dtype, why: str | None
) -> Tensor:
    """Multiply what the codes stand for: in bfloat16, or in float32 where the result is."""
    if why is not None and None not in (a.scale_inv, b.scale_inv):
        _say(why)
    compute = torch.float32 if out_dtype == torch.float32 else torch.bfloat16
    left, right = (_values(x).to(compute) for x in (a, b))
    out = F.linear(left, right, None if bias is None else bias.to(compute))
    return out.to(out_dtype)


def _values(x: GemmOperand) -> Tensor:
    if x.scale_inv is None:
        return orient(x.tensor, x.axis)
    values = dequantize_codes(x.tensor, x.scale_inv, granularity=x.granularity, axis=x.axis)
    return orient(values, x.axis)


@functools.cache
def _say(why: str) -> None:
    """Tell once in a process that FP8 codes are multiplied in high precision."""
    warnings.warn(
        f"a GEMM of FP8 operands runs dequantised, at the speed of bfloat16: {why}",
        UnclampWarning,
        stacklevel=2,
    )
