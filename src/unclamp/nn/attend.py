"""Attention as two products: `qk`, the scores, and `pv`, what the values are summed with.

    scores = q_hat @ k_hat.T          qk: input q, weight k, grad_output dS
    P      = softmax(scale * scores + mask), dropped out
    output = P_hat @ v_hat            pv: input P, weight v, grad_output dO

Where a rule of the recipe names them they are computed so, as two batches of products with
autograd's own softmax between them. That is an emulation of a fused kernel in FP8: it makes the
scores, in float32, and keeps P for backward. Where nothing is cast the plain attention computes,
whatever kernel that is; what FP8 would do to it is counted at some steps (`nn.attention_counts`).

With grouped queries the queries of the heads that share a key are rows of one product, so that
keys and values are cast once, and their gradients are summed in the GEMM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from unclamp.nn.accounts import accounted
from unclamp.nn.attention_counts import counted
from unclamp.nn.batched import multiply_each
from unclamp.nn.counting import is_counted, is_stand_in, say_not_counted
from unclamp.nn.operands import Operands
from unclamp.nn.parts import is_sharded
from unclamp.nn.products import products_in
from unclamp.nn.scores import Attended, Shape

QK, PV = "qk", "pv"
Products = tuple[Operands, ...]
"""One product for all heads, or one for each head of the keys; none where it is left alone."""


@dataclass(frozen=True, kw_only=True)
class AttentionProducts:
    """The two products of an attention."""

    qk: Products
    pv: Products

    @property
    def every(self) -> Products:
        """All of them."""
        return (*self.qk, *self.pv)

    @classmethod
    def of(cls, module: nn.Module) -> "AttentionProducts":
        """Return those of a module; none of one that is not converted."""
        own = products_in(module)
        if len(own) == 2 and QK in own and PV in own:  # in nearly all steps of nearly all models
            return cls(qk=(own[QK],), pv=(own[PV],))
        return cls(qk=_heads(own, QK), pv=_heads(own, PV))

    @property
    def is_computed(self) -> bool:
        """Whether any of them is computed from operands in FP8, and not only counted."""
        return any(not (each.is_plain or each.counts_only) for each in self.every)


def _heads(products: Mapping[str, Operands], name: str) -> Products:
    """Return the products of one name, those of heads in their order."""
    found = [(each, own) for each, own in products.items() if each.split(".")[0] == name]
    found.sort(key=lambda pair: int(pair[0].partition(".")[2] or 0))
    return tuple(own for _, own in found)


Plain = Callable[[], tuple[Tensor, Tensor | None]]
"""The plain attention: output, and probabilities where it gives them."""


def attend(
    products: AttentionProducts,
    asked: Callable[[], Attended],
    plain: Plain,
    *,
    tensors: Sequence[Tensor],
    training: bool,
    turns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return an attention's output `[B, H, L, E]` and probabilities, by products in FP8 or plainly.

    Args:
        products: The two products.
        asked: Makes what is computed or counted; asked only where anything is.
        plain: The plain attention.
        tensors: Queries, keys and values.
        training: Whether the module trains.
        turns: Whether the plain output is `[B, L, H, E]`, and this one is to be.

    Numerics: where nothing is cast, the bits of the plain attention; its kernel too.
    """
    if (account := accounted(*products.every)) is not None:
        with account:
            return plain()
    if any(t.is_nested for t in tensors) or is_sharded(*tensors):
        return plain()
    if torch.compiler.is_compiling() and not products.is_computed:
        return plain()
    if products.is_computed:
        return _computed_eagerly(products, asked, training=training, turns=turns)
    output, weights = plain()
    if not any(is_counted(each) for each in products.every):
        return output, weights
    if any(is_stand_in(t) for t in tensors):
        say_not_counted()
        return output, weights
    made = counted(products.qk, products.pv, output, asked(), training=training, turns=turns)
    return made, weights


def _computed(
    products: AttentionProducts, asked: Callable[[], Attended], *, training: bool, turns: bool
) -> tuple[Tensor, Tensor]:
    one = asked()
    shape, dtype = one.shape, one.q.dtype
    q, k, v = one.q, one.k, one.v
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) for t in (q, k, v))
    with torch.autocast(device, enabled=False):
        scores = _each_head(
            products.qk, _folded(q, shape), k, training=training, turned=False, dtype=torch.float32
        ).view(shape.batch, shape.heads, shape.queries, shape.keys)
        probabilities = one.scoring.probabilities(scores, shape)
        if one.dropout > 0:
            probabilities = F.dropout(probabilities, one.dropout)
        output = _each_head(
            products.pv, _folded(probabilities, shape), v, training=training, turned=True,
            dtype=dtype,
        ).view(shape.batch, shape.heads, shape.queries, v.shape[-1])  # fmt: skip
    return output.transpose(1, 2) if turns else output, probabilities


# A compiled graph ends before it and begins again after it: dropout and scores are eager mode's.
_computed_eagerly: Any = _disable_dynamo(_computed)


def _folded(x: Tensor, shape: Shape) -> Tensor:
    """Return `[B, H, L, ...]` with the rows of the heads that share a key as one matrix."""
    rows = shape.shared_by * shape.queries
    return x.reshape(shape.batch, shape.key_heads, rows, x.shape[-1])


def _each_head(
    products: Products, x: Tensor, second: Tensor, *, training: bool, turned: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the batch of products, with one scale for all heads or one for each."""
    if not products:
        return torch.matmul(x.to(second.dtype), second if turned else second.mT).to(dtype)
    if len(products) == 1:
        return multiply_each(products[0], x, second, training=training, turned=turned, dtype=dtype)
    if len(products) != x.shape[1]:
        raise ValueError(
            f"{products[0].fqn}: expected {len(products)} heads of keys, which have a scale each, "
            f"got {x.shape[1]}"
        )
    made = [
        multiply_each(own, one, two, training=training, turned=turned, dtype=dtype)
        for own, one, two in zip(products, x.unbind(1), second.unbind(1), strict=True)
    ]
    return torch.stack(made, 1)
