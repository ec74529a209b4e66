"""A GEMM in float32 whose operands are decoded by panels, so that none is all there in float32.

    out[i, j] = a_hat[i] @ b_hat[j].T        for panels i of the rows of a, and j of the rows of b

Each product contracts its whole axis, so that every element of the output is the sum that it is
without panels, added in the same order. No panel has a few rows only: for less than 16 of them MKL
may take another kernel, which adds in another order.

The panels of one operand, the outer one, are decoded by all threads. While one stays, each thread
takes panels of the other, decodes one into memory of its own, where its cache still holds it, and
multiplies it with a BLAS on this one thread. So threads wait for each other once an outer panel;
where a BLAS spreads each product over its threads, they wait at each.

The memory stays, so that no page of it is new.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.numerics.blocks import orient
from unclamp.numerics.cast import is_memory
from unclamp.numerics.fused import borrow, fused
from unclamp.numerics.record import GemmOperand, format_of
from unclamp.numerics.scale import check_scale

ONE_PANEL = 2**20
"""Elements up to which an operand is one panel: 4 MiB in float32."""
OUTER, INNER = 2**21, 2**20
"""Elements of a panel that stays while those of the other operand go by, and of all threads' of
these: 12 MiB in float32.
"""
PART = 8
"""Panels of larger operands take an eighth of what the larger one would."""
FEWEST = 128
"""Rows of a panel at least: with fewer a GEMM waits for its operands."""
_ROUND = 16
"""Rows of a panel are a multiple of it."""
_LAST = 32
"""Rows of the last panel at least."""
_TURNS = 2
"""Panels for each thread at least, so that a thread that is held up does not hold up the others."""
_TASK = 2**18
"""Elements that a thread decodes at a time, of what all decode."""


class Panels(NamedTuple):
    """An operand as a GEMM by panels reads it.

    Attributes:
        operand: The operand.
        rows: Rows of it, those that are not contracted.
        step: Rows of a panel.
        values: What is multiplied, `[rows, contracted]`, where nothing is to be decoded.
        scales: Inverse scales and the size of a block, as the matrix lies in memory, where it is.
    """

    operand: GemmOperand
    rows: int
    step: int
    values: Tensor | None = None
    scales: tuple[Tensor, tuple[int, int]] | None = None

    @property
    def firsts(self) -> range:
        """The rows with which panels begin."""
        return range(0, self.rows, self.step)

    @property
    def size(self) -> int:
        """Elements that are decoded at a time."""
        return 0 if self.scales is None else self.step * self.operand.tensor.shape[_axis(self)]

    def at(self, first: int, memory: Tensor) -> Tensor:
        """Return the panel from a row on, float32, `[rows, contracted]`.

        It is decoded into memory of `size` elements, and laid there as the whole operand is.
        """
        x, stop = self.operand, min(first + self.step, self.rows)
        if self.values is not None:
            return self.values[first:stop]
        assert self.scales is not None
        some, every = (first, stop), (0, x.tensor.shape[_axis(self)])
        spans = (some, every) if _axis(self) else (every, some)
        shape = [last - begin for begin, last in spans]
        values = memory[: math.prod(shape)].view(shape)
        _decode(x.tensor, *self.scales, *spans, values)
        return orient(values, x.axis)


def _axis(panels: Panels) -> int:
    return panels.operand.axis % 2


class Way(NamedTuple):
    """How a GEMM is made by panels.

    Attributes:
        outer: The operand whose panels stay while those of the other go by.
        inner: The other.
        a_is_outer: Whether the outer one is the GEMM's first.
        in_scratch: Whether the outer one is decoded into the caller's scratch, and whole.
        threads: How many threads take panels of the inner one; for 1 a BLAS has all.
    """

    outer: Panels
    inner: Panels
    a_is_outer: bool
    in_scratch: bool
    threads: int


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
    return _coded(x) > ONE_PANEL


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
    # numba is slow to import, and `fused` has seen to it that it works.
    from unclamp.numerics.compiled import run  # noqa: PLC0415

    rows = [x.tensor.shape[1 - x.axis % 2] for x in (a, b)]
    if out is None:
        out = a.tensor.new_empty(*rows, dtype=out_dtype)
    way = _way(_with_values(a), _with_values(b), scratch)
    outer, inner, bias = way.outer, way.inner, None if bias is None else bias.detach()
    sizes = [0 if way.in_scratch else outer.size, *[inner.size] * way.threads]
    first, *others = borrow("panels", sum(sizes)).split(sizes)
    if way.in_scratch and scratch is not None:
        first = scratch.view(-1)
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    for i in outer.firsts:
        outside, starts = outer.at(i, first), iter(inner.firsts)
        run([
            (_take, starts, way, i, outside, memory, bias, out, modes)
            for memory in others
        ])  # fmt: skip
    return out


def _take(
    starts: Iterator[int], way: Way, i: int, outside: Tensor, memory: Tensor,
    bias: Tensor | None, out: Tensor, modes: tuple[bool, bool],
) -> None:  # fmt: skip
    """Multiply the outer panel from row `i` on with inner ones, while other threads take others."""
    is_inference, has_grad = modes  # the caller's: another thread has its own
    # What is made in inference mode may not be written to outside; outside of it, gradients are on.
    with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
        for j in starts:  # one thread at a time takes a number from a range
            inside = way.inner.at(j, memory)
            left, right, row, column = outside, inside, i, j
            if not way.a_is_outer:
                left, right, row, column = inside, outside, j, i
            target = out[row : row + len(left), column : column + len(right)]
            some_bias = None if bias is None else bias[column : column + len(right)]
            _into(target, left, right, some_bias)


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


def _way(a: GemmOperand, b: GemmOperand, scratch: Tensor | None) -> Way:
    """Return how to make a product.

    What is there anyway is outer, and need not be decoded twice; so is an operand that is one outer
    panel. Else it is the larger one: the other's codes are read again, and from a cache.
    """
    in_scratch = scratch is not None and _is_coded(b)
    is_b = _coded(b) > _coded(a)
    if min(_coded(a), _coded(b)) <= OUTER:
        is_b = not is_b
    if in_scratch or is_b:
        return _with_outer(b, a, a_is_outer=False, in_scratch=in_scratch)
    return _with_outer(a, b, a_is_outer=True, in_scratch=False)


def _with_outer(
    outer: GemmOperand, inner: GemmOperand, *, a_is_outer: bool, in_scratch: bool
) -> Way:
    grown = max(1, max(_coded(outer), _coded(inner)) / (OUTER + INNER) / PART)
    is_whole = in_scratch or not _is_coded(outer)
    first = _panels(outer, outer.tensor.numel() if is_whole else int(grown * OUTER))
    left = int(grown * (OUTER + INNER)) - (0 if in_scratch else first.size)
    threads = _threads(inner, left)
    share = left // threads
    if threads > 1:
        share = min(share, inner.tensor.numel() // threads // _TURNS)
    others = _panels(inner, share, threads)
    threads = min(threads, max(len(others.firsts), 1))
    return Way(first, others, a_is_outer, in_scratch, threads)


def _threads(inner: GemmOperand, size: int) -> int:
    """Return how many threads take panels of an operand that have so many elements together.

    One, if a thread may be seen computing that is not the caller's, or panels would be small.
    """
    from unclamp.numerics.compiled import limits  # noqa: PLC0415

    threads = torch.get_num_threads()
    contracted = inner.tensor.shape[inner.axis % 2]
    if limits() is None or threads * FEWEST * contracted > 2 * size:
        return 1
    # A mode of torch's, which counts FLOPs for instance, sees what its own thread does.
    return 1 if torch._C._len_torch_dispatch_stack() else threads


def _panels(x: GemmOperand, size: int, threads: int = 1) -> Panels:
    """Cut an operand into panels of about so many elements, as many for each thread."""
    rows, contracted = x.tensor.shape[1 - x.axis % 2], x.tensor.shape[x.axis % 2]
    step = rows
    if x.tensor.numel() > size:
        most = max(size // max(contracted, 1), FEWEST)
        count = -(-rows // most // threads) * threads
        step = -(-rows // count // _ROUND) * _ROUND
        while step < rows and 0 < rows % step < _LAST:  # few would be left over for the last
            step += _ROUND
    if x.values is not None:
        return Panels(x, rows, max(step, 1), orient(x.values, x.axis))
    return Panels(x, rows, max(step, 1), scales=_scales(x))


def _coded(x: GemmOperand) -> int:
    """Return how many elements of an operand are to be decoded."""
    return x.tensor.numel() if _is_coded(x) else 0


def _is_coded(x: GemmOperand) -> bool:
    return x.values is None and x.scale_inv is not None


def _with_values(x: GemmOperand) -> GemmOperand:
    """Return an operand that has values, unless it is to be decoded."""
    has = x.values is not None or _is_coded(x)
    return x if has else x._replace(values=x.tensor.detach().to(torch.float32))


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
