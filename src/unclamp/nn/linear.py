"""`nn.Linear` as a product: `[..., K] -> [..., N]` with a weight `[N, K]`.

With every role in high precision the layer *is* `nn.Linear`, bit for bit.
"""

from torch import Tensor, nn

from unclamp.nn.converted import Converted
from unclamp.nn.product import multiply


class Fp8Linear(Converted, nn.Linear):
    """An `nn.Linear` whose operands go through FP8; see `Converted`.

    Shapes: input `[..., in_features]`, output `[..., out_features]`, any leading shape, empty
    included. Input dtype in, input dtype out (under autocast: autocast's).
    """

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return the weight's own shape; where FSDP1 keeps it flat, what it will be."""
        assert isinstance(module, nn.Linear)
        if module.weight.ndim != 2:
            return module.out_features, module.in_features
        rows, columns = module.weight.shape
        return rows, columns

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias` with the operands cast as the recipe says.

        Raises:
            ValueError: The last dimension is not `in_features`.
        """
        return multiply(self.sites, input, self.weight, self.bias, training=self.training)
