"""The cast on a CPU, in one pass over the tensor and on all of torch's threads.

Torch needs some 25 passes over a tensor for what a cast makes, and memory is what they wait for;
`unclamp.numerics.kernels` needs one. Results equal those of plain torch (`cast.quantize_plain`)
bit for bit, codes, scales, values and counts; sums of squares are taken in float64 here and lie
within 1e-6 of each other. A tensor is cut into tasks of fixed size whose sums are added in order,
so that nothing depends on the number of threads.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclamp.formats import E4M3FN, Format
from unclamp.numerics.blocks import orient
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
    look_rows,
)
from unclamp.numerics.layout import layout
from unclamp.numerics.record import CastPlan, Quantized, torch_dtype
from unclamp.numerics.scale import check_scale, choose_scale, scale_from_amax
from unclamp.numerics.stats import Stat
from unclamp.numerics.whole import NUMBER, cast_at, decode_at, merge_at, own_scale

CPU = torch.device("cpu")
"""Said each time: a user may have made another device the default, and addresses go out."""


def quantize(
    x: Tensor,
    plan: CastPlan,
    scale: Tensor | None,
    axis: int,
    *,
    values: Tensor | None = None,
    out: Tensor | None = None,
) -> Quantized:
    """Cast a tensor of this process's memory, not an empty one; see `numerics.quantize`."""
    if not plan.granularity.is_whole:
        return _by_block(x, plan, scale, axis, values=values, out=out)
    if scale is not None:
        check_scale(scale, torch.Size())
        scale = scale.detach().to(CPU, torch.float32)
    data = x.detach().resolve_neg().contiguous()
    count = data.numel()
    dtype = torch_dtype(plan.format)
    codes = (
        torch.empty(x.shape, dtype=dtype, device=CPU)
        if out is None
        else out.view(x.shape).view(dtype)
    )
    stats = torch.empty(len(Stat), dtype=torch.float64, device=CPU)
    results = torch.empty(2, dtype=torch.float32, device=CPU)
    if count <= TASK:
        cast_at(
            data.data_ptr(), count, KINDS[x.dtype], 0 if scale is None else scale.data_ptr(),
            NUMBER[plan.format.name], plan.largest, plan.power_of_two, plan.guard, codes.data_ptr(),
            0 if values is None else values.data_ptr(), stats.data_ptr(), results.data_ptr(),
        )  # fmt: skip
    else:
        _in_tasks(data, plan, scale, codes=codes, values=values, stats=stats, results=results)
    scale_inv, amax = results.unbind()
    return Quantized(
        codes,
        scale_inv,
        amax,
        stats,
        plan,
        axis,
        None if values is None else values.view(x.shape),
    )


def _in_tasks(
    data: Tensor, plan: CastPlan, scale: Tensor | None, *, codes: Tensor, values: Tensor | None,
    stats: Tensor, results: Tensor,
) -> None:  # fmt: skip
    """Do what `whole` does, for a tensor that is cut into tasks for several threads."""
    blocks = Blocks(1, data.numel(), 1, data.numel())
    used = np.float32(0.0 if scale is None else float(scale))
    guard, recast = plan.guard, False

    def cast_with(used: Any) -> Cast:
        one = np.full((1, 1), used, np.float32)
        with np.errstate(divide="ignore", over="ignore"):  # as silent as torch
            return cast(
                data,
                one,
                np.float32(1) / one,
                blocks,
                plan.format,
                values=values,
                out=codes.view(torch.uint8),
            )

    if not used > 0:
        used = own_scale(block_amax(data, blocks)[0, 0], plan.largest, plan.power_of_two)
        guard = False
    made = cast_with(used)
    if guard and np.float32(made.amax) * used > layout(plan.format).limit:
        recast = True
        used = own_scale(np.float32(made.amax), plan.largest, plan.power_of_two)
        made = cast_with(used)
    with np.errstate(divide="ignore", over="ignore"):
        results[0] = float(np.float32(1) / used)
    results[1] = made.amax if made.nonfinite < data.numel() else -1.0
    _fill_stats(stats, made, float(results[1]), float(results[0]), recast=recast)


