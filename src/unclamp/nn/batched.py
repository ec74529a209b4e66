"""A batch of matrix products without a parameter: both operands are activations.

With G matrices, and a hat for a tensor that went through FP8:

    output      [G, M, N] = input_hat [G, M, K] @ second_hat [G, N, K].T
    grad_input  [G, M, K] = grad_output_hat [G, M, N] @ second_hat [G, N, K]
    grad_second [G, N, K] = grad_output_hat [G, M, N].T @ input_hat [G, M, K]

The second operand has the role `weight`. All matrices of an operand share one scale; blocks of a
batch of matrices are not offered. As in `nn.product` there are three casts a step: codes of the
forward are kept for backward, one byte an element, and what the casts saw is committed in
backward, once. Re-computed forwards find the same scales.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unclamp.names import GEMMS, Gemm, Role
from unclamp.nn.casts import Hat, Seen
from unclamp.nn.counting import count, is_counted
from unclamp.nn.first import first_scale
from unclamp.nn.gradient import cast_gradient
from unclamp.nn.layout import Axis
from unclamp.nn.operands import Operands
from unclamp.nn.product import Meets, meeting, when_to_commit
from unclamp.nn.rehearsal import rehearses
from unclamp.nn.split import asked, uncounted
from unclamp.numerics import GemmOperand, matmul_each, plain_operand
from unclamp.scaling import PER_TENSOR


def multiply_each(
    operands: Operands,
    x: Tensor,
    second: Tensor,
    *,
    training: bool,
    turned: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `x @ second.T` for each matrix, with the operands cast as their plan says.

    Shapes: `x` `[..., M, K]`, `second` `[..., N, K]` with the same leading shape, or `[..., K, N]`
    where it is `turned`; the result `[..., M, N]`.

    Args:
        operands: The product's plan and state.
        x: The input.
        second: The other operand.
        training: Whether the module trains.
        turned: Whether the second operand lies turned.
        dtype: Of the result; that of `x` without it.

    Numerics: a GEMM in high precision computes in the dtype of the operand that is not cast, as
    torch does; the emulation in float32.
    """
    dtype = x.dtype if dtype is None else dtype
    if operands.is_plain or operands.counts_only:
        output = torch.matmul(x, second if turned else second.mT).to(dtype)
        if not is_counted(operands) or rehearses():
            return output
        when = when_to_commit(operands, x, second, None, training=training)
        if when is None:
            return output
        return count(operands, output, x, _matrix(second), commit=when, is_batch=True)
    meets = meeting(operands, x, second, None, training=training)
    if operands.shares:  # what data parallelism splits, it splits in both operands
        splits = meets.splits._replace(outputs=meets.splits.tokens)
        meets = meets._replace(splits=splits)
    shape = x.shape[:-2]
    x, second = (t.reshape(-1, *t.shape[-2:]) for t in (x, second))
    output = _Batched.apply(x, second, operands, meets, turned, dtype)
    return output.view(*shape, *output.shape[-2:])


