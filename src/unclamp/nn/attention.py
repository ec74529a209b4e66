"""Attention in a user's own module: what stands for `F.scaled_dot_product_attention` there."""

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.nn.adapted import Adapted
from unclamp.nn.attend import PV, QK, AttentionProducts, attend
from unclamp.nn.products import Matrix
from unclamp.nn.scores import asked_by_torch


class WithAttention(Adapted):
    """An adaptor of a module that has the products `qk` and `pv`."""

    @classmethod
    def matrices(cls, module: nn.Module) -> dict[str, Matrix]:
        """Return the two products, whose operands are both computed."""
        return {QK: Matrix(None), PV: Matrix(None)}

    @classmethod
    def heads(cls, module: nn.Module) -> int:
        """Return the heads of keys that can have a scale each; 0 where nobody knows."""
        return 0


class Attention(nn.Module):
    """`F.scaled_dot_product_attention` as a module that `unclamp.convert` knows.

    It has neither parameters nor state, and is the plain function until it is converted: then its
    products `qk` and `pv` are counted, and computed in FP8 where a rule of the recipe names them.

    Args:
        heads: Heads of the keys, where each is to have a scale of its own; by rules such as
            `*.qk.*`.

    Example:
        >>> import torch, unclamp
        >>> attention = unclamp.Attention()
        >>> q = k = v = torch.ones(1, 2, 3, 4)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 3, 4])
    """

    def __init__(self, *, heads: int = 0) -> None:
        super().__init__()
        self.heads = heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return what `F.scaled_dot_product_attention` does of the same arguments."""
        return attention(
            self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    def extra_repr(self) -> str:
        """Show the heads, where they are said."""
        return f"heads={self.heads}" if self.heads else ""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return `F.scaled_dot_product_attention`, or the same by the products of a converted module.

    In a module's methods write `unclamp.attention(self, q, k, v, ...)` for
    `F.scaled_dot_product_attention(q, k, v, ...)`. `unclamp.convert` knows by the call that the
    module has the products `qk` and `pv`.

    Args:
        module: Whose attention it is; the plain function computes until it is converted.
        query: As torch's, and so are the others.
        key: See `query`.
        value: See `query`.
        attn_mask: See `query`.
        dropout_p: See `query`.
        is_causal: See `query`.
        scale: See `query`.
        enable_gqa: See `query`.

    Numerics: where nothing is cast, the bits of torch's function, with its kernels. Where `qk` or
    `pv` is computed in FP8, the scores are made, in float32: `4 * heads * queries * keys` bytes
    for each sequence, twice or thrice over, and as much is kept for backward.
    """

    def plain() -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        ), None

    products = AttentionProducts.of(module)
    if not products.every:
        return plain()[0]
    output, _ = attend(
        products,
        lambda: asked_by_torch(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        ),
        plain,
        tensors=(query, key, value),
        training=module.training,
    )
    return output.view(_shape(query, key, value, output)) if products.is_computed else output


def _shape(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> torch.Size:
    """Return the shape of torch's output, of one of four dimensions."""
    own = 3 if query.ndim > 3 else 2
    leading = torch.broadcast_shapes(*(t.shape[:-own] for t in (query, key, value)))
    return torch.Size([*leading, *output.shape[-own:]])


class Fp8Attention(WithAttention, Attention):
    """An `Attention` whose operands are counted, or go through FP8."""

    @classmethod
    def heads(cls, module: nn.Module) -> int:
        """Return the heads that it was told of."""
        return getattr(module, "heads", 0)


class Fp8CallsAttention(WithAttention):
    """A module that calls `unclamp.attention`, which asks it for its products."""


def calls_attention(module: nn.Module) -> bool:
    """Whether a method of a module's class calls `unclamp.attention`."""
    return any(_names_attention(method) for method in _methods(type(module)))


def _methods(of: type) -> Iterator[FunctionType]:
    for base in of.__mro__:
        if base is nn.Module or base.__module__ == __name__ or base.__module__.startswith("torch."):
            continue
        for value in vars(base).values():
            function = getattr(value, "__func__", value)
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, FunctionType):
                yield function


def _names_attention(function: FunctionType) -> bool:
    names = set(_names(function.__code__))
    held = [function.__globals__.get(name) for name in names]
    if function.__closure__ is not None:
        held += [cell.cell_contents for cell in function.__closure__ if _is_full(cell)]
    if any(each is attention for each in held):
        return True
    return "attention" in names and any(
        getattr(each, "__dict__", {}).get("attention") is attention or _is_package(each)
        for each in held
    )


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a lambda, a comprehension
            yield from _names(constant)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_package(x: object) -> bool:
    """Whether this is `unclamp` itself, whose names are loaded at first use."""
    return getattr(x, "__name__", None) == "unclamp" and hasattr(x, "__path__")
