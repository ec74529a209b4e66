"""A linear layer as torch.export traced and unflattened it: what `pipeline()` makes of a model.

Its stages hold an `InterpreterModule` a layer, with the layer's name and parameters and a graph of
one `aten.linear`. That is a linear layer by what it does, and trains like one.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.nn.converted import Converted
from unclamp.nn.product import multiply


class Fp8Traced(Converted):
    """A traced linear layer whose operands go through FP8; in front of torch's own class.

    Shapes: input `[..., K]`, output `[..., N]`, any leading shape, empty included.
    """

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return the weight's own shape."""
        assert isinstance(module.weight, Tensor)
        rows, columns = module.weight.shape
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` with the operands cast as the recipe says.

        Raises:
            ValueError: The last dimension is not K.
        """
        bias = self._parameters.get("bias")
        return multiply(self.sites, x, self.weight, bias, training=self.training)


def interpreter_forward() -> Any:
    """Return the forward of what torch.export unflattens; None where nothing was unflattened."""
    module = sys.modules.get("torch.export.unflatten")
    return None if module is None else module.InterpreterModule.forward


def is_traced_linear(module: nn.Module) -> bool:
    """Whether a module's graph is that of a linear layer over its own parameters, and no more."""
    graph: torch.fx.Graph | None = getattr(module, "graph", None)
    if graph is None:
        return False
    nodes = list(graph.nodes)
    x, *own = [node for node in nodes if node.op in ("placeholder", "get_attr")] or [None]
    called = [node for node in nodes if node.op not in ("placeholder", "get_attr", "output")]
    names = [node.target for node in own]
    return (
        x is not None
        and names in (["weight"], ["weight", "bias"])
        and all(node.op == "get_attr" for node in own)
        and all(module._parameters.get(name) is not None for name in names)
        and [node.target for node in called] == [torch.ops.aten.linear.default]
        and called[0].args == (x, *own)
        and nodes[-1].args == (called[0],)
    )
