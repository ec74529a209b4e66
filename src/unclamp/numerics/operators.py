"""The casts, the GEMM and the commit as torch operators, so that `torch.compile` sees them whole.

In eager mode the functions call the arithmetic directly. While a graph is compiled they become
nodes of it, `unclamp::quantize` and so on, which run the same arithmetic: compiled and eager agree
bit for bit, and a graph does not depend on which layer it serves. `commit` and `raise_amax` write
into the ledger's tensors; the compiler knows it from their signatures and keeps them in backward,
where they are called.

A write that is made in backward names something of it (`after`). One that hung on the forward's
results alone would be moved into the forward's graph; where it then writes into a part of a tensor,
torch 2.11 takes the wrong part.
"""

from typing import Any

import torch
from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.numerics.blocks import block_grid
from unclamp.numerics.cast import is_memory
from unclamp.numerics.fused import fused
from unclamp.numerics.gemm import matmul
from unclamp.numerics.gpu import host_may_look
from unclamp.numerics.gradient import look_at_gradient
from unclamp.numerics.inspection import DETAILS, empty_details, inspect
from unclamp.numerics.quantize import quantize_by, with_turned
from unclamp.numerics.record import (
    CastPlan,
    GemmOperand,
    Quantized,
    plan_of,
    torch_dtype,
)
from unclamp.numerics.stats import Stat, merge_stats
from unclamp.scaling import parse_granularity

LIBRARY = torch.library.Library("unclamp", "DEF")


def is_graph_being_made() -> bool:
    """Whether tensors are those of a graph: under `torch.compile`, export, or `torch.jit.trace`."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def quantize_operand(
    x: Tensor,
    scale: Tensor | None,
    plan: CastPlan,
    axis: int,
    *,
    slot: str | None = None,
    keeps_codes: bool = True,
    is_whole: bool = True,
    turned: bool = False,
    measured: bool = False,
    shows_wild: bool = False,
) -> Quantized:
    """Cast a matrix as `unclamp.numerics.quantize_by` does; a node of a graph in a compiled one.

    With `turned` the codes come in column-major memory too, on a GPU, where a GEMM wants them so.
    """
    if not is_graph_being_made():
        return quantize_by(
            x, plan, scale, axis,
            slot=slot, keeps_codes=keeps_codes, is_whole=is_whole, turned=turned,
            measured=measured, shows_wild=shows_wild,
        )  # fmt: skip
    if turned and x.device.type == "cuda":
        made = torch.ops.unclamp.quantize_turned(x, scale, *plan.signature, axis)
        codes, scale_inv, amax, stats, other = made
        return Quantized(codes, scale_inv, amax, stats, plan, axis, turned=other.t())
    codes, scale_inv, amax, stats = torch.ops.unclamp.quantize(x, scale, *plan.signature, axis)
    return Quantized(codes, scale_inv, amax, stats, plan, axis)


def inspect_operand(x: Tensor, q: Quantized, *, only_clamped: bool) -> Tensor:
    """Return a cast's closer look, `unclamp.numerics.inspection.inspect`.

    With `only_clamped` the vector of a cast that clamped nothing is zero. On a device other than
    the CPU nobody asks whether it clamped, since that would make the host wait: every cast is
    inspected.
    """
    if is_graph_being_made():
        return torch.ops.unclamp.inspect(
            x, q.codes, q.scale_inv, q.stats, str(q.granularity), q.axis, only_clamped
        )
    if only_clamped and _has_clamped_nothing(q.stats):
        return empty_details(1, q.stats.device)[0]
    return inspect(x, q.codes, q.scale_inv, granularity=q.granularity, axis=q.axis, values=q.values)


def _has_clamped_nothing(stats: Tensor) -> bool:
    # An element of a tensor takes ten times as long to look at as one of a list.
    return host_may_look(stats) and not stats.tolist()[Stat.SATURATED] > 0


def look_at_weight_gradient(
    dy: Tensor,
    q: Quantized,
    x: GemmOperand,
    grad: Tensor,
    smooth: Tensor | None,
    *,
    only_clamped: bool,
    few_tokens: bool = False,
) -> Tensor | None:
    """Return what clamping did to a weight's gradient, `unclamp.numerics.gradient`.

    With `only_clamped` None for a cast on a CPU that clamped nothing; zero in a compiled graph.
    With `few_tokens` NaN where more than few tokens clamped.
    """
    if torch.compiler.is_compiling():
        return torch.ops.unclamp.look_at_gradient(
            dy, q.scale_inv, q.stats, *q.plan.signature, q.axis, *_plain(x), grad, smooth,
            only_clamped, few_tokens,
        )  # fmt: skip
    if only_clamped and _has_clamped_nothing(q.stats):
        return None
    return look_at_gradient(
        dy, q.scale_inv, q.stats, q.plan, q.axis, x, grad, smooth, few_tokens=few_tokens
    )


def gemm(
    a: GemmOperand,
    b: GemmOperand,
    bias: Tensor | None,
    accumulate: str,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Multiply as `unclamp.numerics.matmul` does; no graph has an `out`, or a scratch."""
    if not is_graph_being_made():
        return matmul(
            a, b, bias, accumulate=accumulate, out_dtype=out_dtype, out=out, scratch=scratch
        )
    return torch.ops.unclamp.matmul(*_plain(a), *_plain(b), bias, accumulate, out_dtype)


