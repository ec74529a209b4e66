"""The three sites of one layer: how its operands are cast, and where their state lies.

`LayerSites` is what the layer's forward and backward read. It is the recipe's plan for the layer
in plain types, and views of the ledger's tensors, so that a compiled graph can guard on the
former, take the latter as inputs, and serve any layer with the same plan.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unclamp.names import GEMMS, ROLES, Gemm, Role
from unclamp.nn.layout import Axis, Site
from unclamp.nn.update import Inspection
from unclamp.numerics import (
    GemmOperand,
    empty_details,
    empty_stats,
    merged_stats,
)
from unclamp.numerics.gpu import architecture, goes_to_gpu, is_capturing
from unclamp.numerics.gpu.formats import native_format
from unclamp.numerics.operators import (
    CastPlan,
    Codes,
    add_details,
    commit,
    inspect_operand,
    quantize_operand,
    raise_amax,
)
from unclamp.rule import LayerPlan, Operand
from unclamp.scaling import HighPrecision, is_square

if TYPE_CHECKING:
    from unclamp.nn.ledger import Ledger

HIGH = HighPrecision.kind
AXES: dict[tuple[Role, Gemm], Axis] = {
    ("input", "output"): 1,
    ("weight", "output"): 1,
    ("grad_output", "grad_input"): 1,
    ("weight", "grad_input"): 0,
    ("grad_output", "grad_weight"): 0,
    ("input", "grad_weight"): 0,
}
"""The axis of each operand, as the layer holds it, that each GEMM contracts."""


def native_plan(plan: LayerPlan, device: torch.device) -> LayerPlan:
    """Return a plan in the formats that a device multiplies (`numerics.gpu.formats`)."""
    arch = architecture(device)
    operands = {
        role: replace(operand, format=native_format(operand.format, arch))
        for role, operand in plan.operands.items()
    }
    return plan if operands == plan.operands else replace(plan, operands=operands)


TOKENS_AN_OUTPUT = 10
"""Tokens for each output feature from which on the codes of a weight are kept on a GPU."""

Casts = dict[Axis, Codes]
"""A role's casts by the axis that their GEMM contracts; the same one twice if it serves both."""


class Seen(NamedTuple):
    """What a role's casts tell the ledger: statistics, amaxes of blocks with a history, and the
    closer look where one was taken.
    """  # noqa: D205

    stats: Tensor
    block_amax: dict[Axis, Tensor]
    details: Tensor | None = None