def _fill_stats(
    stats: Tensor, made: "Cast", amax: float, scale_inv: float, *, recast: bool
) -> None:
    fields = {
        Stat.AMAX: amax,
        Stat.SCALE_INV: scale_inv,
        Stat.ELEMENTS: made.codes.numel(),
        Stat.SATURATED: made.saturated,
        Stat.UNDERFLOWED: made.underflowed,
        Stat.NONFINITE: made.nonfinite,
        Stat.RECAST: recast,
        Stat.SQUARE: made.square,
        Stat.SATURATED_SQUARE: made.saturated_square,
        Stat.CASTS: 1,
    }
    numbers = [fields[field] for field in Stat]
    stats.copy_(torch.tensor(numbers, dtype=torch.float64, device=CPU))


def _by_block(
    x: Tensor, plan: CastPlan, scale: Tensor | None, axis: int, *,
    values: Tensor | None, out: Tensor | None,
) -> Quantized:  # fmt: skip
    oriented = orient(x.detach(), axis)  # raises for an axis that is not there
    transposed = x.ndim == 2 and axis in (0, -2)
    data = (
        x.detach()
        .resolve_neg()
        .contiguous()
        .view(oriented.shape[::-1] if transposed else oriented.shape)
    )
    across, along = (
        size if block is None else block
        for size, block in zip(oriented.shape, plan.granularity.block, strict=True)
    )
    rows, columns = data.shape
    blocks = Blocks(rows, columns, *((along, across) if transposed else (across, along)))
    amax = torch.from_numpy(block_amax(data, blocks))
    amax = amax.t() if transposed else amax
    own = scale_from_amax(amax, plan.largest, power_of_two=plan.power_of_two)
    limit = plan.format.overflow_limit if plan.guard else torch.inf
    used, recast = choose_scale(scale, own, amax, limit)
    inv = used.reciprocal()
    scales, invs = ((t.t() if transposed else t).contiguous().numpy() for t in (used, inv))
    made = cast(data, scales, invs, blocks, plan.format, values=values, out=out)
    is_seen = made.nonfinite < x.numel()
    stats = torch.empty(len(Stat), dtype=torch.float64, device=CPU)
    top = made.amax if is_seen else -1.0
    _fill_stats(stats, made, top, float(inv.max()), recast=bool(recast))
    return Quantized(
        made.codes.view(torch_dtype(plan.format)).view(x.shape),
        inv.contiguous(),
        amax.contiguous() if is_seen else torch.full_like(inv, -1),
        stats,
        plan,
        axis,
        None if values is None else values.view(x.shape),
    )


def array_of(x: Tensor, dtype: Any) -> np.ndarray:
    """Return a contiguous tensor's memory as a flat array; the tensor has to outlive it.

    `Tensor.numpy` would make the storage non-resizable for good, and FSDP resizes.
    """
    size = x.numel() * x.element_size()
    memory: Any = (ctypes.c_char * size).from_address(x.data_ptr())
    return np.frombuffer(memory, dtype)


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
    out: Tensor | None = None,
) -> Cast:
    """Cast a contiguous matrix with the scales of its blocks, float32, `blocks.grid`.

    `values` is written, if given: contiguous float32 of as many elements. `out` is where the
    codes go, uint8; fresh memory without it.
    """
    data, kind = _data(x, blocks)
    shape = (blocks.rows, blocks.columns)
    codes = torch.empty(shape, dtype=torch.uint8, device=CPU) if out is None else out.view(shape)
    hat = np.empty((0, 0), np.float32)
    if values is not None:
        hat = array_of(values, np.float32).reshape(shape)
    tasks = _tasks(blocks, whole=1)
    counts = np.zeros((len(tasks), COUNTS), np.int64)
    sums = np.zeros((len(tasks), SUMS))
    is_float32 = kind == FLOAT32
    ints = data if is_float32 else np.empty((0, 0), np.int32)
    views = (data, ints, ints.view(np.float32), kind)
    outs = (layout(fmt), array_of(codes, np.uint8).reshape(shape), hat)
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


