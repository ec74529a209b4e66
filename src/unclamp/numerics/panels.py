"""A GEMM in float32 whose operands are decoded by panels, so that none is all there in float32.

    out[i, j] = a_hat[i] @ b_hat[j].T        for panels i of the rows of a, and j of the rows of b

Each product contracts its whole axis, so that every element of the output is the sum that it is
without panels, added in the same order. No panel has a few rows only: for less than 16 of them MKL
may take another kernel, which adds in another order.

A panel's memory is of the thread and stays, so that no page of it is new.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.numerics.blocks import orient
from unclamp.numerics.cast import is_memory
from unclamp.numerics.fused import borrow, fused
from unclamp.numerics.record import GemmOperand, format_of
from unclamp.numerics.scale import check_scale

ONE_PANEL = 2**24
"""Elements up to which an operand is one panel: 64 MiB in float32.

A product by panels decodes what its casts made anyway, several times, and a BLAS packs smaller
matrices: with 2**20 a linear layer of 4 million weights peaks at 94 MiB, not 160, and takes 1.2
times as long as in float32, not 1.06. So panels bound the memory of products so large that their
operands would be most of it.
"""
OUTER, INNER = 2**22, 2**22
"""Elements of a panel that stays while those of the other operand go by, and of one of these."""
FEWEST = 128
"""Rows of a panel at least: with fewer a GEMM waits for its operands."""
_ROUND = 32
"""Rows of a panel are a multiple of it."""
_TASK = 2**18
"""Elements that a thread decodes at a time."""


class Panels(NamedTuple):
    """An operand as a GEMM by panels reads it.

    Attributes:
        operand: The operand.
        rows: Rows of it, those that are not contracted.
        step: Rows of a panel.
        memory: Where panels are decoded to, float32; None where nothing is to be decoded.
        scales: Inverse scales and the size of a block, as the matrix lies in memory.
    """

    operand: GemmOperand
    rows: int
    step: int
    memory: Tensor | None = None
    scales: tuple[Tensor, tuple[int, int]] | None = None

    @property
    def number(self) -> int:
        """How many panels there are."""
        return -(-self.rows // self.step)

    def at(self, first: int) -> Tensor:
        """Return the panel from a row on, float32, `[rows, contracted]`, until the next is asked.

        Its memory is laid as that of the whole operand.
        """
        x, stop = self.operand, min(first + self.step, self.rows)
        if self.memory is None or self.scales is None:
            return _values(x)[first:stop]
        some, every = (first, stop), (0, x.tensor.shape[x.axis % 2])
        spans = (some, every) if x.axis % 2 else (every, some)
        shape = [last - begin for begin, last in spans]
        values = self.memory[: math.prod(shape)].view(shape)
        _decode(x.tensor, *self.scales, *spans, values)
        return orient(values, x.axis)


def panels_pay(a: GemmOperand, b: GemmOperand) -> bool:
    """Whether a GEMM is to be made by panels: an operand that is large has to be decoded."""
    if not (_is_large(a) or _is_large(b)):  # at once for small ones, where each call counts
        return False
    return (
        a.tensor.ndim == b.tensor.ndim == 2
        and a.tensor.shape[a.axis % 2] == b.tensor.shape[b.axis % 2]  # else torch raises
        and all(is_memory(x.tensor) and x.tensor.is_contiguous() for x in (a, b))
        and fused() is not None
    )


def _is_large(x: GemmOperand) -> bool:
    return _is_coded(x) and x.tensor.numel() > ONE_PANEL


def multiply(
    a: GemmOperand,
    b: GemmOperand,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Return `a @ b.T + bias`, float32 rounded to `out_dtype`, in `out` if that is given.

    Args:
        a: One operand.
        b: The other.
        bias: `[rows of b]`, float32, or None.
        out_dtype: The output's dtype.
        out: Where the output goes.
        scratch: Memory in which `b` may be decoded at once: contiguous float32, as many elements.
    """
    rows = [x.tensor.shape[1 - x.axis % 2] for x in (a, b)]
    if out is None:
        out = a.tensor.new_empty(*rows, dtype=out_dtype)
    lefts, rights, a_is_outer = _laid_out(a, b, scratch)
    outer, inner = (lefts, rights) if a_is_outer else (rights, lefts)
    only = inner.at(0) if inner.number == 1 else None
    for i in range(0, outer.rows, outer.step):
        outside = outer.at(i)
        for j in range(0, inner.rows, inner.step):
            inside = inner.at(j) if only is None else only
            left, right = (outside, inside) if a_is_outer else (inside, outside)
            row, column = (i, j) if a_is_outer else (j, i)
            target = out[row : row + len(left), column : column + len(right)]
            some_bias = None if bias is None else bias[column : column + len(right)]
            _into(target, left, right, some_bias)
    return out


