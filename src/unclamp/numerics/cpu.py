"""The cast on a CPU, in one pass over the tensor and on all of torch's threads.

Torch needs some 25 passes over a tensor for what a cast makes, and memory is what they wait for;
`unclamp.numerics.kernels` needs one. Results equal those of plain torch (`cast.quantize_plain`)
bit for bit, codes, scales, values and counts; sums of squares are taken in float64 here and lie
within 1e-6 of each other. A tensor is cut into tasks of fixed size whose sums are added in order,
so that nothing depends on the number of threads.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclamp.formats import E4M3FN, Format
from unclamp.numerics.compiled import run
from unclamp.numerics.kernels import (
    AMAX,
    CHUNK,
    COUNTS,
    FLOAT32,
    KINDS,
    NONFINITE,
    SATURATED,
    SATURATED_SQUARE,
    SQUARE,
    SUMS,
    TASK,
    UNDERFLOWED,
    amax_range,
    cast_range,
    decode_range,
    look_range,
)
from unclamp.numerics.layout import layout


class Blocks(NamedTuple):
    """A row-major matrix and the blocks of it that share a scale, in elements of memory."""

    rows: int
    columns: int
    across: int
    along: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and along."""
        return -(-self.rows // self.across), -(-self.columns // self.along)


class Cast(NamedTuple):
    """What the kernel makes: codes, and what `Stat` counts and sums."""

    codes: Tensor
    amax: float
    saturated: int
    underflowed: int
    nonfinite: int
    square: float
    saturated_square: float


def block_amax(x: Tensor, blocks: Blocks) -> np.ndarray:
    """Return the amax over the finite elements of each block, float32, `blocks.grid`; 0 if none."""
    data, kind = _data(x, blocks)
    amax = np.zeros(blocks.grid, np.int32)
    tasks = _tasks(blocks, whole=blocks.across)
    parts = [amax if blocks.grid[0] > 1 or len(tasks) == 1 else np.zeros_like(amax) for _ in tasks]
    calls = [
        (amax_range, data, kind, blocks.across, blocks.along, *task, part)
        for task, part in zip(tasks, parts, strict=True)
    ]
    run(calls)
    return np.maximum.reduce(parts).view(np.float32)


def cast(
    x: Tensor,
    scales: np.ndarray,
    invs: np.ndarray,
    blocks: Blocks,
    fmt: Format,
    *,
    values: Tensor | None = None,
    room: Tensor | None = None,
) -> Cast:
    """Cast a contiguous matrix with the scales of its blocks, float32, `blocks.grid`.

    `values` is written, if given: contiguous float32 of as many elements. `room` is where the
    codes go, uint8; fresh memory without it.
    """
    data, kind = _data(x, blocks)
    shape = (blocks.rows, blocks.columns)
    codes = torch.empty(shape, dtype=torch.uint8) if room is None else room.view(shape)
    hat = torch.empty(0, 0, dtype=torch.float32) if values is None else values.view(shape)
    tasks = _tasks(blocks, whole=1)
    counts = np.zeros((len(tasks), COUNTS), np.int64)
    sums = np.zeros((len(tasks), SUMS))
    is_float32 = kind == FLOAT32
    ints = data if is_float32 else np.empty((0, 0), np.int32)
    views = (data, ints, ints.view(np.float32), kind)
    outs = (layout(fmt), codes.numpy(), hat.numpy())
    calls = [
        (cast_range, *views, scales, invs, blocks.across, blocks.along, *outs, *task, *out)
        for task, *out in zip(tasks, counts, sums, strict=True)
    ]
    run(calls)
    total, added = counts.sum(0), sums.sum(0)
    return Cast(
        codes=codes,
        amax=float(counts[:, AMAX].max().astype(np.int32).view(np.float32)),
        saturated=int(total[SATURATED]),
        underflowed=int(total[UNDERFLOWED]),
        nonfinite=int(total[NONFINITE]),
        square=float(added[SQUARE]),
        saturated_square=float(added[SATURATED_SQUARE]),
    )


def decode(codes: Tensor, fmt: Format, scale_inv: float) -> Tensor:
    """Return `codes * scale_inv` in float32 for contiguous codes with one scale."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    with np.errstate(over="ignore"):
        table = decode_table(fmt) * np.float32(scale_inv)
    data = (codes.view(torch.uint8).numpy().reshape(-1), table, values.numpy().reshape(-1))
    size = codes.numel()
    run([(decode_range, *data, i, min(i + TASK, size)) for i in range(0, size, TASK)])
    return values


def look(x: Tensor, codes: Tensor, values: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a cast's elements by exponent and by magnitude, and sums of squares and errors.

    All three are contiguous. See `unclamp.numerics.inspection`.
    """
    size = x.numel()
    bits, kind = _data(x, Blocks(1, size, 1, size))
    flat = (codes.view(torch.uint8).numpy().reshape(-1), values.numpy().reshape(-1))
    tasks = range(0, size, TASK)
    exponents = np.zeros((len(tasks), 277), np.int64)
    magnitudes = np.zeros((len(tasks), 128), np.int64)
    sums = np.zeros((len(tasks), 2))
    outs = zip(tasks, exponents, magnitudes, sums, strict=True)
    run([(look_range, bits[0], kind, *flat, i, min(i + TASK, size), *out) for i, *out in outs])
    return exponents.sum(0), magnitudes.sum(0), sums.sum(0)


@cache
def decode_table(fmt: Format) -> np.ndarray:
    """Return the value of each code, float32."""
    return np.array([fmt.decode(code) for code in range(256)], np.float32)


def _data(x: Tensor, blocks: Blocks) -> tuple[np.ndarray, int]:
    """Return the tensor's bits as a numpy matrix, and the kind of float that they are."""
    bits = torch.int32 if x.dtype == torch.float32 else torch.uint16
    return x.view(bits).numpy().reshape(blocks.rows, blocks.columns), KINDS[x.dtype]


Range = tuple[int, int]


def _tasks(blocks: Blocks, *, whole: int) -> list[tuple[Range, Range]]:
    """Cut a matrix into ranges of rows and columns of about `TASK` elements.

    `whole` rows stay together; a matrix of one group of rows is cut by columns.
    """
    rows, columns = blocks.rows, blocks.columns
    if rows <= whole:
        step = max(TASK // rows // CHUNK, 1) * CHUNK
        return [((0, rows), (c, min(c + step, columns))) for c in range(0, columns, step)]
    step = max(TASK // columns // whole, 1) * whole
    return [((r, min(r + step, rows)), (0, columns)) for r in range(0, rows, step)]


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache; later calls do nothing.

    Every kernel in every signature, in this order: processes that compile at the same time, each
    its own signature first, would store them in numba's cache under one another's names.
    """
    x = torch.ones(1, 1, dtype=torch.float32)
    blocks = Blocks(1, 1, 1, 1)
    one = np.ones((1, 1), np.float32)
    for dtype in KINDS:
        block_amax(x.to(dtype), blocks)
        cast(x.to(dtype), one, one, blocks, E4M3FN, values=torch.empty(1, 1, dtype=torch.float32))
        look(x.to(dtype), torch.zeros(1, 1, dtype=torch.uint8), x)
    decode(torch.zeros(1, dtype=torch.float8_e4m3fn), E4M3FN, 1.0)
