"""What FP8 would do to an attention that is computed without it, counted beside it.

The plain attention, whatever its kernel, keeps its probabilities to itself. So they are made once
more here, from queries and keys, and again in backward, where the gradient of the scores is made of
them; never more than `MOST_SCORES` at a time. Counting draws no random number and changes no bit.

Which steps are counted `nn.counting` says. Where not all of them are, scales come from those that
were counted before.

Which probabilities a fused kernel dropped nobody knows: with dropout they are counted as if none
were, each as large as those that stay are.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unclamp.names import Gemm, Role
from unclamp.nn.casts import Seen
from unclamp.nn.counting import is_counted
from unclamp.nn.layout import AXES
from unclamp.nn.operands import Operands
from unclamp.nn.product import Commit, when_to_commit
from unclamp.nn.rehearsal import rehearses
from unclamp.nn.scores import Attended, Part, Shape, parts
from unclamp.numerics import CastPlan, Quantized, scale_from_amax
from unclamp.numerics.gpu import host_may_look
from unclamp.numerics.inspection import INSPECTED
from unclamp.numerics.operators import quantize_operand
from unclamp.numerics.scale import choose_scale
from unclamp.numerics.stats import Stat, merged_stats


def counted(
    qk: tuple[Operands, ...],
    pv: tuple[Operands, ...],
    output: Tensor,
    attended: Attended,
    *,
    training: bool,
    turns: bool,
) -> Tensor:
    """Return an attention's output, and have its casts counted: now, or when its backward runs.

    Args:
        qk: The products that make scores: one, or one for each head of the keys.
        pv: Those that sum values.
        output: What `[B, H, L, E]` can be viewed as, or `[B, L, H, E]` where it `turns`.
        attended: What made it.
        training: Whether the module trains.
        turns: See `output`.
    """
    q, k, v = attended.q, attended.k, attended.v
    commit: Commit = None
    for each in () if rehearses() else (*qk, *pv):
        commit = when_to_commit(each, q, k, v, training=training)
    if commit is None:
        return output
    counts = [
        _Count(operands=each, is_scores=products is qk, head=head if len(products) > 1 else None)
        for products in (qk, pv)
        for head, each in enumerate(products)
        if is_counted(each)
    ]
    plain, device = attended.detached(), q.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.no_grad(), torch.autocast(device, enabled=False):
        cast = plain.in_dtype(autocast)
        seen = [count.forward(cast) for count in counts]
    if commit == "now":
        for count, own in zip(counts, seen, strict=True):
            count.operands.commit(own)
        return output
    rest = plain.without_tensors()
    held = _Held(rest=rest, counts=counts, seen=seen, turns=turns, dtype=autocast)
    shown = _Counted.apply(output, q, k, v, held)
    # As `nn.product` does it: no view, which nobody may write into.
    return torch.ops.aten._unsafe_view(shown, output.shape)


@dataclass(frozen=True, kw_only=True)
class _Count:
    """What is counted of one product.

    Attributes:
        operands: Its plan and state.
        is_scores: Whether it is `qk`, and else `pv`.
        head: The head of the keys that it is of; None: of all.
    """

    operands: Operands
    is_scores: bool
    head: int | None

    def forward(self, attended: Attended) -> dict[Role, Seen]:
        """Return what casts of both operands see."""
        one = attended if self.head is None else attended.of_head(self.head)
        if self.is_scores:
            return {"input": self._whole("input", one.q), "weight": self._whole("weight", one.k)}
        p = self._parts("input", one.shape, lambda part: one.probabilities(one.scores(part), part))
        return {"input": p, "weight": self._whole("weight", one.v)}

    def backward(self, attended: Attended, dy: Tensor) -> Seen:
        """Return what a cast of the gradient sees, made of that of the output `[B, H, L, E]`."""
        one = attended
        if self.head is not None:
            one, dy = one.of_head(self.head), dy[:, one.heads_of(self.head)]
        if not self.is_scores:
            return self._whole("grad_output", dy)
        return self._parts("grad_output", one.shape, lambda part: one.score_gradient(dy, part))

    def _whole(self, role: Role, x: Tensor) -> Seen:
        gemms: list[Gemm] = [gemm for own, gemm in AXES if own == role]
        return self.operands.seen(role, self.operands.cast(role, x.reshape(-1, x.shape[-1]), gemms))

    def _parts(self, role: Role, shape: Shape, make: Callable[[Part], Tensor]) -> Seen:
        """Return what one cast of a tensor sees that is never there as a whole."""
        plan = self.operands.plans[role]
        cut = list(parts(shape))
        if plan is None or not cut:
            return Seen()
        matrices: Iterable[Tensor] = _Matrices(cut, make)
        matrices = list(matrices) if len(cut) == 1 else matrices
        scale, recast = _scale_of(matrices, plan, self.operands.scales[role, 1])
        plain = replace(plan, guard=False)
        casts = [
            self.operands.inspected(x, quantize_operand(x, scale, plain, 1, slot=role))._replace(
                codes=x.new_empty(0), values=None
            )
            for x in matrices
        ]
        return _seen(casts, recast)


class _Matrices:
    """The parts of a tensor one after the other, made anew whenever they are asked for."""

    def __init__(self, cut: list[Part], make: Callable[[Part], Tensor]) -> None:
        self._cut, self._make = cut, make

    def __iter__(self) -> Iterator[Tensor]:
        for part in self._cut:
            made = self._make(part)
            yield made.reshape(-1, made.shape[-1])


def _scale_of(
    matrices: Iterable[Tensor], plan: CastPlan, given: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the scale that a cast of the whole tensor has, and 1 where it is cast again."""
    # On a CPU a scale that is there saves the amax; of a device nobody asks: the host would wait.
    if given is not None and host_may_look(given) and not plan.guard and given > 0:
        return given, None
    amaxes = [torch.nan_to_num(x, 0, 0, 0).abs().amax() for x in matrices if x.numel()]
    amax = torch.stack(amaxes).amax() if amaxes else torch.zeros(())
    own = scale_from_amax(amax, plan.largest, power_of_two=plan.power_of_two)
    return choose_scale(given, own, amax, plan.format.overflow_limit if plan.guard else torch.inf)


