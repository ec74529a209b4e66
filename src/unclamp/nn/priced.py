"""What a product sets aside in its forward, so that backward can price the casts.

The loss depends on a product's operands through its output alone. So what is priced is the cast of
input and weight that the GEMM of the output multiplies: where blocks are not square the other GEMMs
have casts of their own, which change gradients, and not the loss of their step. A gradient's cast
changes no loss either: what it takes from the update is measured apart (`gradient`).

An input that wants no gradient, such as the data themselves, has a price all the same: what is
needed of its gradient is made for it, of the weight's codes. A weight that is not trained has none.

What else has no price in a step: products of tensors that ranks have parts of (the gradients of
which may be partial sums), attention's, and those of a compiled graph. A cast that clamped and has
no price makes its row's unknown.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unclamp.names import Role
from unclamp.nn.casts import NOTHING_SEEN, Hat, Seen
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.operands import HIGH, Operands
from unclamp.nn.update import LOOKS_AT_ALL
from unclamp.numerics import CastPlan, Quantized, Stat
from unclamp.numerics.cast import dequantize_codes
from unclamp.numerics.gpu import host_may_look
from unclamp.numerics.price import (
    CutOff,
    clamp_price,
    clamped_rows,
    cut_off,
    price_look,
    whole_price,
)

Wanted = Literal["comes", "to be made", "never"]
"""Whether backward computes the gradient by an operand, or it would have to be made."""
SHARES: tuple[Role, Role] = ("input", "weight")
"""The roles whose casts change the loss."""


class Aside(NamedTuple):
    """What waits for the gradients by a product's operands.

    Attributes:
        cuts: What clamping took, by role.
        plans: Of roles whose operand is kept whole, how it was cast.
        makes_input: Whether the gradient by the input is to be made; what it is made of are the
            last two tensors kept.
        weight_plan: How the weight was cast; None: it was not.
    """

    cuts: Mapping[Role, CutOff]
    plans: Mapping[Role, CastPlan]
    makes_input: bool = False
    weight_plan: CastPlan | None = None

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

    def made_look(self, dy: Tensor, kept: Sequence[Tensor], smooth: Tensor | None) -> Tensor:
        """Return the look of an input whose gradient nobody computed, of that of the output.

        Only tokens with a clamped element are multiplied, unless the input is kept whole, or the
        host does not know which these are.
        """
        weight, scale_inv = kept[-2:]
        values = weight.detach().to(torch.float32)
        if self.weight_plan is not None:
            grain = self.weight_plan.granularity
            values = dequantize_codes(weight, scale_inv, granularity=grain, axis=1)
            values = values if smooth is None else values * smooth
        dy = dy.detach().to(torch.float32)
        if dy.device.type != "cpu" or "input" not in self.cuts:
            return self.look("input", dy @ values, kept, smooth)
        rows, own = clamped_rows(self.cuts["input"], values.shape[1])
        return price_look(clamp_price(own, dy[rows] @ values))


NOTHING_ASIDE = Aside({}, {})


def set_aside(
    operands: Operands,
    seen: dict[Role, Seen],
    hats: Mapping[Role, Hat],
    plain: Mapping[Role, Tensor],
    wanted: Mapping[Role, Wanted],
    smooth: Tensor | None,
) -> tuple[Aside, tuple[Any, ...]]:
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
    if not has_prices(operands):
        return NOTHING_ASIDE, ()
    cuts: dict[Role, CutOff] = {}
    plans: dict[Role, CastPlan] = {}
    kept: list[Any] = []
    for role in SHARES:
        q = hats[role].casts.get(1)
        if q is None or not _wants_look(operands, q):
            continue
        if wanted[role] == "never" or isinstance(plain[role], GatheredCodes):
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
    if wanted["input"] != "to be made" or not ("input" in cuts or "input" in plans):
        return Aside(cuts, plans), tuple(kept)
    w = hats["weight"].casts.get(1)
    kept += [plain["weight"].detach(), None] if w is None else [w.codes, w.scale_inv]
    return Aside(cuts, plans, True, None if w is None else w.plan), tuple(kept)


def with_prices(seen: Mapping[Role, Seen], looks: Mapping[Role, Tensor]) -> dict[Role, Seen]:
    """Return what was seen, and prices."""
    return {**seen, **{r: _with(seen.get(r, NOTHING_SEEN), look) for r, look in looks.items()}}


def _with(seen: Seen, look: Tensor) -> Seen:
    return seen._replace(details=look if seen.details is None else seen.details + look)


def has_prices(operands: Operands) -> bool:
    """Whether casts of a product may have a price: whether anything is to be set aside."""
    if operands.inspection == "never" or torch.compiler.is_compiling():
        return False
    if operands.inspection == "gradients" and operands.pending.device.type != "cpu":
        return False
    return operands.modes["output"] != HIGH  # else the loss depends on no cast


def _wants_look(operands: Operands, q: Quantized) -> bool:
    return operands.inspection in LOOKS_AT_ALL or not _has_clamped_nothing(q)


def _has_clamped_nothing(q: Quantized) -> bool:
    # An element of a tensor takes ten times as long to look at as one of a list.
    return host_may_look(q.stats) and not q.stats.tolist()[Stat.SATURATED] > 0


def _factor(role: Role, smooth: Tensor | None) -> Tensor | None:
    """Return by what each column of a smoothed operand is multiplied to be what it was."""
    if smooth is None:
        return None
    factor = smooth.reshape(-1)
    return factor.reciprocal() if role == "input" else factor
