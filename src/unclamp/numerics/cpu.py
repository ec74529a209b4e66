"""The cast on a CPU, in one pass over the tensor and on all of torch's threads.

Torch needs some 25 passes over a tensor for what a cast makes, and memory is what they wait for;
`unclamp.numerics.kernels` needs one. Results equal those of plain torch (`cast.quantize_plain`)
bit for bit, codes, scales, values and counts; sums of squares are taken in float64 here and lie
within 1e-6 of each other. A tensor is cut into tasks of fixed size whose sums are added in order,
so that nothing depends on the number of threads.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclamp.formats import E4M3FN, Format
from unclamp.numerics.blocks import orient
from unclamp.numerics.compiled import run
from unclamp.numerics.decode import decode_panel
from unclamp.numerics.kernels import (
    AMAX,
    COUNTS,
    KINDS,
    NONFINITE,
    NUMBER,
    SATURATED,
    SATURATED_SQUARE,
    SQUARE,
    SUMS,
    TASK,
    UNDERFLOWED,
    own_scale,
)
from unclamp.numerics.layout import layout
from unclamp.numerics.looks import MAGNITUDES, QUARTERS, SUBNORMALS, look_at
from unclamp.numerics.record import CastPlan, Quantized, torch_dtype
from unclamp.numerics.scale import check_scale, choose_scale, scale_from_amax
from unclamp.numerics.stats import Stat, merged_stats
from unclamp.numerics.tiles import TALL, amax_at, cast_tiles
from unclamp.numerics.whole import cast_at, merge_at
from unclamp.scaling import Block

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
    """Do what `cast_at` does, for a tensor that is cut into tasks for several threads."""
    count, kind, width = data.numel(), KINDS[data.dtype], data.element_size()
    starts = range(0, count, TASK)
    each = torch.empty(len(starts), len(Stat), dtype=torch.float64, device=CPU)
    ends = torch.empty(len(starts), 2, dtype=torch.float32, device=CPU)

    def cast_with(used: float) -> Tensor:
        one = torch.tensor(used, dtype=torch.float32, device=CPU)
        run([
            (
                cast_at, data.data_ptr() + start * width, min(TASK, count - start), kind,
                one.data_ptr(), NUMBER[plan.format.name], plan.largest, plan.power_of_two, False,
                codes.data_ptr() + start,
                0 if values is None else values.data_ptr() + 4 * start,
                each[task].data_ptr(), ends[task].data_ptr(),
            )
            for task, start in enumerate(starts)
        ])  # fmt: skip
        return merged_stats(each)

    used, guard = 0.0 if scale is None else float(scale), plan.guard
    if not used > 0:
        tops = _amaxes(data, [(start, 1, min(TASK, count - start)) for start in starts], TASK)
        used = float(own_scale(tops.max(), plan.largest, plan.power_of_two))
        guard = False
    made = cast_with(used)
    amax = np.float32(made[Stat.AMAX])
    if guard and amax * np.float32(used) > layout(plan.format).limit:
        made = cast_with(float(own_scale(amax, plan.largest, plan.power_of_two)))
        made[Stat.RECAST] = 1
    made[Stat.CASTS] = 1
    stats.copy_(made)
    results[0], results[1] = ends[0, 0], made[Stat.AMAX]


def _by_block(
    x: Tensor, plan: CastPlan, scale: Tensor | None, axis: int, *,
    values: Tensor | None, out: Tensor | None,
) -> Quantized:  # fmt: skip
    oriented = orient(x.detach(), axis)  # raises for an axis that is not there
    transposed = x.ndim == 2 and axis in (0, -2)
    data = x.detach().resolve_neg().contiguous()
    blocks = _blocks(oriented.shape, plan.granularity.block, transposed=transposed)
    given = _given(scale, blocks, transposed=transposed)
    dtype = torch_dtype(plan.format)
    if out is None:
        codes = torch.empty(x.shape, dtype=dtype, device=CPU)
    else:
        codes = out.view(x.shape).view(dtype)
    amax = torch.zeros(blocks.grid, dtype=torch.float32, device=CPU)
    used, inv = torch.empty_like(amax), torch.empty_like(amax)
    is_measured = blocks.across > TALL
    recast = is_measured and _measure(data, plan, given, blocks, amax=amax, used=used, inv=inv)
    tasks = _tasks(blocks, whole=1 if is_measured else blocks.across)
    counts, sums = np.zeros((len(tasks), COUNTS), np.int64), np.zeros((len(tasks), SUMS))
    passed = run([
        (
            cast_tiles, data.data_ptr(), KINDS[x.dtype], *blocks,
            0 if given is None else given.data_ptr(), NUMBER[plan.format.name], plan.largest,
            plan.power_of_two, plan.guard, codes.data_ptr(),
            0 if values is None else values.data_ptr(), amax.data_ptr(), used.data_ptr(),
            inv.data_ptr(), *(array.ctypes.data for array in out), is_measured, *task,
        )
        for task, *out in zip(tasks, counts, sums, strict=True)
    ])  # fmt: skip
    stats = _stats(counts, sums, x.numel(), float(inv.max()), recast=recast or any(passed))
    if transposed:
        amax, inv = amax.t(), inv.t()
    return Quantized(
        codes,
        inv.contiguous(),
        amax.contiguous() if stats[Stat.AMAX] >= 0 else torch.full_like(inv, -1),
        stats,
        plan,
        axis,
        None if values is None else values.view(x.shape),
    )


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


def _blocks(shape: torch.Size, block: Block, *, transposed: bool) -> Blocks:
    """Return the blocks of an oriented matrix as they lie in memory."""
    rows, columns = shape
    across, along = (
        size if length is None else length for size, length in zip(shape, block, strict=True)
    )
    if transposed:
        return Blocks(columns, rows, along, across)
    return Blocks(rows, columns, across, along)


def _measure(
    data: Tensor, plan: CastPlan, given: Tensor | None, blocks: Blocks, *,
    amax: Tensor, used: Tensor, inv: Tensor,
) -> bool:  # fmt: skip
    """Fill in amaxes, scales and their inverses; return whether a guard has passed over some."""
    step = max(TASK // blocks.columns, 1)
    tasks, firsts = [], []
    for top in range(0, blocks.rows, blocks.across):
        bottom = min(top + blocks.across, blocks.rows)
        firsts.append(len(tasks))
        tasks += [
            (row * blocks.columns, min(step, bottom - row), blocks.columns)
            for row in range(top, bottom, step)
        ]
    tops = np.maximum.reduceat(_amaxes(data, tasks, blocks.along), firsts)
    amax.copy_(torch.from_numpy(tops))
    own = scale_from_amax(amax, plan.largest, power_of_two=plan.power_of_two)
    limit = plan.format.overflow_limit if plan.guard else torch.inf
    chosen, recast = choose_scale(given, own, amax, limit)
    used.copy_(chosen)
    torch.reciprocal(used, out=inv)
    return bool(recast)


def _amaxes(data: Tensor, pieces: list[tuple[int, int, int]], along: int) -> np.ndarray:
    """Return the amaxes of pieces, each a row of blocks: float32 `[pieces, blocks]`.

    A piece is where it starts in memory, in elements, its rows and its columns.
    """
    tops = np.zeros((len(pieces), -(-pieces[0][2] // along)), np.float32)
    run([
        (
            amax_at, data.data_ptr() + start * data.element_size(), KINDS[data.dtype], *shape,
            along, part.ctypes.data,
        )
        for (start, *shape), part in zip(pieces, tops, strict=True)
    ])  # fmt: skip
    return tops


def _given(scale: Tensor | None, blocks: Blocks, *, transposed: bool) -> Tensor | None:
    """Return given scales as the kernel wants them, one for each block as it lies in memory."""
    if scale is None:
        return None
    check_scale(scale, torch.Size(blocks.grid[::-1] if transposed else blocks.grid))
    scale = scale.detach().to(CPU, torch.float32)
    return (scale.t() if transposed else scale).contiguous()


def _stats(
    counts: np.ndarray, sums: np.ndarray, elements: int, scale_inv: float, *, recast: bool
) -> Tensor:
    """Return the statistics of tasks that have counted and summed up."""
    total, added = counts.sum(0), sums.sum(0)
    top = counts[:, AMAX].max().astype(np.int32).view(np.float32)
    fields = {
        Stat.AMAX: top if total[NONFINITE] < elements else -1.0,
        Stat.SCALE_INV: scale_inv,
        Stat.ELEMENTS: elements,
        Stat.SATURATED: total[SATURATED],
        Stat.UNDERFLOWED: total[UNDERFLOWED],
        Stat.NONFINITE: total[NONFINITE],
        Stat.RECAST: recast,
        Stat.SQUARE: added[SQUARE],
        Stat.SATURATED_SQUARE: added[SATURATED_SQUARE],
        Stat.CASTS: 1,
    }
    numbers = [float(fields[field]) for field in Stat]
    return torch.tensor(numbers, dtype=torch.float64, device=CPU)


def decode(codes: Tensor, fmt: Format, scale_inv: Tensor | None) -> Tensor:
    """Return `codes * scale_inv` in float32 for contiguous codes with one scale, 1 without it."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=CPU)
    size, number = codes.numel(), NUMBER[fmt.name]
    if scale_inv is None:
        scale_inv = torch.ones((), dtype=torch.float32, device=CPU)
    scale_inv = scale_inv.to(CPU, torch.float32)
    run([
        (
            decode_panel, codes.data_ptr() + i, 1, part, scale_inv.data_ptr(), 1, part, number,
            0, 1, 0, part, values.data_ptr() + 4 * i,
        )
        for i in range(0, size, TASK) if (part := min(TASK, size - i))
    ])  # fmt: skip
    return values