def _plain(x: GemmOperand) -> tuple[Tensor, Tensor | None, str, int]:
    """Return an operand in types that an operator's signature can carry."""
    return x.tensor, x.scale_inv, str(x.granularity), x.axis


def commit(
    pending: Tensor, stats: list[Tensor | None], nothing: Tensor, after: Tensor | None = None
) -> None:
    """Merge casts' statistics into the ledger's rows, in place; None of what was not cast.

    Args:
        pending: `[len(stats), len(Stat)]`.
        stats: One vector a row.
        nothing: What a row without a cast adds.
        after: In a backward, a tensor of it.
    """
    if torch.compiler.is_compiling():
        rows = [nothing if vector is None else vector for vector in stats]
        torch.ops.unclamp.commit(pending, torch.stack(rows), after)
    elif pending.device.type == "cpu" and _are_memory(pending, stats) and fused() is not None:
        fused().merge(pending, stats)
    else:
        merge_stats(pending, torch.stack([nothing if v is None else v for v in stats]))


def _are_memory(pending: Tensor, stats: list[Tensor | None]) -> bool:
    return all(v is None or is_memory(v) for v in (pending, *stats))


def add_details(pending: Tensor, details: Tensor, after: Tensor | None = None) -> None:
    """Add casts' closer looks to the ledger's, `[n, DETAILS]` each, in place."""
    call = torch.ops.unclamp.add_details if torch.compiler.is_compiling() else _add_details
    call(pending, details, after)


def raise_amax(pending: Tensor, amax: Tensor, after: Tensor | None = None) -> None:
    """Raise the amaxes since the last update to these where they are larger, in place."""
    call = torch.ops.unclamp.raise_amax if torch.compiler.is_compiling() else _raise_amax
    call(pending, amax, after)


def sum_tokens(x: Tensor) -> Tensor:
    """Return the sum over the first axis in float32: a compiler's own would add otherwise."""
    call = torch.ops.unclamp.sum_tokens if torch.compiler.is_compiling() else _sum_tokens
    return call(x)


