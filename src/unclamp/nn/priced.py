"""What a product sets aside in its forward, so that backward can price the casts.

The loss depends on a product's operands through its output alone. So what is priced is the cast of
input and weight that the GEMM of the output multiplies: where blocks are not square the other GEMMs
have casts of their own, which change gradients, and not the loss of their step. A gradient's cast
changes no loss either: what it takes from the update is measured apart (`gradient`).

What has no price in a step: casts whose gradient nobody asks for, products of tensors that ranks
have parts of (the gradients of which may be partial sums), attention's, and those of a compiled
graph. A cast that clamped and has no price makes its row's unknown.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.names import Role
from unclamp.nn.casts import NOTHING_SEEN, Hat, Seen
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.operands import HIGH, Operands
from unclamp.nn.update import LOOKS_AT_ALL
from unclamp.numerics import CastPlan, Quantized, Stat
from unclamp.numerics.price import CutOff, clamp_price, cut_off, price_look, whole_price

SHARES: tuple[Role, Role] = ("input", "weight")
"""The roles whose casts change the loss."""


class Aside(NamedTuple):
    """What waits for the gradients by a product's operands.

    Attributes:
        cuts: What clamping took, by role.
        plans: Of roles whose operand is kept whole, how it was cast.
    """

    cuts: Mapping[Role, CutOff]
    plans: Mapping[Role, CastPlan]

    def waits_for(self, role: Role) -> bool:
        """Whether a gradient is to be multiplied with what was set aside."""
        return role in self.cuts or role in self.plans

    def look(
        self, role: Role, grad: Tensor, kept: Sequence[Tensor], smooth: Tensor | None
    ) -> Tensor:
        """Return the closer look that holds a role's price.

        Args:
            role: Which.
            grad: The gradient of the loss by the operand, in its shape.
            kept: The tensors that `set_aside` gave.
            smooth: The product's smoothing.
        """
        if role in self.cuts:
            return price_look(clamp_price(self.cuts[role], grad))
        first = 3 * list(self.plans).index(role)
        x, codes, scale_inv = kept[first : first + 3]
        factor = _factor(role, smooth)
        return price_look(*whole_price(x, codes, scale_inv, self.plans[role], grad, factor))


NOTHING_ASIDE = Aside({}, {})


def set_aside(
    operands: Operands,
    seen: dict[Role, Seen],
    hats: Mapping[Role, Hat],
    plain: Mapping[Role, Tensor],
    wanted: Mapping[Role, bool],
    smooth: Tensor | None,
) -> tuple[Aside, tuple[Tensor, ...]]:
    """Return what is to wait for backward, and the tensors that it is to keep for it.

    A cast whose price nobody will know has that noted in `seen`.

    Args:
        operands: The product's.
        seen: What the casts tell the ledger.
        hats: The operands after their casts.
        plain: The operands themselves.
        wanted: Whose gradients come.
        smooth: The product's smoothing.
    """
    if not _is_asked(operands):
        return NOTHING_ASIDE, ()
    cuts: dict[Role, CutOff] = {}
    plans: dict[Role, CastPlan] = {}
    kept: list[Tensor] = []
    for role in SHARES:
        q = hats[role].casts.get(1)
        if q is None or not _wants_look(operands, q):
            continue
        if not wanted[role] or isinstance(plain[role], GatheredCodes):
            unknown = torch.where(q.stats[Stat.SATURATED] > 0, torch.nan, 0.0)
            seen[role] = _with(seen[role], price_look(unknown))
        elif operands.inspection == "priced":
            plans[role] = q.plan
            kept += [plain[role].detach(), q.codes, q.scale_inv]
        elif _has_clamped_nothing(q):
            cuts[role] = CutOff.nothing(q.stats.device)
        else:
            only_few = operands.inspection == "gradients"
            cuts[role] = cut_off(hats[role].tensor, q, _factor(role, smooth), only_few=only_few)
    return Aside(cuts, plans), tuple(kept)


def with_prices(seen: Mapping[Role, Seen], looks: Mapping[Role, Tensor]) -> dict[Role, Seen]:
    """Return what was seen, and prices."""
    return {**seen, **{r: _with(seen.get(r, NOTHING_SEEN), look) for r, look in looks.items()}}


def _with(seen: Seen, look: Tensor) -> Seen:
    return seen._replace(details=look if seen.details is None else seen.details + look)


def _is_asked(operands: Operands) -> bool:
    if operands.inspection == "never" or torch.compiler.is_compiling():
        return False
    if operands.inspection == "gradients" and operands.pending.device.type != "cpu":
        return False
    return operands.modes["output"] != HIGH  # else the loss depends on no cast


def _wants_look(operands: Operands, q: Quantized) -> bool:
    return operands.inspection in LOOKS_AT_ALL or not _has_clamped_nothing(q)


def _has_clamped_nothing(q: Quantized) -> bool:
    return q.stats.device.type == "cpu" and not q.stats[Stat.SATURATED] > 0


def _factor(role: Role, smooth: Tensor | None) -> Tensor | None:
    """Return by what each column of a smoothed operand is multiplied to be what it was."""
    if smooth is None:
        return None
    factor = smooth.reshape(-1)
    return factor.reciprocal() if role == "input" else factor
