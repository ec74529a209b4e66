"""The three operands of one matrix product: how each is cast, and where its state lies.

`Operands` is what a product's forward and backward read. It is the recipe's plan for the product,
and views of the ledger's tensors, so that a compiled graph can guard on the former, take the
latter as inputs, and serve any product with the same plan.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unclamp.names import GEMMS, ROLES, Gemm, Role
from unclamp.nn.agreed import NOT_AGREED, WHOLE, Agreed, Found, Splits, agreed_scales
from unclamp.nn.casts import NOTHING_SEEN, Hat, Seen
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.layout import AXES, Axis, Site
from unclamp.nn.noted import NO_VERSION, Doubt, Noted, Origin, is_other, noted, noted_in_a_copy
from unclamp.nn.update import Inspection
from unclamp.numerics import CastPlan, Quantized, empty_details, empty_stats
from unclamp.numerics.gpu import goes_to_gpu, is_capturing
from unclamp.numerics.operators import (
    add_details,
    commit,
    inspect_operand,
    quantize_operand,
    raise_amax,
)
from unclamp.numerics.stats import merged_stats
from unclamp.rule import LayerPlan, Mode, Operand
from unclamp.scaling import HighPrecision

if TYPE_CHECKING:
    from unclamp.nn.ledger import Ledger

HIGH = HighPrecision.kind
TOKENS_AN_OUTPUT = 10
"""Tokens for each output feature from which on the codes of a weight are kept on a GPU."""

KEPT = (
    "ledger", "indices", "smooth", "modes", "is_saved", "ignored", "weight_name", "only_observed",
)  # fmt: skip
"""What copies and pickles of a product keep; the rest is views, taken anew."""


class Operands:
    """One product's plan, and views of its state in the ledger.

    Attributes:
        indices: Each role's index among the ledger's sites.
        number: The product's place among the ledger's.
        plans: How each role is cast; None in high precision.
        modes: How each GEMM adds, or "high_precision".
        smooth: Whether the input is scaled by channel, and the weight by the inverse.
        only_observed: Whether it is never computed in FP8, whatever its plan says.
        counts_only: Whether casts are only counted, and the product is computed without them.
        is_plain: Whether nothing is cast at all.
        shares: The roles whose own scales ranks agree on.
        found: The groups of its ranks, where some role's are.
        scales: Views of the ledger's scales, 0-d per tensor, by role and axis; None where the
            cast takes its own.
        pending: View of the ledger's statistics, `[3, len(Stat)]`.
        square: Whether a cast of a role serves both its GEMMs.
        block_amax: Views of the ledger's amaxes of blocks, by role and axis, where a history has
            more than one.
        is_gathered: Whether the weight is put together for a forward, and let go until backward.
        inspection: Which casts get a closer look.
        details: View of the ledger's closer looks, `[3, DETAILS]`; None until there is any.
        nothing: What a role without a cast commits, and without a closer look.
        evaluated: View of the ledger's statistics of evaluations, `[3, len(Stat)]`.
        guarded_weight: How a weight is cast that must not clamp; None where its scale has no
            history that could be of another weight.
        is_saved: Whether its state is part of a state_dict where that of others is.
        on_end: What is to be undone when the module is reverted; in no copy.
        ignored: Sets of keys that a library leaves out of its files (`nn.exports`).
        silent_forwards: Forwards of which no training counts anything, compiled ones aside.
        noted: The weight when an optimizer's step, or a state_dict, last set it; None: unknown.
        origin: The weight when scales last came from elsewhere.
        last_passed: Updates so far when a gradient last passed through it while it was frozen.
        module: The module that casts by them, as long as it lives; None: unknown.
        committed_after: Updates when it first committed by these views; None: not yet.
        weight_name: What that calls the parameter that its second operand is, or lies in; None
            where it is computed.
    """

    noted: Noted | None = None
    module: "weakref.ref[nn.Module] | None" = None
    committed_after: int | None = None
    last_passed, silent_forwards = -2, 0
    found = Found()
    is_saved = True
    only_observed = is_gathered = False
    on_end: Callable[[], None] | None = None
    ignored: tuple[set[str], ...] = ()
    weight_name: str | None = "weight"
    version_asked: int | None = None  # of the weight, when a checkpoint asked what can be loaded

    def __init__(self, ledger: "Ledger", indices: dict[Role, int], plan: LayerPlan) -> None:
        self.ledger = ledger
        self.origin = Origin()
        self.indices = dict(indices)
        self.smooth = plan.smooth
        self.modes: dict[Gemm, str] = {
            g: m if isinstance(m, str) else HIGH for g, m in plan.gemms.items()
        }
        self.bind()
        ledger.layers.add(self)

    def bind(self) -> None:
        """Take the plan and the views anew: after anything in the ledger but numbers changed."""
        ledger, first, self.committed_after = self.ledger, self.indices["input"], None
        self.number = first // len(ROLES)
        sites: dict[Role, Site] = {r: ledger.sites[index] for r, index in self.indices.items()}
        self.plans: dict[Role, CastPlan | None] = {r: s.cast_plan for r, s in sites.items()}
        self.square = {r: s.operand.scaling.granularity.is_square for r, s in sites.items()}
        self.shares = frozenset(r for r, site in sites.items() if site.operand.scaling.shared)
        self.counts_only = ledger.is_warming or self.only_observed
        self.is_plain = all(not self._needs_cast(role) for role in ROLES)
        self.pending = ledger.pending[first : first + len(ROLES)]
        self.evaluated = ledger.evaluated.stats[first : first + len(ROLES)]
        self.guarded_weight = sites["weight"].guarded_plan
        self.inspection: Inspection = ledger.inspection
        details = ledger.details
        self.details = None if details is None else details[first : first + len(ROLES)]
        device = ledger.pending.device
        self.nothing = (empty_stats(1, device)[0], empty_details(1, device)[0])
        self.scales: dict[tuple[Role, Axis], Tensor | None] = {}
        self.block_amax: dict[tuple[Role, Axis], Tensor] = {}
        for role, site in sites.items():
            self._bind_role(role, site, ledger.first_row[self.indices[role]])

    def _bind_role(self, role: Role, site: Site, row: int) -> None:
        scaling, grids = site.operand.scaling, site.grids
        takes_own = scaling.takes_own or not scaling.casts
        for axis in (1, 0):
            grid = grids.get(axis)
            scale = self.ledger.scale[row]
            if grid is not None:
                last = row + grid[0] * grid[1]
                scale = self.ledger.scale[row:last].view(grid)
                self.block_amax[role, axis] = self.ledger.block_amax[row:last].view(grid)
                row = last
            self.scales[role, axis] = None if takes_own else scale

    def plan(self) -> LayerPlan:
        """Return the plan as it is now: what was given to it, and every switch since."""
        gemms: dict[Gemm, Mode] = {
            gemm: HighPrecision() if mode == HIGH else mode for gemm, mode in self.modes.items()
        }
        operands: dict[Role, Operand] = {role: self.operand(role) for role in ROLES}
        return LayerPlan(operands=operands, gemms=gemms, smooth=self.smooth)

    @property
    def fqn(self) -> str:
        """The product's name, as it stands now."""
        return self.ledger.sites[self.indices["input"]].fqn

    @property
    def has_state(self) -> bool:
        """Whether its state is part of a state_dict: not where it is only observed."""
        return self.is_saved and self.ledger.is_in_state_dicts and not self.only_observed

    def parameter_in(self, module: nn.Module | None) -> nn.Parameter | None:
        """Return the parameter in which its second operand lies; None where there is none."""
        if module is None or self.weight_name is None:
            return None
        return module._parameters.get(self.weight_name)

    def operand(self, role: Role) -> Operand:
        """Return what this role gets, as it stands now."""
        return self.ledger.sites[self.indices[role]].operand

    def _needs_cast(self, role: Role) -> bool:
        used: list[Gemm] = [gemm for gemm in GEMMS if (role, gemm) in AXES]
        return self.plans[role] is not None and any(self.modes[gemm] != HIGH for gemm in used)

    @property
    def is_at_the_bottom(self) -> bool:
        """Whether no gradient has lately passed through the frozen product to what lies below."""
        return self.ledger.turns.made - self.last_passed > 1

    def is_high(self, gemm: Gemm) -> bool:
        """Whether a GEMM computes from operands that are not cast."""
        return self.counts_only or self.modes[gemm] == HIGH

    def remakes_weight(self, weight: Tensor, tokens: int) -> bool:
        """Whether backward casts the weight again, and does not keep its codes.

        On a GPU, where a cast costs little next to a GEMM, and the codes of a weight with many
        outputs would be most of what is kept: with them, more than 0.55 of a plain layer's.
        Everywhere if the weight is sharded: its codes would be all of it, on each rank.
        """
        if isinstance(weight, GatheredCodes):  # FSDP2 frees the codes, and brings them again
            return False
        if self.is_gathered:
            return self.plans["weight"] is not None and not self.is_high("grad_input")
        is_kept = weight.shape[0] * TOKENS_AN_OUTPUT <= tokens
        if is_kept or not goes_to_gpu(weight) or self.smooth or self.is_high("grad_input"):
            return False
        return self.plans["weight"] is not None and self.square["weight"]

    def cast(
        self,
        role: Role,
        x: Tensor,
        gemms: Iterable[Gemm],
        *,
        doubt: Doubt = None,
        scale: Tensor | None = None,
        splits: Splits = WHOLE,
        agreed: Agreed = NOT_AGREED,
        in_batch: bool = False,
        shows_wild: bool = False,
    ) -> Hat:
        """Cast an operand for these GEMMs: once where its blocks are square, else once an axis.

        Args:
            role: Which operand.
            x: The tensor, or this rank's part.
            gemms: What it enters.
            doubt: Whether its scale may be another tensor's.
            scale: In place of the role's own, where the tensor has one scale.
            splits: How it is spread over ranks, who agree on its scales.
            agreed: Scales that they agreed on before.
            in_batch: Whether it is a batch of matrices, which a GEMM wants decoded whole.
            shows_wild: Whether it may stand for NaN alone where an element is not finite; what a
                kernel can do at no cost, `Quantized.shows_wild`.
        """
        plan = self.plans[role] if doubt is None else self.guarded_weight
        axes: list[Axis] = [AXES[role, g] for g in gemms if self.modes[g] != HIGH] if plan else []
        if plan is None or not axes:
            return Hat(x, {})
        if isinstance(x, GatheredCodes):  # cast where its shards are, and counted there
            return Hat(x, {1: x.quantized, 0: x.quantized})
        # Values are wanted by what is multiplied at once; backward decodes what it keeps.
        at_once = role == "grad_output"
        if role in self.shares and not agreed:
            agreed = agreed_scales(self, role, x, [1] if self.square[role] else axes, plan, splits)
        if not self.square[role]:
            casts: dict[Axis, Quantized] = {}
            for axis in axes:
                made = quantize_operand(
                    x, self._scale(role, axis, doubt, agreed), plan, axis,
                    slot=f"{role} {axis}" if axis == 1 or at_once else None,
                    is_whole=in_batch, measured=self.is_measured,
                )  # fmt: skip
                casts[axis] = self.inspected(x, made)
            return Hat(x, casts, agreed)
        # Codes of the gradient are gone with the backward that makes them.
        q = quantize_operand(
            x, self._scale(role, 1, doubt, agreed, scale), plan, 1,
            slot=role, keeps_codes=not at_once, is_whole=in_batch, turned=0 in axes,
            measured=self.is_measured, shows_wild=shows_wild,
        )  # fmt: skip
        q = self.inspected(x, q)
        return Hat(x, {1: q, 0: q}, agreed)

    @property
    def is_measured(self) -> bool:
        """Whether its scales are hardly 0, for speed alone; no graph asks: it serves all steps."""
        first = None if torch.compiler.is_compiling() else self.committed_after
        return first is not None and self.ledger.steps.made > first

    def _scale(
        self, role: Role, axis: Axis, doubt: Doubt, agreed: Agreed, given: Tensor | None = None
    ) -> Tensor | None:
        own = self.scales[role, axis] if given is None else given
        scale = None if doubt == "own" else own
        return agreed.get(axis, scale) if agreed else scale

    def inspected(self, x: Tensor, q: Quantized) -> Quantized:
        """Return a cast with its closer look, where one is wanted."""
        if self.inspection in ("never", "gradients"):
            return q
        only_clamped = self.inspection == "clamped"
        return q._replace(details=inspect_operand(x, q, only_clamped=only_clamped))

    def seen(self, role: Role, hat: Hat) -> "Seen":
        """Return what the ledger wants to know of a role's casts, and nothing of the codes."""
        if not hat.casts:
            return Seen()
        if self.square[role] and not self.block_amax:  # as with a scale a tensor
            q = hat.casts[1]
            return Seen(q.stats, q.details)
        made = [hat.casts[1]] if self.square[role] else list(hat.casts.values())
        stats = (
            made[0].stats if len(made) == 1 else merged_stats(torch.stack([q.stats for q in made]))
        )
        blocks = {a: q.amax for a, q in hat.casts.items() if (role, a) in self.block_amax}
        looks = [q.details for q in made if q.details is not None]
        details = torch.stack(looks).sum(0) if len(looks) > 1 else looks[0] if looks else None
        return Seen(stats, details, blocks.get(1), blocks.get(0))

    def commit(self, seen: Mapping[Role, "Seen"], after: Tensor | None = None) -> None:
        """Hand statistics, closer looks and amaxes of blocks to the ledger.

        A backward says `after` which of its tensors, so that a compiled one does it too.
        """
        if not torch.compiler.is_compiling():
            if self.committed_after is None:
                self.committed_after = self.ledger.updates
            self.ledger.captured.is_in_graph |= is_capturing()
        for role, one in seen.items():
            self._raise_amax(role, 1, one.amax_1, after)
            self._raise_amax(role, 0, one.amax_0, after)
        rows = [seen.get(role, NOTHING_SEEN) for role in ROLES]
        commit(self.pending, [one.stats for one in rows], self.nothing[0], after)
        # In this order: a compiled graph that takes no closer look does not ask whether others do.
        if any(one.details is not None for one in rows) and self.details is not None:
            # One call with the whole view: in a graph, a row of it would be a tensor of its own.
            looks = [self.nothing[1] if one.details is None else one.details for one in rows]
            add_details(self.details, torch.stack(looks), after)

    def _raise_amax(
        self, role: Role, axis: Axis, amax: Tensor | None, after: Tensor | None
    ) -> None:
        if amax is None:
            return
        pending = self.block_amax.get((role, axis))
        # A switch since the forward may have left other blocks, or none.
        if pending is not None and pending.shape == amax.shape:
            raise_amax(pending, amax, after)

    def evaluate(self, seen: Mapping[Role, "Seen"], weight: Tensor | None) -> None:
        """Count what an evaluation's casts saw, of a weight among others, if there is one."""
        rows = [seen.get(role, NOTHING_SEEN).stats for role in ROLES]
        if torch.compiler.is_compiling():
            commit(self.evaluated, rows, self.nothing[0])
            return
        ledger = self.ledger
        is_watched = ledger.evaluated.watches(ledger.updates, self.number)
        commit(self.evaluated, rows, self.nothing[0])
        if is_watched:
            ledger.evaluated.look(
                ledger.sites, ledger.updates,
                is_written=lambda: weight is not None and self.origin.is_written(weight),
            )  # fmt: skip

    def belong_to(self, module: nn.Module) -> None:
        """Take a module for the one that casts by these; a shallow copy of it changes nothing."""
        if self.module is None or self.module() is None:
            self.module = weakref.ref(module)
            self.ledger.clock.look_again()

    def end(self) -> None:
        """Undo what hangs on the product: its module is reverted."""
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    # ---- the weight that the scale is of ---------------------------------------------------

    def note(self, weight: Tensor) -> None:
        """Take the weight as it is for the one that the scales are to follow."""
        self.noted = noted(weight)

    def note_origin(self, weight: Tensor) -> None:
        """Take the weight as it is for the one beside which scales came from elsewhere."""
        self.origin = Origin(noted(weight))

    def doubt(self, weight: Tensor) -> Doubt:
        """Return how an evaluation casts a weight, which may not be the one its scale is of.

        It was written outside of an optimizer's step (an average put in its place, an adapter
        merged) if its version says so. What is written through `.data` has no version, so no
        evaluation, of which no history learns, clamps a weight. A training does until the next
        update: that is what delayed scaling is, and it is counted.

        A compiled graph cannot ask for versions: it casts by the scale, and with the weight's own
        one if it would clamp. So where a weight was written that would not clamp (it became
        smaller), its bits are not those of eager mode. A trace keeps what was right when it was
        made; neither ever clamps a weight.
        """
        if self.guarded_weight is None:
            return None
        if not torch.compiler.is_compiling() and is_other(self.noted, weight):
            return "own"
        return "guard"

    @property
    def _is_written(self) -> bool:
        """Whether scales came from elsewhere, and the weight was written since, as versions say."""
        weight = self.parameter_in(self.module and self.module())
        is_copy = self.ledger.evaluated.source is not None
        return is_copy and weight is not None and self.origin.is_other(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Operands":
        twin = object.__new__(Operands)
        memo[id(self)] = twin
        twin.noted = noted_in_a_copy(self.noted)
        twin.origin = Origin(Noted(None, NO_VERSION if self._is_written else 0))
        # Shared with what is copied beside it, whichever comes first.
        shared = {key: copy.deepcopy(getattr(self, key), memo) for key in ("ledger", "ignored")}
        twin.__setstate__({**self.__getstate__(), **shared})
        # A module is copied before what it holds, whatever makes the copy.
        if self.module is not None and (module := memo.get(id(self.module()))) is not None:
            twin.belong_to(module)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"origin": Origin()} | self.__dict__ | state)
        self.bind()
        self.ledger.layers.add(self)
