"""Scales of a tensor's own that several ranks agree on at the cast: `Dynamic(shared=True)`.

A tensor that is spread over ranks has, on each, an amax of its part. The single process's scale
follows from the largest of them, taken over the ranks that hold other parts *of what shares the
scale*: of a whole tensor all of them; of a row those that split the row, and not those that hold
other rows. Blocks lie within one rank's part, and need no word, if the part is a multiple of them.

Each agreement is a collective: every rank of the groups has to come by. Statistics stay those of
the rank's own part, so that sums over ranks are those of the tensor.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.names import Role, shown
from unclamp.nn.groups import (
    Groups,
    count_wrappers,
    follow_wrappers,
    groups_of,
    is_distributed,
    is_told,
    max_over,
)
from unclamp.nn.layout import Axis
from unclamp.numerics import CastPlan, channel_scale, scale_from_amax
from unclamp.numerics.blocks import block_amax, orient

if TYPE_CHECKING:
    from unclamp.nn.operands import Operands

Agreed = Mapping[Axis, Tensor]
"""The scale that ranks agreed on for a cast along an axis; none where each takes its own."""
NOT_AGREED: Agreed = MappingProxyType({})


class Split(NamedTuple):
    """How one dimension of a product is spread over ranks.

    Attributes:
        groups: Those whose ranks hold other parts of it.
        piece: Elements that lie beside each other on a rank, as they do in the single process; 0
            where the dimension is whole.
    """

    groups: Groups = ()
    piece: int = 0

    def joined(self, groups: Groups, piece: int) -> "Split":
        """Return it spread over more ranks."""
        return Split((*self.groups, *groups), math.gcd(self.piece, piece)) if groups else self


class Splits(NamedTuple):
    """How tokens, input features and output features of a product are spread at one forward.

    Attributes:
        tokens: The first axis of input and gradient.
        inputs: The second axis of input and weight.
        outputs: The first axis of the weight, and the second of the gradient.
        mesh: All groups of the mesh of its DTensors, of which nothing else is to be found out.
        told: Groups of which nobody knows what they split: `convert(..., group=)`.
    """

    tokens: Split = Split()
    inputs: Split = Split()
    outputs: Split = Split()
    mesh: Groups = ()
    told: Groups = ()

    def of(self, role: Role) -> tuple[Split, Split]:
        """Return those of an operand's two axes, as the product holds it."""
        if role == "weight":
            return self.outputs, self.inputs
        return self.tokens, self.inputs if role == "input" else self.outputs


WHOLE = Splits()


def splits_at(operands: "Operands", known: Splits, tokens: int, *, evaluates: bool) -> Splits:
    """Return how a forward is spread: as tensors say (`known`), and by data parallelism.

    An evaluation is not spread over the ranks of data parallelism: one of them may evaluate alone.

    Args:
        operands: The product's.
        known: Over which ranks of tensor parallelism, and how.
        tokens: Tokens on this rank.
        evaluates: Whether it is an evaluation.
    """
    if evaluates or not is_distributed():
        return known
    there = {_ranks(group) for group in known.mesh}
    found = _found(operands)
    others = tuple(group for group in found.groups if _ranks(group) not in there)
    if found.is_told:
        return known._replace(told=others)
    return known._replace(tokens=known.tokens.joined(others, tokens))


def agreed_scales(
    operands: "Operands", role: Role, x: Tensor, axes: list[Axis], plan: CastPlan, splits: Splits
) -> Agreed:
    """Return the scales of an operand's casts that are agreed on; a collective for each.

    Numerics: those of a cast that takes its own scale, of the whole tensor: amax over finite
    elements, and 1 where it is 0.

    Raises:
        UnsupportedError: Blocks that would lie on several ranks.
    """
    scales: dict[Axis, Tensor] = {}
    for axis in axes:
        groups = _sharing(operands, role, axis, plan, splits)
        if groups:
            amax = _max_over(groups, _finite_amax(x, plan, axis))
            scales[axis] = scale_from_amax(amax, plan.largest, power_of_two=plan.power_of_two)
    return scales


def smoothing(operands: "Operands", x: Tensor, splits: Splits) -> Tensor:
    """Return `channel_scale`; where scales are agreed on, of the tokens of all ranks."""
    groups = (*splits.tokens.groups, *splits.told) if operands.shares else ()
    if not groups:
        return channel_scale(x)
    amax = block_amax(_magnitude(x).t(), (1, None))[:, 0]
    return scale_from_amax(_max_over(groups, amax), 1.0, power_of_two=True)


def _sharing(
    operands: "Operands", role: Role, axis: Axis, plan: CastPlan, splits: Splits
) -> Groups:
    """Return the groups over which elements lie that share a scale of a cast."""
    if plan.granularity.is_whole:
        first, second = splits.of(role)
        return tuple(dict.fromkeys((*first.groups, *second.groups, *splits.told)))
    if splits.told:
        raise UnsupportedError(
            f"{shown(operands.fqn)}: expected Dynamic(shared=True) of whole tensors under "
            f"convert(..., group=), got {plan.granularity}: nobody says which rows the ranks split"
        )
    first, second = splits.of(role)
    across_along = (first, second) if axis == 1 else (second, first)
    found: list[object] = []
    for split, length in zip(across_along, plan.granularity.block, strict=True):
        if length is None:
            found += split.groups
        elif split.groups and split.piece % length:
            raise UnsupportedError(
                f"{shown(operands.fqn)}: expected blocks of {role} that lie on one rank each for "
                f"Dynamic(shared=True), got blocks {plan.granularity} of parts of {split.piece} "
                "elements; use blocks that divide the parts, or shared=False, whose blocks are "
                "those of the parts"
            )
    return tuple(dict.fromkeys(found))


def _finite_amax(x: Tensor, plan: CastPlan, axis: Axis) -> Tensor:
    magnitude = _magnitude(x)
    if not plan.granularity.is_whole:
        return block_amax(orient(magnitude, axis), plan.granularity.block)
    return magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())


def _magnitude(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.detach().to(torch.float32), 0, 0, 0).abs()


def _max_over(groups: Groups, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return max_over(groups, x)
    # A graph holds collectives that give their result, and none that write into a tensor.
    from torch.distributed._functional_collectives import all_reduce, wait_tensor  # noqa: PLC0415

    for group in groups:
        x = wait_tensor(all_reduce(x, "max", group))
    return x


class Found(NamedTuple):
    """The groups of a product's ranks, and when they were looked up.

    Attributes:
        groups: As `nn.groups` finds them.
        is_told: Whether the user said them.
        wrappers: How many wrappers there were.
    """

    groups: Groups = ()
    is_told: bool = False
    wrappers: int = -1


def _found(operands: "Operands") -> Found:
    """Return the groups of a product's ranks; looked up again where a wrapper came or went."""
    if torch.compiler.is_compiling():
        return operands.found
    follow_wrappers()
    if operands.found.wrappers != count_wrappers():
        ledger = operands.ledger
        product = ledger.clock.products(ledger)[operands.number]
        module = None if product.module is None else product.module()
        if module is not None:
            groups = groups_of(module, ledger.clock.model)
            operands.found = Found(groups, is_told(module), count_wrappers())
    return operands.found


def _ranks(group: object) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))  # pyright: ignore