class _Batched(torch.autograd.Function):
    """Forward and backward as three batches of GEMMs; see the module's equations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        second: Tensor,
        operands: Operands,
        meets: Meets,
        turned: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        needs_x, needs_second = ctx.needs_input_grad[:2]
        x_gemms: list[Gemm] = ["output", "grad_weight"] if needs_second else ["output"]
        second_gemms: list[Gemm] = ["output", "grad_input"] if needs_x else ["output"]
        x_hat = _cast(operands, "input", x, x_gemms, meets)
        second_hat = _cast(operands, "weight", second, second_gemms, meets)
        # Contracting K: axis 1 of both, unless the second one lies turned.
        x_in = _operand(operands, "output", x, x_hat, 1)
        second_in = _operand(operands, "output", second, second_hat, 0 if turned else 1)
        output = _multiply(operands, "output", x_in, second_in, dtype)
        seen: dict[Role, Seen] = {
            "input": operands.seen("input", x_hat),
            "weight": operands.seen("weight", second_hat),
        }
        if meets.commit == "now":
            operands.commit(seen)
        if meets.evaluates:
            operands.evaluate(seen, None)
        # Values lie in a workspace: backward decodes the codes.
        kept_x = _operand(operands, "grad_weight", x, x_hat, 0) if needs_second else None
        kept_second = _operand(operands, "grad_input", second, second_hat, 0) if needs_x else None
        ctx.save_for_backward(
            *((None, None) if kept_x is None else kept_x[:2]),
            *((None, None) if kept_second is None else kept_second[:2]),
        )
        ctx.operands, ctx.seen, ctx.meets = operands, seen, meets
        ctx.counted = None, frozenset()
        ctx.turned, ctx.dtypes = turned, (x.dtype, second.dtype)
        ctx.high = {name: operands.is_high(name) for name in GEMMS}
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        operands: Operands = ctx.operands
        x_codes, x_inv, second_codes, second_inv = ctx.saved_tensors
        needs_x, needs_second, _ = asked(ctx)
        x_dtype, second_dtype = ctx.dtypes
        wanted: dict[Gemm, bool] = {"grad_input": needs_x, "grad_weight": needs_second}
        gemms: list[Gemm] = [gemm for gemm, is_on in wanted.items() if is_on]
        dy_hat, seen = cast_gradient(
            operands, _matrix(dy), gemms, ctx.meets.together, ctx.meets.splits
        )
        if ctx.meets.commit == "in backward":
            seen = uncounted(ctx, dy, dy_hat, seen)
        grad_x = grad_second = None
        if needs_x:
            # grad_input [M, K] = dy_hat [M, N] @ second_hat [N, K], contracting N.
            a = _operand(operands, "grad_input", dy, dy_hat, 1, high=ctx.high["grad_input"])
            b = GemmOperand(second_codes, second_inv, PER_TENSOR, 1 if ctx.turned else 0)
            grad_x = _multiply(operands, "grad_input", a, b, x_dtype, ctx.high["grad_input"])
        if needs_second:
            # grad_second [N, K] = dy_hat [M, N].T @ x_hat [M, K], contracting M: axis 0 of both.
            a = _operand(operands, "grad_weight", dy, dy_hat, 0, high=ctx.high["grad_weight"])
            b = GemmOperand(x_codes, x_inv, PER_TENSOR, 0)
            a, b = (b, a) if ctx.turned else (a, b)
            grad_second = _multiply(
                operands, "grad_weight", a, b, second_dtype, ctx.high["grad_weight"]
            )
        if ctx.meets.commit == "in backward":
            operands.commit({**ctx.seen, "grad_output": seen}, dy)
            ctx.seen = {}  # a graph that is kept makes one cast more, and not three
        return grad_x, grad_second, *[None] * 4


def _cast(
    operands: Operands,
    role: Role,
    x: Tensor,
    gemms: list[Gemm],
    meets: Meets,
) -> Hat:
    matrix = _matrix(x)
    scale = first_scale(operands, role, matrix, meets.together)
    return operands.cast(role, matrix, gemms, scale=scale, splits=meets.splits, in_batch=True)


def _matrix(x: Tensor) -> Tensor:
    """Return all matrices of a batch as one, row after row."""
    return x.reshape(-1, x.shape[-1])


def _operand(
    operands: Operands, name: Gemm, x: Tensor, hat: Hat, axis: Axis, high: bool | None = None
) -> GemmOperand:
    """Return what a batch of GEMMs multiplies of an operand, in the shape of the batch."""
    if operands.is_high(name) if high is None else high:
        return plain_operand(x, axis)
    q = hat.casts.get(1)
    if q is None:
        return plain_operand(x, axis)
    values = None if q.values is None else q.values.view(x.shape)
    return GemmOperand(q.codes.view(x.shape), q.scale_inv, PER_TENSOR, axis, values)


def _multiply(
    operands: Operands,
    name: Gemm,
    a: GemmOperand,
    b: GemmOperand,
    dtype: torch.dtype,
    high: bool | None = None,
) -> Tensor:
    if not (operands.is_high(name) if high is None else high):
        return matmul_each(a, b, accumulate=operands.modes[name], out_dtype=dtype)
    left, right = (x.tensor if x.axis == 1 else x.tensor.mT for x in (a, b))
    with torch.autocast(left.device.type, enabled=False):
        return torch.bmm(left, right.to(left.dtype).mT).to(dtype)
