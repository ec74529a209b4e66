"""Which torch operators are matrix products, and how many FLOPs they have.

A product `[M, K] @ [K, N]` has 2 M N K. Of a batch of products M counts the rows of all of them.
Attention has two, `qk` and `pv`; where its kernel is told that it is causal, they count the pairs
of positions that see each other, which is what such kernels compute.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ATTENTION = "attention"
CONVOLUTION = "convolution"


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One matrix product that an operator computes.

    Attributes:
        a: First operand.
        b: Second operand.
        sizes: M, N and K.
        flops: Of the product.
        label: `qk` or `pv` of attention, "" of anything else.
    """

    a: Tensor
    b: Tensor
    sizes: tuple[int, int, int]
    flops: int
    label: str = ""


Reader = Callable[[Sequence[Any], Any], list[Gemm]]
"""From an operator's arguments and its result to its products."""


def products_of(func: Any, args: Sequence[Any], out: Any) -> list[Gemm]:
    """Return the matrix products of an operator's call; none of other operators."""
    reader = _READERS.get(name_of(func))
    return [] if reader is None else reader(args, out)


def is_product(func: Any) -> bool:
    """Whether an operator is a matrix product, forward or backward."""
    return name_of(func) in _READERS or gradients_of(func, ()) is not None


@functools.cache  # asked thrice of each operator that runs
def name_of(func: Any) -> str:
    """Return an operator's name without its overload, with the namespace of all but torch's."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        return func.name()
    packet = getattr(func, "overloadpacket", func)
    name = getattr(packet, "_qualified_op_name", str(packet)).replace("::", ".")
    return name.removeprefix("aten.")


def gradients_of(func: Any, args: Sequence[Any]) -> tuple[bool, bool] | None:
    """Return which gradients an operator computes that is the backward of products alone: of the
    first operand and of the second. None for other operators; both for attention's.
    """  # noqa: D205
    name = name_of(func)
    if name == "convolution_backward":
        return (True, True) if not args else (bool(args[-1][0]), bool(args[-1][1]))
    if name.endswith("_backward") and ("attention" in name or "grouped_mm" in name):
        return True, True
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> list[Gemm]:
    """Return the two products of attention over `[..., S, D]`, `[..., T, D]` and `[..., T, E]`."""
    heads = math.prod(q.shape[:-2])
    queries, keys, depth, width = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    pairs = queries * keys
    if is_causal:  # as torch aligns it, at the top left: query i sees keys 0 to i
        seen = min(queries, keys)
        pairs = seen * (seen + 1) // 2 + (queries - seen) * keys
    rows = heads * queries
    return [
        Gemm(a=q, b=k, sizes=(rows, keys, depth), flops=2 * heads * pairs * depth, label="qk"),
        Gemm(a=q, b=v, sizes=(rows, width, keys), flops=2 * heads * pairs * width, label="pv"),
    ]


def _matrices(a: Tensor, b: Tensor) -> list[Gemm]:
    """Return `a @ b`, each a matrix, a vector or a batch."""
    m = math.prod(a.shape[:-1])
    k = a.shape[-1]
    n = b.shape[-1] if b.ndim > 1 else 1
    return [Gemm(a=a, b=b, sizes=(m, n, k), flops=2 * m * n * k)]


def _at(first: int) -> Reader:
    """Return a reader of operators whose operands are these two arguments."""
    return lambda args, out: _matrices(args[first], args[first + 1])


def _linear(args: Sequence[Any], out: Any) -> list[Gemm]:
    return _matrices(args[0], args[1].transpose(-1, -2))


def _grouped(args: Sequence[Any], out: Any) -> list[Gemm]:
    """Return a grouped product as one: rows in groups, or what is summed over in groups.

    `[S, K] @ [E, K, N]`, `[E, M, K] @ [K, S]`, `[M, S] @ [S, N] -> [E, M, N]`, or a plain batch.
    """
    a, b = args[0], args[1]
    if a.ndim == 3 and b.ndim == 2:  # rows of the result are of all groups, columns in groups
        sizes = (a.shape[1], b.shape[1], a.shape[2])
    else:
        sizes = (math.prod(a.shape[:-1]), b.shape[-1], a.shape[-1])
    return [Gemm(a=a, b=b, sizes=sizes, flops=2 * math.prod(sizes))]


def _convolution(args: Sequence[Any], out: Any) -> list[Gemm]:
    x, weight, is_transposed = args[0], args[1], bool(args[6])
    taps = math.prod(weight.shape[1:])
    if is_transposed:  # the transposed product: each element of the input meets each tap
        sizes = (x.numel() // x.shape[1], taps, x.shape[1])
        return [Gemm(a=x, b=weight, sizes=sizes, flops=2 * x.numel() * taps)]
    sizes = (out.numel() // weight.shape[0], weight.shape[0], taps)
    return [Gemm(a=x, b=weight, sizes=sizes, flops=2 * out.numel() * taps)]


def _attention_at(causal: int | None) -> Reader:
    def read(args: Sequence[Any], out: Any) -> list[Gemm]:
        is_causal = causal is not None and len(args) > causal and args[causal] is True
        return attention(*args[:3], is_causal=is_causal)

    return read


_READERS: dict[str, Reader] = {
    "mm": _at(0),
    "bmm": _at(0),
    "mv": _at(0),
    "_int_mm": _at(0),
    "_scaled_mm": _at(0),
    "addmm": _at(1),
    "_addmm_activation": _at(1),
    "addmv": _at(1),
    "addbmm": _at(1),
    "baddbmm": _at(1),
    "linear": _linear,
    "_grouped_mm": _grouped,
    "_scaled_grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "convolution": _convolution,
    "_scaled_dot_product_flash_attention": _attention_at(4),
    "_scaled_dot_product_flash_attention_for_cpu": _attention_at(4),
    "_scaled_dot_product_efficient_attention": _attention_at(6),
    "_scaled_dot_product_cudnn_attention": _attention_at(6),
    "_scaled_dot_product_fused_attention_overrideable": _attention_at(5),
    "flex_attention": _attention_at(None),
}
