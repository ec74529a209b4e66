"""`unclamp.grouped_mm`: how a module of one's own multiplies by a bank of experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.nn.bank import BANK, Watching, in_groups, local_part, memory_of, running
from unclamp.nn.clock import ticking


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows in groups each by a matrix of its own: `F.grouped_mm`, in FP8 once converted.

    For a module of one's own whose experts lie in one parameter. It is torch's function until the
    module that has the parameter goes through `unclamp.convert`, which finds it by this name in the
    module's code. From then on each expert is a product with scales, histories and counts of its
    own, named like one of a list of linear layers: `experts.up.5`.

    Shapes: `x` `[T, K]`, `weight` `[E, K, N]` (a transposed parameter `[E, N, K]` is fine), `offs`
    `[E]`, the end of each group in `x`; `bias` `[E, N]`; the result `[T, N]` in the dtype of `x`.

    Numerics: those of a linear layer for each group. Rows after the last group are zeros where
    the module is converted, and whatever was in memory where it is not.

    Example:
        >>> import torch, unclamp
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = torch.nn.Parameter(torch.ones(2, 16, 8))
        ...     def forward(self, x, offs):
        ...         return unclamp.grouped_mm(x, self.up.mT, offs)
        >>> experts = Experts()
        >>> list(unclamp.convert(experts, unclamp.Recipe()).converted)
        ['up.0', 'up.1']
        >>> offs = torch.tensor([3, 4], dtype=torch.int32)
        >>> experts(torch.ones(4, 8), offs).shape
        torch.Size([4, 16])
    """
    for watching in reversed(running()):
        if watching.find(weight) is not None:
            return _in_fp8(watching, x, weight, offs, bias)
    module = _converted_module_of(weight)
    if module is not None:  # a part of a forward that is computed again in backward
        with Watching(module) as watching:
            return _in_fp8(watching, x, weight, offs, bias)
    return _plain(x, weight, offs, bias)


def _in_fp8(
    watching: Watching, x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None
) -> Tensor:
    with torch._C.DisableTorchFunction():
        made = in_groups(watching, lambda: _plain(x, weight, offs, bias), x, weight, offs, bias)
    assert made is not None
    return made


def _plain(x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None) -> Tensor:
    output = F.grouped_mm(x, weight, offs=offs)
    if bias is None:
        return output
    numbers = torch.arange(len(x), device=x.device, dtype=offs.dtype)
    group = torch.searchsorted(offs, numbers, right=True).clamp(max=len(offs) - 1)
    return output + bias[group]


def _converted_module_of(weight: Tensor) -> nn.Module | None:
    """Return the converted module that has a bank, whose forward does not run."""
    memory = memory_of(weight)
    for ledger in ticking:
        for own in ledger.layers:
            module = None if own.module is None else own.module()
            bank = own.parameter_in(module)
            if bank is not None and bank.ndim == BANK and memory_of(local_part(bank)[0]) == memory:
                return module
    return None