class Look(NamedTuple):
    """What the kernel of a closer look counts and sums up; see `unclamp.numerics.inspection`."""

    exponents: np.ndarray
    quarters: np.ndarray
    magnitudes: np.ndarray
    ratios: np.ndarray
    sums: np.ndarray


def look(
    x: Tensor, codes: Tensor, values: Tensor, *, a_decibel: int, lowest: int, bins: int
) -> Look:
    """Return a cast's elements by exponent, quarter and magnitude, its rows by ratio, and squares.

    All three are contiguous, and not empty. Quarters are `[QUARTERS, 2]`; see `look_at`.
    """
    width = x.shape[-1] if x.ndim else 1
    rows = x.numel() // width
    step = max(TASK // width, 1)
    tasks = range(0, rows, step)
    shapes = (SUBNORMALS,), (QUARTERS, 2), (MAGNITUDES,), (bins,)
    made: list[np.ndarray] = [np.zeros((len(tasks), *shape), np.int64) for shape in shapes]
    made.append(np.zeros((len(tasks), 2)))
    places = [(array.ctypes.data, array.strides[0]) for array in made]
    run([
        (
            look_at, x.data_ptr() + first * width * x.element_size(), KINDS[x.dtype],
            codes.data_ptr() + first * width, values.data_ptr() + 4 * first * width, width,
            min(step, rows - first), a_decibel, lowest, bins,
            *(start + task * size for start, size in places),
        )
        for task, first in enumerate(tasks)
    ])  # fmt: skip
    one = len(tasks) == 1  # adding up one takes as long as looking at 10,000 elements
    subnormals, quarters, *others = (array[0] if one else array.sum(0) for array in made)
    octaves = quarters[4:1020, 0].reshape(-1, 4).sum(1)  # of 0 and of Inf there are none
    return Look(np.concatenate([subnormals, octaves]), quarters, *others)


def _tasks(blocks: Blocks, *, whole: int) -> list[tuple[int, int, int, int]]:
    """Cut a matrix into ranges of rows and of columns of about `TASK` elements.

    `whole` rows stay together; a matrix of one group of rows is cut by columns between blocks.
    """
    rows, columns = blocks.rows, blocks.columns
    if rows <= whole:
        step = max(TASK // rows // blocks.along, 1) * blocks.along
        return [(0, rows, c, min(c + step, columns)) for c in range(0, columns, step)]
    step = max(TASK // columns // whole, 1) * whole
    return [(r, min(r + step, rows), 0, columns) for r in range(0, rows, step)]


def merge(total: Tensor, stats: list[Tensor | None]) -> None:
    """Merge statistics into consecutive rows, float64 `[len(stats), len(Stat)]`, in place."""
    addresses = tuple(0 if vector is None else vector.data_ptr() for vector in stats)
    merge_at(total.data_ptr(), len(addresses), addresses)
    torch.autograd.graph.increment_version(total)


PLAN = CastPlan(format=E4M3FN)


def warm_up() -> None:
    """Compile the kernel that every user needs, or load it from numba's cache.

    The others are compiled where they are first called: each has one signature, so that processes
    that compile at the same time store the same.
    """
    quantize(torch.ones(1, 1, dtype=torch.float32, device=CPU), PLAN, None, -1)