def _into(target: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """Put a product of panels where it belongs."""
    made = target
    if target.dtype != torch.float32 or target.stride(1) != 1:
        made = borrow("product", target.numel()).view(target.shape)
    if bias is None:
        torch.mm(left, right.t(), out=made)
    else:
        torch.addmm(bias, left, right.t(), out=made)
    if made is not target:
        target.copy_(made)


def _laid_out(
    a: GemmOperand, b: GemmOperand, scratch: Tensor | None
) -> tuple[Panels, Panels, bool]:
    """Return both operands' panels, and whether those of `a` are the outer ones.

    Of the two ways the one that decodes less is taken.
    """
    ways = []
    for a_is_outer in (True, False):
        lefts = _panels(a, OUTER if a_is_outer else INNER, "outer" if a_is_outer else "inner")
        slot = "inner" if a_is_outer else "outer"
        rights = _panels(b, INNER if a_is_outer else OUTER, slot, scratch)
        outer, inner = (lefts, rights) if a_is_outer else (rights, lefts)
        times = outer.number if inner.number > 1 else 1
        cost = _decoded(outer.operand) + times * _decoded(inner.operand)
        ways.append((cost, (lefts, rights, a_is_outer)))
    return min(ways, key=lambda way: way[0])[1]


def _decoded(x: GemmOperand) -> int:
    return x.tensor.numel() if _is_coded(x) else 0


def _panels(x: GemmOperand, size: int, slot: str, scratch: Tensor | None = None) -> Panels:
    rows, contracted = x.tensor.shape[1 - x.axis % 2], x.tensor.shape[x.axis % 2]
    if not _is_coded(x):
        return Panels(x, rows, max(rows, 1))
    if scratch is not None:
        return Panels(x, rows, max(rows, 1), scratch.view(-1), _scales(x))
    step = rows
    if x.tensor.numel() > size:
        most = max(size // max(contracted, 1), FEWEST)
        count = -(-rows // most)
        step = -(-rows // count // _ROUND) * _ROUND
        while 0 < rows % step < _ROUND:  # few would be left over for the last
            step += _ROUND
    memory = borrow(f"{slot} panel", step * contracted)
    return Panels(x, rows, max(step, 1), memory, _scales(x))


def _is_coded(x: GemmOperand) -> bool:
    return x.values is None and x.scale_inv is not None


def _values(x: GemmOperand) -> Tensor:
    """Return what is multiplied of an operand that is not decoded, `[rows, contracted]`."""
    if x.values is not None:
        return orient(x.values, x.axis)
    return orient(x.tensor.detach().to(torch.float32), x.axis)


def _scales(x: GemmOperand) -> tuple[Tensor, tuple[int, int]]:
    assert x.scale_inv is not None
    grid = x.scale_inv.detach()
    grid, block = (grid.reshape(1, 1) if x.granularity.is_whole else grid), x.granularity.block
    if x.axis % 2 == 0:
        grid, block = grid.t(), block[::-1]
    rows, columns = x.tensor.shape
    down, along = block[0] or max(rows, 1), block[1] or max(columns, 1)
    # The kernel reads at an address: what is not there would be read beyond.
    if x.tensor.numel():
        check_scale(grid, torch.Size((-(-rows // down), -(-columns // along))))
    return grid.to(torch.float32).contiguous(), (down, along)


def _decode(
    codes: Tensor, invs: Tensor, block: tuple[int, int], rows: tuple[int, int],
    columns: tuple[int, int], values: Tensor,
) -> None:  # fmt: skip
    """Decode some rows and columns of a matrix as it lies in memory."""
    # numba is slow to import, and `fused` has seen to it that it works.
    from unclamp.numerics.compiled import run  # noqa: PLC0415
    from unclamp.numerics.decode import decode_panel  # noqa: PLC0415
    from unclamp.numerics.kernels import NUMBER  # noqa: PLC0415

    width = columns[1] - columns[0]
    step = max(_TASK // max(width, 1), 1)
    number = NUMBER[format_of(codes.dtype).name]
    matrix = (codes.data_ptr(), *codes.shape, invs.data_ptr(), *block, number)
    run([
        (
            decode_panel, *matrix, first, min(first + step, rows[1]), *columns,
            values.data_ptr() + 4 * (first - rows[0]) * width,
        )
        for first in range(*rows, step)
    ])  # fmt: skip
