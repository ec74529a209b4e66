"""What comes of the casts of an operand: what its GEMMs multiply, and what the ledger hears."""

from typing import NamedTuple

from torch import Tensor

from unclamp.nn.agreed import NOT_AGREED, Agreed
from unclamp.nn.layout import Axis
from unclamp.numerics import GemmOperand, Quantized, plain_operand


class Hat(NamedTuple):
    """An operand as its GEMMs get it: a tensor with a hat in the equations.

    Attributes:
        tensor: The operand itself, for GEMMs that do not take its codes.
        casts: Its casts by the axis that the GEMM contracts; one serves both where it can.
        agreed: The scales that ranks agreed on for them.
    """

    tensor: Tensor
    casts: dict[Axis, Quantized]
    agreed: Agreed = NOT_AGREED

    def along(self, axis: Axis) -> GemmOperand:
        """Return what a GEMM that contracts this axis multiplies."""
        q = self.casts.get(axis)
        return plain_operand(self.tensor, axis) if q is None else q.along(axis)


class Seen(NamedTuple):
    """What a role's casts tell the ledger.

    Attributes:
        stats: Their statistics; None where nothing was cast.
        details: The closer look, where one was taken.
        amax_1: Amaxes of blocks with a history, of the cast along the last axis.
        amax_0: The same along the first.
    """

    stats: Tensor | None = None
    details: Tensor | None = None
    amax_1: Tensor | None = None
    amax_0: Tensor | None = None


NOTHING_SEEN = Seen()
