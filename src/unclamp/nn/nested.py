"""A batch of sequences of several lengths (`torch.nested`) as one matrix of tokens, and back.

A product of a nested tensor is one matrix product all the same: of the tokens of all sequences.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_tokens(x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a nested tensor with `act` done to all its tokens at once.

    Shapes: sequences of `x` `[..., K]`, of any lengths; `act` takes `[tokens, ..., K]` to
    `[tokens, ..., N]`; the result has the layout and lengths of `x`.
    """
    if x.layout == torch.jagged:
        jagged: Any = x
        # With the very offsets of `x`, so that torch knows both as of the same lengths.
        return torch.nested.nested_tensor_from_jagged(
            act(jagged.values()), jagged.offsets(), jagged.lengths(), jagged_dim=jagged._ragged_idx
        )
    sequences = x.unbind()
    tokens = [s.reshape(s.shape[:-1].numel(), s.shape[-1]) for s in sequences]
    parts = act(torch.cat(tokens)).split([len(t) for t in tokens])
    return torch.nested.as_nested_tensor([
        part.reshape(*s.shape[:-1], part.shape[-1])
        for part, s in zip(parts, sequences, strict=True)
    ])  # fmt: skip
