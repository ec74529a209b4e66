"""Rows in groups, an expert's after another's, times a bank of weights: one node of the graph.

Each expert is a product by itself (`nn.gemms`). Its GEMMs write into its rows of one output, of one
gradient of the input, and into its matrix of one gradient of the bank: nothing is put together
afterwards. The bank's gradient is made as `[E, N, K]`: a parameter that lies so takes it as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unclamp.nn.gemms import Gradients, Meets, plain_gemm, run_backward, run_forward
from unclamp.nn.operands import Operands
from unclamp.nn.split import asked
from unclamp.numerics import plain_operand
from unclamp.numerics.fused import large
from unclamp.numerics.operators import sum_tokens


@dataclass(eq=False)
class Part:
    """What one expert does with rows that lie beside each other, and keeps for backward.

    Attributes:
        expert: Its number in the bank.
        rows: Which rows.
        operands: Its own; None where it computes plainly.
        meets: What is decided of its forward.
        is_padding: Whether the rows are zeros that fill up its group.
        saved: How many tensors it keeps.
    """

    expert: int
    rows: slice
    operands: Operands | None = None
    meets: Meets | None = None
    is_padding: bool = False
    saved: int = field(default=0, init=False)


class Bank(torch.autograd.Function):
    """Products of rows in groups with the matrices of a bank `[E, K, N]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]
    ) -> Tensor:
        """Return the output, `[T, N]`; rows that belong to no expert are zeros."""
        output = large(x, (len(x), weight.shape[-1]))
        output[parts[-1].rows.stop if parts else 0 :] = 0
        kept: list[Tensor | None] = []
        for part in parts:
            rows, matrix = x[part.rows], weight[part.expert].t()
            shift = None if bias is None else bias[part.expert]
            out = output[part.rows]
            if part.operands is None or part.meets is None:
                out.copy_(plain_gemm(plain_operand(rows), plain_operand(matrix), shift))
                saved = () if part.is_padding else (rows,)
            else:
                needs = ctx.needs_input_grad
                own, meets = part.operands, part.meets
                _, saved = run_forward(part, rows, matrix, shift, own, meets, needs, out)
            part.saved = len(saved)
            kept += saved
        is_plain = any(part.operands is None for part in parts)
        # Nothing of the codes may stay outside of `save_for_backward`, or checkpointing keeps it.
        ctx.save_for_backward(weight if is_plain else None, *kept)
        ctx.parts = parts
        ctx.like = x.new_empty(0), weight.new_empty(0), None if bias is None else bias.new_empty(0)
        ctx.shapes = x.shape, weight.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of rows, bank and biases, as far as they are asked for."""
        (dy,) = grad_outputs
        saved_tensors: tuple[Any, ...] = ctx.saved_tensors
        weight, kept = saved_tensors[0], saved_tensors[1:]
        needs = asked(ctx)
        grads = _room(ctx, needs)
        untouched = set(range(ctx.shapes[1][0]))
        for part in ctx.parts:
            saved, kept = kept[: part.saved], kept[part.saved :]
            dx, dw, db = grads
            outs = (
                None if dx is None else dx[part.rows],
                None if dw is None else dw[part.expert],
                None if db is None else db[part.expert],
            )
            if part.operands is None:
                is_first = part.expert in untouched
                _plain_backward(weight[part.expert], saved, dy[part.rows], outs, is_first=is_first)
            else:
                run_backward(part, saved, dy[part.rows], dy, needs, outs)
            untouched.discard(part.expert)
        for grad in (g for g in grads[1:] if g is not None):
            for expert in untouched:
                grad[expert] = 0
        dx, dw, db = grads
        if dx is not None:
            dx[ctx.parts[-1].rows.stop if ctx.parts else 0 :] = 0
        return dx, None if dw is None else dw.mT, db, None


def _room(ctx: Any, needs: tuple[bool, bool, bool]) -> Gradients:
    """Return where gradients go: `[T, K]`, `[E, N, K]` and `[E, N]`."""
    (tokens, _), (experts, inputs, outputs) = ctx.shapes
    shapes = ((tokens, inputs), (experts, outputs, inputs), (experts, outputs))
    dx, dw, db = (
        large(like, shape) if is_on else None
        for like, shape, is_on in zip(ctx.like, shapes, needs, strict=True)
    )
    return dx, dw, db


def _plain_backward(
    weight: Tensor,
    saved: Sequence[Tensor],
    dy: Tensor,
    outs: Sequence[Tensor | None],
    *,
    is_first: bool,
) -> None:
    """Put the gradients of a product that is not cast where they go.

    Args:
        weight: `[K, N]`.
        saved: The rows; none where they are zeros.
        dy: The gradient of their outputs.
        outs: Where the gradients of rows, matrix and bias go.
        is_first: Whether nothing is there yet of matrix and bias.
    """
    dx, dw, db = outs
    if dx is not None:
        dx.copy_(plain_gemm(plain_operand(dy), plain_operand(weight)))
    if dw is not None:
        rows = saved[0] if saved else dy.new_zeros(len(dy), weight.shape[0])
        made = plain_gemm(plain_operand(dy, 0), plain_operand(rows, 0))
        dw.copy_(made) if is_first else dw.add_(made)
    if db is not None:
        made = sum_tokens(dy)
        db.copy_(made) if is_first else db.add_(made)


def sizes_of(x: Tensor, offs: Tensor) -> list[tuple[int, int]]:
    """Return the rows of each group up to its last one that is not zeros, and those after it."""
    if not len(x):
        return [(0, 0)] * len(offs)
    with torch.no_grad():
        offs = offs.to(torch.int64)
        last = x.detach()[(offs - 1).clamp(min=0)].any(-1)  # NaN is something, too
        ends, is_full = torch.stack([offs, last.to(offs)]).tolist()
        starts = [0, *ends[:-1]]
        spans = list(zip(starts, ends, is_full, strict=True))
        if all(full or start == end for start, end, full in spans):
            return [(end - start, 0) for start, end, _ in spans]
        stops = _last_rows(x.detach())[offs].tolist()
    kept = [max(stop - start, 0) for start, stop in zip(starts, stops, strict=True)]
    return [(k, end - start - k) for k, start, end in zip(kept, starts, ends, strict=True)]


def _last_rows(x: Tensor) -> Tensor:
    """Return for each number of rows where, among those, the last one ends that is not zeros."""
    numbers = torch.arange(1, len(x) + 1, device=x.device)
    last = torch.where(x.any(-1), numbers, 0)
    return torch.cat([last.new_zeros(1), last.cummax(0).values])


def is_of_experts(weight: Tensor, step: int) -> bool:
    """Whether a part of a bank is experts one after the other, and no matrix of several.

    Args:
        weight: `[K, N]` or `[experts, K, N]`, a view of the bank's memory.
        step: Elements from an expert to the next there; 0 where one expert's is all of it.
    """
    if weight.ndim == 3 and len(weight) > 1:
        return weight.stride(0) == step
    return not step or weight.numel() <= step