class LayerSites:
    """One layer's plan, and views of its state in the ledger.

    Attributes:
        indices: Each role's index among the ledger's sites.
        casts: How each role is cast; None in high precision.
        modes: How each GEMM adds, or "high_precision".
        smooth: Whether the input is scaled by channel, and the weight by the inverse.
        warming: Whether casts are only counted, and every GEMM runs in high precision.
        plain: Whether the layer is `nn.Linear`: nothing is cast.
        scales: Views of the ledger's scales, 0-d per tensor, by role and axis; None where the
            cast takes its own.
        pending: View of the ledger's statistics, `[3, len(Stat)]`.
        no_stats: What a role without a cast commits.
        square: Whether a cast of a role serves both its GEMMs.
        block_amax: Views of the ledger's amaxes of blocks, by role and axis, where a history has
            more than one.
        inspection: Which casts get a closer look.
        details: View of the ledger's closer looks, `[3, DETAILS]`; None until there is any.
        no_details: What a role that was not inspected adds.
    """

    def __init__(self, ledger: "Ledger", indices: dict[Role, int], plan: LayerPlan) -> None:
        self.ledger = ledger
        self.indices = dict(indices)
        self.smooth = plan.smooth
        self.modes: dict[Gemm, str] = {
            g: m if isinstance(m, str) else HIGH for g, m in plan.gemms.items()
        }
        self.bind()
        ledger.layers.add(self)

    def bind(self) -> None:
        """Take the plan and the views anew: after anything in the ledger but numbers changed."""
        ledger, first = self.ledger, self.indices["input"]
        sites: dict[Role, Site] = {r: ledger.sites[index] for r, index in self.indices.items()}
        self.fqn = sites["input"].fqn
        self.casts = {role: site.cast_plan for role, site in sites.items()}
        self.warming = ledger.is_warming
        self.plain = all(not self._needs_cast(role) for role in ROLES)
        self.square = {r: is_square(s.operand.scaling.granularity) for r, s in sites.items()}
        self.pending = ledger.pending[first : first + len(ROLES)]
        self.no_stats = empty_stats(1, ledger.pending.device)[0]
        self.inspection: Inspection = ledger.inspection
        details = ledger.details
        self.details = None if details is None else details[first : first + len(ROLES)]
        self.no_details = empty_details(1, ledger.pending.device)[0]
        self.scales: dict[tuple[Role, Axis], Tensor | None] = {}
        self.block_amax: dict[tuple[Role, Axis], Tensor] = {}
        for role, site in sites.items():
            self._bind_role(role, site, ledger.first_row[self.indices[role]])

    def _bind_role(self, role: Role, site: Site, row: int) -> None:
        takes_own = site.operand.scaling.takes_own or site.cast_plan is None
        for axis in (1, 0):
            grid = site.grids.get(axis)
            scale = self.ledger.scale[row]
            if grid is not None:
                last = row + grid[0] * grid[1]
                scale = self.ledger.scale[row:last].view(grid)
                self.block_amax[role, axis] = self.ledger.block_amax[row:last].view(grid)
                row = last
            self.scales[role, axis] = None if takes_own else scale

    def operand(self, role: Role) -> Operand:
        """Return what this role gets, as it stands now."""
        return self.ledger.sites[self.indices[role]].operand

    def _needs_cast(self, role: Role) -> bool:
        used: list[Gemm] = [gemm for gemm in GEMMS if (role, gemm) in AXES]
        return self.casts[role] is not None and any(self.modes[gemm] != HIGH for gemm in used)

    def remakes_weight(self, weight: Tensor, tokens: int) -> bool:
        """Whether backward casts the weight again, and does not keep its codes.

        On a GPU, where a cast costs little next to a GEMM, and the codes of a weight with many
        outputs would be most of what is kept: with them, more than 0.55 of a plain layer's.
        """
        is_kept = weight.shape[0] * TOKENS_AN_OUTPUT <= tokens
        if is_kept or not goes_to_gpu(weight) or self.smooth or self.is_high("grad_input"):
            return False
        return self.casts["weight"] is not None and self.square["weight"]

    def is_high(self, gemm: Gemm) -> bool:
        """Whether a GEMM computes from operands that are not cast."""
        return self.warming or self.modes[gemm] == HIGH

    def cast(self, role: Role, x: Tensor, gemms: Iterable[Gemm]) -> Casts:
        """Cast an operand for these GEMMs: once where its blocks are square, else once an axis."""
        plan = self.casts[role]
        axes: list[Axis] = [AXES[role, gemm] for gemm in gemms if self.modes[gemm] != HIGH]
        if plan is None or not axes:
            return {}
        if not self.square[role]:
            # Backward decodes what it keeps; only what is multiplied at once wants values.
            slots = {a: f"{role} {a}" if a == 1 or role == "grad_output" else None for a in axes}
            return {
                a: self._inspected(
                    x, quantize_operand(x, self.scales[role, a], plan, a, slot=slots[a]), plan, a
                )
                for a in axes
            }
        # Codes of the gradient are gone with the backward that makes them.
        gone = role == "grad_output"
        codes = quantize_operand(
            x, self.scales[role, 1], plan, 1, slot=role, codes_too=gone, turned=0 in axes
        )
        codes = self._inspected(x, codes, plan, 1)
        other = codes.codes if codes.turned is None else codes.turned
        return {1: codes, 0: codes._replace(codes=other, scale_inv=codes.scale_inv.t())}

    def _inspected(self, x: Tensor, codes: Codes, plan: CastPlan, axis: Axis) -> Codes:
        if self.inspection == "never":
            return codes
        only_clamped = self.inspection == "clamped"
        return codes._replace(
            details=inspect_operand(x, codes, plan, axis, only_clamped=only_clamped)
        )

    def gemm_operand(
        self, role: Role, x: Tensor, casts: Casts, gemm: Gemm, *, high: bool
    ) -> GemmOperand:
        """Return an operand as it enters a GEMM: its codes, or itself where the GEMM is `high`."""
        axis, plan = AXES[role, gemm], self.casts[role]
        if plan is None or high or axis not in casts:
            return GemmOperand(x, axis=axis)
        codes = casts[axis]
        return GemmOperand(codes.codes, codes.scale_inv, plan.granularity, axis, codes.values)

    def remake(self, weight: Tensor, scale: Tensor | None, plan: CastPlan) -> GemmOperand:
        """Return the weight as the forward cast it, for `grad_input`; it is not counted again.

        What a cast does is a function of tensor, scale and plan: the codes are the same.
        """
        codes = quantize_operand(weight, scale, plan, 1, turned=True)
        other = codes.codes if codes.turned is None else codes.turned
        return GemmOperand(other, codes.scale_inv.t(), plan.granularity, 0)

    def seen(self, role: Role, made: Casts) -> Seen:
        """Return what the ledger wants to know of a role's casts, and nothing of the codes."""
        if not made:
            return Seen(self.no_stats, {})
        vectors = [codes.stats for codes in made.values()]
        stats = vectors[0] if self.square[role] else merged_stats(torch.stack(vectors))
        blocks: dict[Axis, Tensor] = {
            a: c.amax for a, c in made.items() if (role, a) in self.block_amax
        }
        looks = [codes.details for codes in made.values() if codes.details is not None]
        if not looks:
            return Seen(stats, blocks)
        details = looks[0] if self.square[role] else torch.stack(looks).sum(0)
        return Seen(stats, blocks, details)

    def commit(self, seen: Mapping[Role, Seen]) -> None:
        """Hand statistics, and amaxes of blocks, to the ledger."""
        if not torch.compiler.is_compiling() and is_capturing():
            self.ledger.captured.is_in_graph = True
        for role, one in seen.items():
            for axis, amax in one.block_amax.items():
                pending = self.block_amax.get((role, axis))
                # A switch since the forward may have left other blocks, or none.
                if pending is not None and pending.shape == amax.shape:
                    raise_amax(pending, amax)
        stats = [seen[role].stats if role in seen else self.no_stats for role in ROLES]
        commit(self.pending, torch.stack(stats))
        looks = [seen[role].details if role in seen else None for role in ROLES]
        if any(look is not None for look in looks) and self.details is not None:
            # One call with the whole view: in a graph, a row of it would be a tensor of its own.
            rows = [self.no_details if look is None else look for look in looks]
            add_details(self.details, torch.stack(rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerSites":
        twin = object.__new__(LayerSites)
        memo[id(self)] = twin
        twin.__setstate__({**self.__getstate__(), "ledger": copy.deepcopy(self.ledger, memo)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("ledger", "indices", "smooth", "modes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.bind()
        self.ledger.layers.add(self)