def _quantize(
    x: Tensor, scale: Tensor | None, format: str, granularity: str, margin: int,
    power_of_two: bool, guard: bool, axis: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = plan_of((format, granularity, margin, power_of_two, guard))
    q = quantize_by(x, plan, scale, axis, apart=True)
    return q.codes, _own(q.scale_inv), _own(q.amax), q.stats


def _quantize_turned(
    x: Tensor, scale: Tensor | None, format: str, granularity: str, margin: int,
    power_of_two: bool, guard: bool, axis: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = plan_of((format, granularity, margin, power_of_two, guard))
    q = with_turned(quantize_by(x, plan, scale, axis, turned=True, apart=True))
    assert q.turned is not None
    return q.codes, _own(q.scale_inv), _own(q.amax), q.stats, q.turned.t()


def _own(x: Tensor) -> Tensor:
    """Return a result in memory of its own: those of a cast on a CPU share theirs, which an
    operator's may not.
    """  # noqa: D205
    return x.clone() if x.device.type == "cpu" else x


def _matmul(
    a: Tensor, a_scale_inv: Tensor | None, a_granularity: str, a_axis: int,
    b: Tensor, b_scale_inv: Tensor | None, b_granularity: str, b_axis: int,
    bias: Tensor | None, accumulate: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    first = GemmOperand(a, a_scale_inv, parse_granularity(a_granularity), a_axis)
    second = GemmOperand(b, b_scale_inv, parse_granularity(b_granularity), b_axis)
    return matmul(first, second, bias, accumulate=accumulate, out_dtype=out_dtype)


def _inspect(
    x: Tensor, codes: Tensor, scale_inv: Tensor, stats: Tensor, granularity: str, axis: int,
    only_clamped: bool,
) -> Tensor:  # fmt: skip
    if only_clamped and _has_clamped_nothing(stats):
        return empty_details(1, stats.device)[0]
    return inspect(x, codes, scale_inv, granularity=parse_granularity(granularity), axis=axis)


def _look_at_gradient(
    dy: Tensor, scale_inv: Tensor, stats: Tensor, format: str, granularity: str, margin: int,
    power_of_two: bool, guard: bool, axis: int, x: Tensor, x_scale_inv: Tensor | None,
    x_granularity: str, x_axis: int, grad: Tensor, smooth: Tensor | None, only_clamped: bool,
    few_tokens: bool,
) -> Tensor:  # fmt: skip
    if only_clamped and _has_clamped_nothing(stats):
        return empty_details(1, stats.device)[0]
    plan = plan_of((format, granularity, margin, power_of_two, guard))
    operand = GemmOperand(x, x_scale_inv, parse_granularity(x_granularity), x_axis)
    return look_at_gradient(
        dy, scale_inv, stats, plan, axis, operand, grad, smooth, few_tokens=few_tokens
    )


def _raise_amax(pending: Tensor, amax: Tensor, after: Tensor | None = None) -> None:
    torch.maximum(pending, amax, out=pending)


def _add_details(pending: Tensor, details: Tensor, after: Tensor | None = None) -> None:
    pending += details


def _add_details_kernel(pending: Tensor, details: Tensor, after: Tensor | None = None) -> None:
    _add_details(pending, details)
    torch.autograd.graph.increment_version(pending)  # as for the statistics


def _sum_tokens(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float32)


def _commit_kernel(pending: Tensor, stats: Tensor, after: Tensor | None = None) -> None:
    merge_stats(pending, stats)
    # Below autograd nobody else does; the ledger sees by the version that something is pending.
    torch.autograd.graph.increment_version(pending)


def _register() -> None:
    """Define the operators, with what they return for tensors without data."""
    LIBRARY.define(
        "quantize(Tensor x, Tensor? scale, str format, str granularity, int margin, "
        "bool power_of_two, bool guard, int axis) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(
        "quantize_turned(Tensor x, Tensor? scale, str format, str granularity, int margin, "
        "bool power_of_two, bool guard, int axis) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(
        "matmul(Tensor a, Tensor? a_scale_inv, str a_granularity, int a_axis, "
        "Tensor b, Tensor? b_scale_inv, str b_granularity, int b_axis, "
        "Tensor? bias, str accumulate, ScalarType out_dtype) -> Tensor"
    )
    LIBRARY.define(
        "inspect(Tensor x, Tensor codes, Tensor scale_inv, Tensor stats, str granularity, "
        "int axis, bool only_clamped) -> Tensor"
    )
    LIBRARY.define(
        "look_at_gradient(Tensor dy, Tensor scale_inv, Tensor stats, str format, "
        "str granularity, int margin, bool power_of_two, bool guard, int axis, Tensor x, "
        "Tensor? x_scale_inv, str x_granularity, int x_axis, Tensor grad, Tensor? smooth, "
        "bool only_clamped, bool few_tokens) -> Tensor"
    )
    LIBRARY.define("add_details(Tensor(a!) pending, Tensor details, Tensor? after=None) -> ()")
    LIBRARY.define("commit(Tensor(a!) pending, Tensor stats, Tensor? after=None) -> ()")
    LIBRARY.define("sum_tokens(Tensor x) -> Tensor")
    LIBRARY.define("raise_amax(Tensor(a!) pending, Tensor amax, Tensor? after=None) -> ()")
    kernels = {
        "quantize": (_quantize, _fake_quantize),
        "quantize_turned": (_quantize_turned, _fake_quantize_turned),
        "matmul": (_matmul, _fake_matmul),
        "inspect": (_inspect, _fake_inspect),
        "look_at_gradient": (_look_at_gradient, _fake_inspect),
        "add_details": (_add_details_kernel, _fake_nothing),
        "sum_tokens": (_sum_tokens, _fake_sum_tokens),
        "commit": (_commit_kernel, _fake_nothing),
        "raise_amax": (_raise_amax, _fake_nothing),
    }
    for name, (kernel, fake) in kernels.items():
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"unclamp::{name}", fake, lib=LIBRARY)
    results = ("quantize", "quantize_turned", "matmul", "inspect", "look_at_gradient", "sum_tokens")
    for name in results:
        torch.library.register_autograd(f"unclamp::{name}", _refuse_backward, lib=LIBRARY)


def _fake_quantize(
    x: Tensor, scale: Tensor | None, format: str, granularity: str, margin: int,
    power_of_two: bool, guard: bool, axis: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = plan_of((format, granularity, margin, power_of_two, guard))
    rows, columns = x.shape if axis in (1, -1) else x.shape[::-1]
    grain = plan.granularity
    grid = () if grain.is_whole else block_grid(rows, columns, grain.block)
    codes = x.new_empty(x.shape, dtype=torch_dtype(plan.format))
    if grid and axis in (0, -2) and x.device.type == "cuda":  # as a GEMM wants them there
        codes = x.new_empty(x.shape[::-1], dtype=codes.dtype).t()
    return (
        codes,
        x.new_empty(grid, dtype=torch.float32),
        x.new_empty(grid, dtype=torch.float32),
        x.new_empty(len(Stat), dtype=torch.float64),
    )


def _fake_quantize_turned(
    x: Tensor, scale: Tensor | None, format: str, granularity: str, margin: int,
    power_of_two: bool, guard: bool, axis: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = (format, granularity, margin, power_of_two, guard, axis)
    made = _fake_quantize(x, scale, *settings)
    return *made, x.new_empty(x.shape[::-1], dtype=made[0].dtype)


def _fake_matmul(
    a: Tensor, a_scale_inv: Tensor | None, a_granularity: str, a_axis: int,
    b: Tensor, b_scale_inv: Tensor | None, b_granularity: str, b_axis: int,
    bias: Tensor | None, accumulate: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty(a.shape[1 - a_axis % 2], b.shape[1 - b_axis % 2], dtype=out_dtype)


def _fake_inspect(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(DETAILS, dtype=torch.float64)


def _fake_sum_tokens(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1:], dtype=torch.float32)


def _fake_nothing(pending: Tensor, other: Tensor, after: Tensor | None = None) -> None:
    pass


def _refuse_backward(ctx: Any, *grads: Tensor) -> None:
    raise UnsupportedError(
        "an exported or traced graph of converted layers has no backward: expected to train the "
        "model itself, eager or under torch.compile"
    )


_register()
