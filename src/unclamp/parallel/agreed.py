"""The scale by which all ranks cast their shards of a weight.

The whole weight would be cast by one scale, and so are its shards. Under delayed and static
scaling it is known. A scale of the tensor's own (dynamic, the first of a history, that of a guard)
follows from the amax of the whole, which no rank has: the shards' amaxes of all weights are
reduced together, at most once for each time that the weights change. What a scale comes to is
decided by the functions that the cast itself uses, so that it is the same to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unclamp.nn.groups import max_over
from unclamp.nn.layout import Layout
from unclamp.nn.ledger import Ledger
from unclamp.nn.operands import Operands
from unclamp.numerics import CastPlan, scale_from_amax
from unclamp.numerics.scale import choose_scale


class Sharded(Protocol):
    """A weight of which this rank holds some rows."""

    operands: Operands

    @property
    def shard(self) -> Tensor:
        """This rank's rows, `[n, K]`; n may be 0."""
        ...

    @property
    def version(self) -> tuple[int, int]:
        """Which tensor it is and how often it was written; it changes on all ranks alike."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the shard is rounded to before its cast."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What each weight is cast by: float32 `[weights]`, and 1 where a guard took its own scale."""

    scale: Tensor
    recast: Tensor


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """What the plans of some weights come to, a row a weight."""

    rows: Tensor
    takes_own: Tensor
    largest: Tensor
    power_of_two: Tensor
    limit: Tensor


class Peers:
    """The weights that the ranks of one group have in shards, with one scale each.

    Attributes:
        group: The ranks' process group.
        weights: In the same order on all ranks.
    """

    def __init__(self, group: Any, ledger: Ledger, weights: Sequence[Sharded]) -> None:
        self.group, self.weights = group, list(weights)
        self._ledger = ledger
        self._amaxes: Tensor | None = None
        self._measured: list[tuple[int, int]] = []
        self._decided: dict[bool, tuple[Any, Decided]] = {}
        self._columns: dict[bool, tuple[Layout, _Columns]] = {}
        self._seeded: Layout | None = None

    def forget(self) -> None:
        """Measure anew: weights or scales were loaded."""
        self._amaxes = self._seeded = None
        self._decided.clear()

    def stepped(self) -> None:
        """Measure anew: an optimizer has stepped, which need not show in a version."""
        self._amaxes = None

    def scale_of(self, number: int, *, evaluates: bool) -> tuple[Tensor, Tensor]:
        """Return a weight's scale, and 1 where it is not the given one; 0-d, float32.

        All ranks of the group come by, with the same weight in the same state. Where it
        `evaluates` nothing clamps, as for a weight that is not in shards.
        """
        if self._wants_amax(number, evaluates=evaluates):
            self._measure(number)
        decided = self._decide(evaluates=evaluates)
        return decided.scale[number], decided.recast[number]

    def _wants_amax(self, number: int, *, evaluates: bool) -> bool:
        operands = self.weights[number].operands
        scaling = operands.operand("weight").scaling
        guards = scaling.guards or (evaluates and operands.guarded_weight is not None)
        return scaling.takes_own or guards or not self._all_seeded()

    def _all_seeded(self) -> bool:
        """Whether every scale that is to be given is known; the host asks until it is so."""
        ledger = self._ledger
        if self._seeded is not ledger.layout:
            columns = self._columns_of(evaluates=False)
            known = (ledger.scale[columns.rows] > 0) | columns.takes_own
            if not bool(known.all()):
                return False
            self._seeded = ledger.layout
        return True

    # ---- amaxes ----------------------------------------------------------------------------

    def _measure(self, number: int) -> None:
        if self._amaxes is None or self.weights[number].version != self._measured[number]:
            self.learn(max_over((self.group,), self.measured_here()))

    def measured_here(self) -> Tensor:
        """Return the largest finite element of each shard, float32; -1 where there is none."""
        device = self._ledger.scale.device
        amaxes = [_amax(w.shard, w.dtype) for w in self.weights]
        return torch.stack([a.to(device, non_blocking=True) for a in amaxes])

    def learn(self, amaxes: Tensor) -> None:
        """Take the amaxes of the whole weights as they are now."""
        self._amaxes = amaxes
        self._measured = [weight.version for weight in self.weights]
        self._decided.clear()

    # ---- scales ----------------------------------------------------------------------------

    def _decide(self, *, evaluates: bool) -> Decided:
        scale = self._ledger.scale
        key = (id(scale), scale._version, self._ledger.layout)
        known = self._decided.get(evaluates)
        if known is not None and known[0] == key:
            return known[1]
        columns = self._columns_of(evaluates=evaluates)
        given = torch.where(columns.takes_own, 0, scale[columns.rows])
        amaxes = torch.zeros_like(given) if self._amaxes is None else self._amaxes.clamp(min=0)
        own = scale_from_amax(amaxes, columns.largest, power_of_two=columns.power_of_two)
        used, _ = choose_scale(given, own, amaxes, columns.limit)
        made = Decided(scale=used, recast=((given > 0) & (amaxes * given > columns.limit)))
        self._decided[evaluates] = (key, made)
        return made

    def _columns_of(self, *, evaluates: bool) -> _Columns:
        layout = self._ledger.layout
        known = self._columns.get(evaluates)
        if known is None or known[0] is not layout:
            plans = [plan_of(weight.operands, evaluates=evaluates) for weight in self.weights]
            numbers = [weight.operands.indices["weight"] for weight in self.weights]
            takes_own = [
                w.operands.operand("weight").scaling.takes_own or not is_whole(w.operands)
                for w in self.weights
            ]
            device = self._ledger.scale.device

            def column(values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
                return torch.tensor(values, dtype=dtype).to(device)

            known = (
                layout,
                _Columns(
                    rows=column([layout.first_row[n] for n in numbers], torch.int64),
                    takes_own=column(takes_own, torch.bool),
                    largest=column([plan.largest for plan in plans]),
                    power_of_two=column([plan.power_of_two for plan in plans], torch.bool),
                    limit=column(
                        [p.format.overflow_limit if p.guard else torch.inf for p in plans]
                    ),
                ),
            )
            self._columns[evaluates] = known
        return known[1]


def is_whole(operands: Operands) -> bool:
    """Whether a weight has one scale. Scales of blocks are those of the rank that has the block."""
    return operands.operand("weight").scaling.granularity.is_whole


def plan_of(operands: Operands, *, evaluates: bool) -> CastPlan:
    """Return how a product's weight is cast; in an evaluation so that nothing clamps."""
    plan = operands.guarded_weight if evaluates else None
    plan = operands.plans["weight"] if plan is None else plan
    assert plan is not None
    return plan


@torch.no_grad()
def _amax(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest finite element once it is rounded to a dtype, float32; -1 without one."""
    if not x.numel():
        return torch.full((), -1.0, device=x.device)
    largest = torch.linalg.vector_norm(x, torch.inf)
    if x.device.type == "cpu" and not bool(largest.isfinite()):
        rounded = x.to(dtype)
        finite = rounded.isfinite()
        return torch.where(finite, rounded.abs(), -1).amax().to(torch.float32)
    # Rounding keeps the order. Elsewhere nobody waits for the device: a shard that is not finite
    # counts as none.
    largest = largest.to(dtype).to(torch.float32)
    return torch.where(largest.isfinite(), largest, -1)
