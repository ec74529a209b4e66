"""Change the scaling of converted layers while they train."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from unclamp.errors import ConvertError, RecipeError, did_you_mean, naming_arguments
from unclamp.names import ROLES, Role, shown
from unclamp.nn.attention_rules import as_whole, check_whole, names, product_of_attention
from unclamp.nn.ledger import Ledger
from unclamp.nn.operands import Operands
from unclamp.nn.products import products_of
from unclamp.rule import LayerPlan, Operand, as_scaling, check_plan, check_scaling, matches
from unclamp.scaling import Scaling, describe
from unclamp.shown import Shown
from unclamp.written import counted


@dataclass(frozen=True, kw_only=True, repr=False)
class SwitchReport(Shown):
    """What `switch` did.

    Attributes:
        switched: For each layer and role, the scaling before and after.
        only_counted: Those of them that are products of attentions, and only counted: a rule of
            the recipe has them computed, a switch does not.
    """

    switched: dict[str, dict[Role, tuple[Scaling, Scaling]]]
    only_counted: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.switched:
            return "switched nothing: the layers have these scalings already"
        count = counted(len(self.switched), "layer")
        lines = [f"switched {count}; where compiled by itself, each recompiles once"]
        for fqn, roles in self.switched.items():
            said = (f"{r} {describe(old)} -> {describe(new)}" for r, (old, new) in roles.items())
            counts = " (only counted)" if fqn in self.only_counted else ""
            lines.append(f"  {shown(fqn)}{counts}: {', '.join(said)}")
        return "\n".join(lines)


@naming_arguments
def switch(
    model: nn.Module,
    glob: str = "*",
    *,
    scaling: Scaling | str | None = None,
    input: Scaling | str | None = None,
    weight: Scaling | str | None = None,
    grad_output: Scaling | str | None = None,
) -> SwitchReport:
    """Give the converted layers that match another scaling, from their next cast on.

    Histories go on whatever the scaling, so delayed -> dynamic -> delayed gives the scales that
    delayed alone would have given; only a weight that comes to other blocks starts new ones.
    Formats stay. A recorder writes the switch as an event of the coming step. Where layers or
    blocks of them are compiled by themselves, each that changes recompiles once, and no other; a
    model compiled as a whole recompiles as a whole.

    Args:
        model: A model with converted layers.
        glob: Which layers, as in a recipe's rules.
        scaling: For all three roles but those that are named too; a scaling or its name.
        input: For the layers' input.
        weight: For their weight.
        grad_output: For the gradient that comes back.

    Returns:
        What changed; a role that has the scaling already is left out.

    Raises:
        ConvertError: No converted layer matches. Nothing is changed.
        RecipeError: No scaling is given, or one that makes no sense for its role; or the glob names
            products of an attention, and rows or blocks are given. A glob that names none gives
            these one scale a tensor.

    Example:
        >>> import torch, unclamp
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))
        >>> report = unclamp.convert(model, unclamp.Recipe())
        >>> print(unclamp.switch(model, "1", input=unclamp.Dynamic()))
        switched 1 layer; where compiled by itself, each recompiles once
          1: input delayed -> dynamic
    """
    named: dict[Role, Scaling | str | None] = {
        "input": input or scaling,
        "weight": weight or scaling,
        "grad_output": grad_output or scaling,
    }
    wanted: dict[Role, Scaling] = {
        role: as_scaling(new) for role, new in named.items() if new is not None
    }
    if not wanted:
        raise RecipeError("a switch needs a scaling, such as input=Dynamic()")
    for role, new in wanted.items():
        check_scaling(role, new)
    layers = {fqn: own for fqn, own, _ in products_of(model)}
    found = {fqn: layer for fqn, layer in layers.items() if matches(fqn, glob)}
    if not found:
        listed = ", ".join(list(layers)[:20]) + (", ..." if len(layers) > 20 else "")
        raise ConvertError(
            f"{glob!r} matches no converted layer of the model; it has: {listed or 'none'}"
            f"{did_you_mean(glob, layers)}"
        )
    each = {fqn: _wanted_of(fqn, layer, wanted, glob) for fqn, layer in found.items()}
    for fqn, layer in found.items():
        check_plan(plan_after(layer, each[fqn]))
    switched = _carry_out(found, each)
    counted_only = [fqn for fqn in switched if found[fqn].only_observed]
    return SwitchReport(switched=switched, only_counted=tuple(counted_only))


def _wanted_of(
    fqn: str, layer: Operands, wanted: Mapping[Role, Scaling], glob: str
) -> Mapping[Role, Scaling]:
    """Return what a layer gets: a product of an attention has one scale a tensor, as ever."""
    name = product_of_attention(layer)
    if name is None:
        return wanted
    if names(glob, name):
        check_whole(fqn, wanted)
        return wanted
    return {role: as_whole(scaling) for role, scaling in wanted.items()}


def plan_after(layer: Operands, wanted: Mapping[Role, Scaling]) -> LayerPlan:
    """Return a product's plan as it would be with other scalings of some roles."""
    operands: dict[Role, Operand] = {}
    for role in ROLES:
        old = layer.operand(role)
        operands[role] = replace(old, scaling=wanted.get(role, old.scaling))
    return LayerPlan(operands=operands, gemms=layer.modes, smooth=layer.smooth)


def _carry_out(
    layers: Mapping[str, Operands], wanted: Mapping[str, Mapping[Role, Scaling]]
) -> dict[str, dict[Role, tuple[Scaling, Scaling]]]:
    switched: dict[str, dict[Role, tuple[Scaling, Scaling]]] = {}
    changes: dict[Ledger, dict[int, Scaling]] = {}
    for fqn, layer in layers.items():
        for role in ROLES:
            old, new = layer.operand(role).scaling, wanted[fqn].get(role)
            if new is None or new == old:
                continue
            switched.setdefault(fqn, {})[role] = (old, new)
            changes.setdefault(layer.ledger, {})[layer.indices[role]] = new
    for ledger, scalings in changes.items():
        ledger.switch(scalings)
    return switched
