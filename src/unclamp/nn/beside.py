"""Layers that compute in FP8 by another library, as products that are only counted beside it.

torchao's `Float8Linear` casts by itself. An observed model goes on computing by it, bit for bit,
and what the recipe's casts would have lost is counted beside it. `convert` leaves it alone.
"""

import sys
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from unclamp.nn.accounts import accounted
from unclamp.nn.converted import Converted
from unclamp.nn.counting import count
from unclamp.nn.operands import Operands
from unclamp.nn.parts import is_sharded
from unclamp.nn.product import meeting
from unclamp.rule import Rule

TORCHAO = "torchao's Float8Linear, which casts by itself: left to torchao"
"""The reason why `convert` leaves a layer of torchao's alone."""
LEFT = (
    "torchao has taken the model's other layers, and was told to leave this one "
    "(module_filter_fn): left in high precision; a rule that names it, such as {glob!r}, takes it "
    "in"
)


class Float8LinearBeside(Converted):
    """A `Float8Linear` of torchao, which computes, and whose casts are counted beside its own."""

    bias: Tensor | None
    only_observes = TORCHAO

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return the weight's own shape; where FSDP1 keeps it flat, what it will be."""
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Return what torchao's layer returns.

        In a compiled model the counting is between graphs: inside of one, torchao's casts would be
        compiled together with other operations than in the model alone.
        """
        operands = self.sites
        if not torch.compiler.is_compiling() and (account := accounted(operands)) is not None:
            with account:  # of shapes alone: its own operators need not know them
                return nn.functional.linear(input, self.weight, self.bias)
        output: Tensor = super().forward(input)
        return _counted(operands, output, input, self.weight, self.bias, training=self.training)


def _count(
    operands: Operands,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
) -> Tensor:
    """Return a product's output, and have its casts counted where both operands are whole."""
    if operands.is_plain or x.is_nested or is_sharded(x, weight):
        return output
    meets = meeting(operands, x, weight, bias, training=training)
    if meets.commit is None:
        return output
    return count(operands, output, x, weight, commit=meets.commit, splits=meets.splits)


_counted: Any = _disable_dynamo(_count)


def float8_linear_forward() -> Any:
    """Return the forward of torchao's layer; a model that has one has loaded it."""
    module = sys.modules.get("torchao.float8.float8_linear")
    return None if module is None else module.Float8Linear.forward


def compute_plainly(model: nn.Module) -> None:
    """Have torchao's layers of a copy compute as linear layers, whose products show as such."""
    forward = float8_linear_forward()
    for module in model.modules() if forward is not None else ():
        if type(module).forward is forward:
            module.__dict__["forward"] = MethodType(nn.Linear.forward, module)


def find_left(
    named: Mapping[str, nn.Module], linear: Mapping[str, Any], rules: list[Rule]
) -> dict[str, str]:
    """Return plain layers that torchao was told to leave and no rule names, with what to say.

    Args:
        named: All modules of the model.
        linear: The linear layers, by name, that could be converted.
        rules: The recipe's.
    """
    forward = float8_linear_forward()
    if forward is None or not any(type(m).forward is forward for m in named.values()):
        return {}
    naming = [rule for rule in rules if not set(rule.match.rpartition(".")[2]) & set("*?[")]
    return {
        fqn: LEFT.format(glob=f"^{fqn}")
        for fqn in linear
        if not any(rule.matches(fqn) for rule in naming)
    }
