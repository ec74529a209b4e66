"""The `Conv1D` of transformers and GPT-2 as a product: a linear layer whose weight is turned.

    output [..., N] = input [..., K] @ weight [K, N] + bias

The product sees the weight turned, `[N, K]`, a view: rows and blocks of its scales are those of a
linear layer, and autograd turns the gradient back.
"""

from torch import Tensor, nn

from unclamp.nn.converted import Converted
from unclamp.nn.product import multiply


class Fp8Conv1D(Converted):
    """A `Conv1D` whose operands go through FP8; comes in front of transformers' own class.

    Shapes: input `[..., nx]`, output `[..., nf]`, any leading shape, empty included.
    """

    bias: Tensor
    is_turned = True

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return the weight's shape, turned."""
        columns, rows = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues,reportCallIssue]
        return int(rows), int(columns)

    def extra_repr(self) -> str:
        """Show its sizes by the names that transformers gives them."""
        nf, nx = self.matrix_shape(self)
        return f"nf={nf}, nx={nx}, {super().extra_repr()}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # transformers' own leaves `extra_repr` out

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight + bias` with the operands cast as the recipe says.

        Raises:
            ValueError: The last dimension is not `nx`.
        """
        return multiply(self.sites, x, self.weight.t(), self.bias, training=self.training)
