"""Prices of casts that are only counted: of a warm-up, or of an observed model.

The product is computed by autograd's own graph, and the gradients of its operands are in nobody's
hands here. So what is needed of them is made once more, of the gradient of the output and the plain
operands: of a clamped input's tokens, of a clamped weight's rows; of all of them where every cast
gets a closer look. No bit of the model changes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclamp.names import Role
from unclamp.nn.casts import Hat, Seen
from unclamp.nn.operands import Operands
from unclamp.nn.priced import Aside, Wanted, set_aside
from unclamp.numerics.gradient import ALWAYS_FEW, FEW
from unclamp.numerics.price import clamp_price, clamped_rows, price_look


class PlainPricing(NamedTuple):
    """What waits for the gradient of a product's output.

    Attributes:
        aside: What was set aside of its operands.
        kept: The tensors that belong to it.
        x: The input, where it is needed.
        weight: The weight.
        versions: Of both, as they were in the forward.
        smooth: The product's smoothing.
        few: Whether no more than few tokens or rows are multiplied.
    """

    aside: Aside
    kept: tuple[Tensor, ...]
    x: Tensor | None
    weight: Tensor
    versions: tuple[int, int]
    smooth: Tensor | None
    few: bool

    def looks(self, dy: Tensor) -> dict[Role, Tensor]:
        """Return a closer look with its price for each role that waits.

        Args:
            dy: The gradient of the output, `[T, N]`.
        """
        with torch.autocast(dy.device.type, enabled=False):
            looks: dict[Role, Tensor] = {}
            if self.aside.waits_for("input"):
                is_same = self.weight._version == self.versions[1]
                looks["input"] = self._look("input", dy, self.weight if is_same else None)
            if self.aside.waits_for("weight"):
                x = self.x
                is_same = x is not None and x._version == self.versions[0]
                looks["weight"] = self._look("weight", dy.t(), x if is_same else None)
            return looks

    def _look(self, role: Role, left: Tensor, right: Tensor | None) -> Tensor:
        """Return the look of one whose gradient is a product of these two."""
        if right is None:  # written since
            return price_look(left.new_full((), torch.nan))
        if left.device.type == "cpu":
            left, right = left.to(torch.float32), right.to(torch.float32)
        right = right.to(left.dtype)
        cut = self.aside.cuts.get(role)
        if cut is None or left.device.type != "cpu":
            return self.aside.look(role, left @ right, self.kept, self.smooth)
        rows, own = clamped_rows(cut, right.shape[1])
        if self.few and len(rows) > max(ALWAYS_FEW, FEW * len(left)):
            return price_look(left.new_full((), torch.nan))
        return price_look(clamp_price(own, left[rows] @ right))


def plain_pricing(
    operands: Operands,
    seen: dict[Role, Seen],
    hats: Mapping[Role, Hat],
    plain: tuple[Tensor, Tensor],
    wanted: Mapping[Role, Wanted],
    smooth: Tensor | None,
) -> PlainPricing | None:
    """Return what waits for the gradient of an output; None where nothing does.

    Args:
        operands: The product's.
        seen: What the casts tell the ledger; changed where a price will not be known.
        hats: The operands after their casts.
        plain: The input `[T, K]` and the weight `[N, K]`.
        wanted: Whose gradients come, and can be made.
        smooth: The product's smoothing.
    """
    x, weight = plain
    by_role: dict[Role, Tensor] = {"input": x, "weight": weight}
    aside, kept = set_aside(operands, seen, hats, by_role, wanted, smooth)
    if not (aside.cuts or aside.plans):
        return None
    return PlainPricing(
        aside, kept, x if aside.waits_for("weight") else None, weight,
        (_version(x), _version(weight)), smooth, few=operands.inspection == "gradients",
    )  # fmt: skip


def has_input_at_hand(operands: Operands, x: Tensor) -> bool:
    """Whether backward has the input whether or not anybody prices the weight.

    Not where a checkpoint or an offload takes it away meanwhile, nor where autocast makes another
    one. Who asks for whole prices keeps what they want.
    """
    if operands.inspection == "priced":
        return True
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return False
    hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return hooks._top_saved_tensors_default_hooks(True) is None


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
