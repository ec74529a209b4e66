"""Rows in groups, an expert's after another's, and a bank of weights as matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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


def split_rows(x: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Any]:
    """Return the rows of each expert, and of padding after them; last those after all."""
    every = [size for pair in sizes for size in pair]
    # One node of the graph, whose backward is one copy: a slice each would make as many sums.
    return list(x.split([*every, len(x) - sum(every)]))


def is_of_experts(weight: Tensor, step: int) -> bool:
    """Whether a part of a bank is experts one after the other, and no matrix of several.

    Args:
        weight: `[K, N]` or `[experts, K, N]`, a view of the bank's memory.
        step: Elements from an expert to the next there; 0 where one expert's is all of it.
    """
    if weight.ndim == 3 and len(weight) > 1:
        return weight.stride(0) == step
    return not step or weight.numel() <= step


class Matrices(torch.autograd.Function):
    """A bank `[E, K, N]` as matrices `[N, K]`: views, whose gradients are put together once.

    They are put beside each other as they are made, `[E, N, K]`: a parameter that lies so takes
    that as its gradient, without another copy.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the matrices."""
        ctx.set_materialize_grads(False)
        ctx.like = weight.new_empty(0), weight.shape
        return weight.mT.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the bank's gradient; of a matrix without one, zeros."""
        like, (experts, inputs, outputs) = ctx.like
        made = like.new_empty(experts, outputs, inputs)
        for row, grad in zip(made, grad_outputs, strict=True):
            row.zero_() if grad is None else row.copy_(grad)
        return made.mT