def _seen(casts: list[Quantized], recast: Tensor | None) -> Seen:
    """Return what one cast has seen that was made in parts."""
    stats = merged_stats(torch.stack([q.stats for q in casts]))
    stats[Stat.CASTS] = 1
    if recast is not None:
        stats[Stat.RECAST] = recast
    looks = [q.details for q in casts if q.details is not None]
    if not looks:
        return Seen(stats)
    details = torch.stack(looks).sum(0)
    details[INSPECTED] = details[INSPECTED].clamp(max=1)
    return Seen(stats, details)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What waits for a backward, beside tensors that activation checkpointing may free.

    Attributes:
        rest: The attention without its tensors.
        counts: What is counted.
        seen: What the forward saw of each, until it was committed.
        turns: Whether the output has heads as its third dimension, and not its second.
        dtype: What the forward cast its tensors to, under autocast.
    """

    rest: Attended
    counts: list[_Count]
    seen: list[dict[Role, Seen]]
    turns: bool
    dtype: torch.dtype | None

    def backward(self, attended: Attended, dy: Tensor) -> None:
        """Count a gradient of the output, and commit all."""
        shape, width = attended.shape, attended.v.shape[-1]
        if self.turns:
            dy = dy.reshape(shape.batch, shape.queries, shape.heads, width).transpose(1, 2)
        else:
            dy = dy.reshape(shape.batch, shape.heads, shape.queries, width)
        for count, seen in zip(self.counts, self.seen, strict=True):
            count.operands.commit({**seen, "grad_output": count.backward(attended, dy)})
            seen.clear()  # a graph that is kept makes one cast more, and not three


class _Counted(torch.autograd.Function):
    """Nothing, forward and backward, where the gradient of an output is counted."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, q: Tensor, k: Tensor, v: Tensor, held: _Held) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.held = held
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        held: _Held = ctx.held
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            q, k, v = (t.detach() for t in ctx.saved_tensors)
            held.backward(replace(held.rest, q=q, k=k, v=v).in_dtype(held.dtype), dy.detach())
        return dy, None, None, None, None