def decode(codes: Tensor, fmt: Format, scale_inv: Tensor | None) -> Tensor:
    """Return `codes * scale_inv` in float32 for contiguous codes with one scale, 1 without it."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=CPU)
    size, table = codes.numel(), decode_table(fmt)
    if size <= TASK and scale_inv is not None:
        decode_at(
            codes.data_ptr(), size, table.ctypes.data, scale_inv.data_ptr(), values.data_ptr()
        )
        return values
    if scale_inv is not None:
        with np.errstate(over="ignore"):
            table = table * np.float32(float(scale_inv))
    data = (array_of(codes, np.uint8), table, array_of(values, np.float32))
    run([(decode_range, *data, i, min(i + TASK, size)) for i in range(0, size, TASK)])
    return values


def look(x: Tensor, codes: Tensor, values: Tensor) -> tuple[np.ndarray, ...]:
    """Return a cast's elements by exponent, magnitude and quarter, and squares and errors.

    All three are contiguous. Quarters are `[1024, 2]`, with the rests of mantissas; see
    `look_range`, and `unclamp.numerics.inspection`.
    """
    size = x.numel()
    bits, kind = _data(x, Blocks(1, size, 1, size))
    flat = (array_of(codes, np.uint8), array_of(values, np.float32))
    tasks = range(0, size, TASK)
    subnormals = np.zeros((len(tasks), 23), np.int64)
    quarters = np.zeros((len(tasks), 1024, 2), np.int64)
    magnitudes = np.zeros((len(tasks), 128), np.int64)
    sums = np.zeros((len(tasks), 2))
    outs = zip(tasks, subnormals, quarters, magnitudes, sums, strict=True)
    run([(look_range, bits[0], kind, *flat, i, min(i + TASK, size), *out) for i, *out in outs])
    found = quarters.sum(0)
    octaves = found[4:1020, 0].reshape(-1, 4).sum(1)
    exponents = np.concatenate([subnormals.sum(0), octaves])
    return exponents, magnitudes.sum(0), found, sums.sum(0)


def look_by_row(x: Tensor, values: Tensor, *, a_decibel: int, lowest: int, bins: int) -> np.ndarray:
    """Return how many rows of a cast have which ratio of signal to error, as `look_rows` counts.

    Both are contiguous, and not empty.
    """
    width = x.shape[-1] if x.ndim else 1
    rows = x.numel() // width
    bits, kind = _data(x, Blocks(1, x.numel(), 1, x.numel()))
    flat = array_of(values, np.float32)
    step = max(TASK // width, 1)
    tasks = range(0, rows, step)
    counts = np.zeros((len(tasks), bins), np.int64)
    run([
        (look_rows, bits[0], kind, flat, width, i, min(i + step, rows), a_decibel, lowest, out)
        for i, out in zip(tasks, counts, strict=True)
    ])  # fmt: skip
    return counts.sum(0)


@cache
def decode_table(fmt: Format) -> np.ndarray:
    """Return the value of each code, float32."""
    return np.array([fmt.decode(code) for code in range(256)], np.float32)


def _data(x: Tensor, blocks: Blocks) -> tuple[np.ndarray, int]:
    """Return the tensor's bits as a numpy matrix, and the kind of float that they are."""
    bits = np.int32 if x.dtype == torch.float32 else np.uint16
    return array_of(x, bits).reshape(blocks.rows, blocks.columns), KINDS[x.dtype]


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


def merge(total: Tensor, stats: list[Tensor | None]) -> None:
    """Merge statistics into consecutive rows, float64 `[len(stats), len(Stat)]`, in place."""
    addresses = tuple(0 if vector is None else vector.data_ptr() for vector in stats)
    merge_at(total.data_ptr(), len(addresses), addresses)
    torch.autograd.graph.increment_version(total)


PLAN = CastPlan(format=E4M3FN)


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache; later calls do nothing.

    Every kernel in every signature, in this order: processes that compile at the same time, each
    its own signature first, would store them in numba's cache under one another's names.
    """
    x = torch.ones(1, 1, dtype=torch.float32, device=CPU)
    blocks = Blocks(1, 1, 1, 1)
    one = np.ones((1, 1), np.float32)
    for dtype in KINDS:
        block_amax(x.to(dtype), blocks)
        cast(x.to(dtype), one, one, blocks, E4M3FN, values=x.clone())
        look(x.to(dtype), x.to(torch.uint8), x)
        look_by_row(x.to(dtype), x, a_decibel=1, lowest=0, bins=2)
    stats = quantize(x, PLAN, None, -1).stats
    merge(torch.zeros(3, len(Stat), dtype=torch.float64, device=CPU), [stats, None, None])
    codes = x.to(torch.float8_e4m3fn)
    decode(codes, E4M3FN, None)
    decode(codes, E4M3FN, x[0, 0])
