"""A layer that is one matrix product with one weight, whatever the layer; see `nn.adapted`."""

from torch import Tensor, nn

from unclamp.nn.adapted import Adapted
from unclamp.nn.operands import Operands
from unclamp.nn.products import Matrix


class Converted(Adapted):
    """A layer whose matrix product goes through FP8. Made by `unclamp.convert`, not by hand."""

    sites: Operands
    weight: Tensor

    @classmethod
    def matrices(cls, module: nn.Module) -> dict[str, Matrix]:
        """Return its weight, for its one product, whose name is the layer's."""
        there = getattr(module, "weight", None) is not None
        return {"": Matrix("weight", cls.matrix_shape(module) if there else ())}

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return the shape of a module's weight as the product has it: outputs by inputs."""
        raise NotImplementedError
