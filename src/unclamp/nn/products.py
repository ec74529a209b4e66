"""The matrix products of a module: most have one, a bank of experts or an attention has several.

A converted module keeps its `Operands` under `sites`: those of its one product, or `Several` by
their names within the module. What walks a model for products walks it here. A product's name in
the model is the module's name, a dot, and its name within the module: that of the 5th expert of
`experts.gate_up_proj` is what a list of linear layers would have.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from unclamp.names import joined
from unclamp.nn.named import named_modules

if TYPE_CHECKING:
    from unclamp.nn.operands import Operands

SITES = "sites"
"""The attribute of a converted module that holds its products."""


class Several(dict[str, "Operands"]):
    """The products of a module that has more than one, or one with a name."""


class Matrix(NamedTuple):
    """The second operand of a product.

    Attributes:
        parameter: What the module calls the parameter that it is, or lies in; None: it is computed.
        shape: Outputs by inputs, as the product has it; empty where it is computed.
    """

    parameter: str | None
    shape: tuple[int, ...] = ()


def products_in(module: nn.Module) -> "Mapping[str, Operands]":
    """Return the products of one module, by their names within it; none if it is not converted."""
    own: Any = module.__dict__.get(SITES)
    if isinstance(own, Several):
        return own
    return {"": own} if hasattr(own, "indices") else {}


def products_of(model: nn.Module) -> "list[tuple[str, Operands, nn.Module]]":
    """Return every product of a model: its name, its operands, and its module."""
    return [
        (joined(fqn, name), own, module)
        for fqn, module in named_modules(model)
        for name, own in products_in(module).items()
    ]


def stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names in stacks: those that differ in a last number only, as the experts of a bank.

    A name without a number is a stack by itself.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        found.setdefault(stem if stem and last.isdigit() else name, []).append(name)
    return found
