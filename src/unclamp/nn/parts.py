"""Which tensors each rank has a part of; a weight whose rows of histories are those of its part."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from unclamp.nn.operands import Operands

DTENSOR = "torch.distributed.tensor"


def is_sharded(*tensors: Tensor | None) -> bool:
    """Whether one of these is a DTensor; torch's module is not loaded to find out."""
    for t in tensors:
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            break
    else:
        return False
    module = sys.modules.get(DTENSOR)
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def fit(operands: "Operands", shape: Sequence[int]) -> None:
    """See to it that a weight's blocks with histories are those of this rank's part of it.

    Args:
        operands: The product's.
        shape: That of the part, as the product has it: outputs by inputs.
    """
    ledger, index = operands.ledger, operands.indices["weight"]
    site = ledger.sites[index]
    if site.shape == tuple(shape):
        return
    fitting = replace(site, shape=tuple(shape))
    if fitting.grids == site.grids:
        ledger.sites[index] = fitting
        return
    ledger.lay_out([*ledger.sites[:index], fitting, *ledger.sites[index + 1 :]])
    if fitting.scales == site.scales:  # as many, of other blocks
        ledger.restore(index, None, None)
