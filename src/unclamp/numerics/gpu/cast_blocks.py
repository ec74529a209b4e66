"""`quantize` with a scale a row or a block on a GPU: tiles, grids, and what is launched.

Blocks of powers of two that fit into a tile (1x128, 128x128, MX, short rows) are cast in one
read; rows that do not, or that lie across memory, in two. Others (3x5) are left to plain torch.
"""

# Launches of Triton kernels, whose constants are plain values here.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
from torch import Tensor

from unclamp.formats import Format
from unclamp.numerics.blocks import block_grid, orient
from unclamp.numerics.gpu.blockwise import PARTS, block_tops, cast_blocks
from unclamp.numerics.gpu.cast import KINDS, numbers
from unclamp.numerics.gpu.slots import slot_for
from unclamp.numerics.record import CastPlan, Quantized, torch_dtype
from unclamp.numerics.scale import check_scale
from unclamp.numerics.stats import Stat
from unclamp.scaling import Granularity

TILE = (64, 128)
"""Rows and columns of a tile, where blocks do not ask for others."""
LARGEST = 16384
"""Elements of a block that fits: more would not stay in registers."""
ELEMENTS_A_WARP = 512
SIZE = 1024
"""Programs added up at a time."""


class Tiling(NamedTuple):
    """A tile as a grid of blocks in memory: `gm` by `gn` blocks of `am` by `an` elements.

    `is_tall` and `is_wide`: a block is as tall, as wide, as the matrix; `fits`: into a tile.
    """

    gm: int
    am: int
    gn: int
    an: int
    is_tall: bool
    is_wide: bool
    fits: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.gm * self.am, self.gn * self.an


def tiling(rows: int, columns: int, block: tuple[int | None, int | None]) -> Tiling | None:
    """Return how a matrix of memory is cut, for blocks of rows by columns; None: not at all."""
    if any(size is not None and size & (size - 1) for size in block):
        return None
    tall, wide = (size is None for size in block)
    height = _power_of_two(rows) if tall else block[0]
    width = _power_of_two(columns) if wide else block[1]
    assert height is not None
    assert width is not None
    fits = height * width <= LARGEST and not (tall and width == 1)
    if not fits:
        if not (tall or wide):
            return None
        height, width = (TILE[0] if tall else height), (TILE[1] if wide else width)
    gm = max(TILE[0] // height, 1)
    gn = max(TILE[1] // width, 1)
    while gm > 1 and gm * height * gn * width > TILE[0] * TILE[1]:
        gm //= 2
    while gn > 1 and gm * height * gn * width > TILE[0] * TILE[1]:
        gn //= 2
    if tall:
        gm = 1
    if wide:
        gn = 1
    return Tiling(gm, height, gn, width, tall, wide, fits)


def quantize_blocks(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None = None,
    *,
    granularity: Granularity,
    axis: int = -1,
    margin: int = 0,
    power_of_two: bool = False,
    guard: bool = False,
    turned: bool = False,
) -> Quantized | None:
    """Do what `quantize` does; for benches and tests, which spell a plan out."""
    plan = CastPlan(
        format=fmt, granularity=granularity, margin=margin, power_of_two=power_of_two, guard=guard
    )
    return quantize(x, plan, scale, axis, turned=turned)


def quantize(
    x: Tensor,
    plan: CastPlan,
    scale: Tensor | None = None,
    axis: int = -1,
    *,
    turned: bool = False,
) -> Quantized | None:
    """Cast as `unclamp.numerics.quantize` does; None for blocks that no tile can have.

    A cast of a matrix along its first axis has its codes in column-major memory. With `turned`
    (square blocks) they are made both ways.
    """
    fmt, granularity, guard = plan.format, plan.granularity, plan.guard
    oriented = orient(x.detach(), axis)  # raises for an axis that is not there
    across = x.ndim == 2 and axis in (0, -2)
    data = x.detach().resolve_neg().contiguous()
    rows, columns = x.shape if across else oriented.shape
    block = granularity.block[::-1] if across else granularity.block
    cut = tiling(rows, columns, block)
    if cut is None:
        return None
    grid = block_grid(*oriented.shape, granularity.block)
    if scale is not None:
        check_scale(scale, torch.Size(grid))
        scale = scale.detach().to(torch.float32).contiguous()
    settings = numbers(
        fmt,
        margin=0 if guard else plan.margin,
        power_of_two=plan.power_of_two,
    )
    (grid_m, grid_n), (step_m, step_n) = (
        (grid[::-1], (1, grid[1])) if across else (grid, (grid[1], 1))
    )
    tiles_along = -(-columns // cut.tile[1])
    tiles = -(-rows // cut.tile[0]) * tiles_along
    empty = {"dtype": torch.uint8, "device": x.device}
    straight, is_turned = not across, across or turned
    codes = torch.empty(x.shape, **empty) if straight else data
    other = torch.empty((columns, rows), **empty) if is_turned else codes
    # Two tensors and not two views of one: an operator's results may not share memory.
    grids = [torch.empty(grid, dtype=torch.float32, device=x.device) for _ in range(2)]
    parts = torch.empty((PARTS, tiles), dtype=torch.float64, device=x.device)
    stats = torch.empty(len(Stat), dtype=torch.float64, device=x.device)
    shape = (rows, columns, tiles_along, grid_m, grid_n, step_m, step_n)
    constants = {"KIND": KINDS[x.dtype], "GM": cut.gm, "AM": cut.am, "GN": cut.gn, "AN": cut.an}
    constants |= {"IS_TALL": cut.is_tall, "IS_WIDE": cut.is_wide}
    warps = max(cut.tile[0] * cut.tile[1] // ELEMENTS_A_WARP, 1)
    how = {"num_warps": warps, "enable_fp_fusion": False}
    tops = parts if cut.fits else torch.zeros(grid, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        if not cut.fits:
            block_tops[(tiles,)](data, tops, *shape, **constants, **how)
        cast_blocks[(tiles,)](
            data, grids[0] if scale is None else scale, slot_for(x.device), tops, codes, other,
            *grids, parts, stats, *shape, x.numel(), **constants, F=settings, SIZE=SIZE,
            FITS=cut.fits, GIVEN=scale is not None, GUARD=guard,
            STRAIGHT=straight, TURNED=is_turned, **how,
        )  # fmt: skip
    made = other.view(torch_dtype(fmt)).t() if is_turned else None
    straight_codes = codes.view(torch_dtype(fmt)) if straight else made
    assert straight_codes is not None
    return Quantized(
        straight_codes,
        grids[0],
        grids[1],
        stats,
        plan,
        axis,
        turned=made if turned else None,
    )


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
