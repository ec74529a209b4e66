"""The cast with a scale a row or a block, in one read where a block fits into a tile.

    block_tops    amaxes of blocks that are larger than a tile, by atomic maximum of bits
    cast_blocks   a tile's amaxes (its own, or those of `block_tops`), scales, codes, counts;
                  the last program to finish adds up the statistics (`settling`)

The tensor is a row-major matrix, and a tile has whole blocks of it, AM rows by AN columns, in a
grid of GM by GN. In the results a block lies at `m * step_m + n * step_n`: the grid of a cast
along the first axis is turned. Codes are written as they lie, turned, or both.
"""

# Kernels are Triton's language, of which pyright sees Python's.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from unclamp.numerics.gpu.rounding import (
    ABS,
    INF,
    as_float,
    careful_codes,
    load_bits,
    own_scale,
    unit_of,
    unit_square,
)
from unclamp.numerics.gpu.settling import (
    AMAX,
    CASTS,
    ELEMENTS,
    NONFINITE,
    RECAST,
    SATURATED,
    SATURATED_SQUARE,
    SCALE_INV,
    SQUARE,
    UNDERFLOWED,
    is_last,
)
from unclamp.numerics.gpu.tensorwise import store_codes, tile_offsets

PARTS = 8
"""Numbers of a program, float64 `[PARTS, programs]`: the two maxima, then what is added up."""


@triton.jit
def finite_bits(bits):
    """Return the bits of magnitudes; 0 for NaN and Inf."""
    size = bits & ABS
    return tl.where(size < INF, size, 0)


@triton.jit
def block_maxima(size, GM: tl.constexpr, AM: tl.constexpr, GN: tl.constexpr, AN: tl.constexpr):
    """Return the maximum of each block of a tile, `[GM, GN]`.

    One axis at a time and never four at once: Triton 3.6 may take minutes to find registers for
    a reshaping to four axes.
    """
    if GN == 1:
        along = tl.max(size, axis=1)[:, None]
    elif AN == 1:
        along = size
    else:
        along = tl.max(tl.reshape(size, [GM * AM, GN, AN]), axis=2)
    if GM == 1:
        top = tl.max(along, axis=0)[None, :]
    elif AM == 1:
        top = along
    else:
        top = tl.max(tl.reshape(along, [GM, AM, GN]), axis=1)
    return top


@triton.jit
def over_blocks(values, GM: tl.constexpr, AM: tl.constexpr, GN: tl.constexpr, AN: tl.constexpr):
    """Return the value of its block at each element of a tile; see `block_maxima`."""
    if GM == 1:
        down = tl.broadcast_to(values, [AM, GN])
    elif AM == 1:
        down = values
    else:
        tall = tl.broadcast_to(tl.reshape(values, [GM, 1, GN]), [GM, AM, GN])
        down = tl.reshape(tall, [GM * AM, GN])
    if GN == 1:
        each = tl.broadcast_to(down, [GM * AM, AN])
    elif AN == 1:
        each = down
    else:
        wide = tl.broadcast_to(tl.reshape(down, [GM * AM, GN, 1]), [GM * AM, GN, AN])
        each = tl.reshape(wide, [GM * AM, GN * AN])
    return each


@triton.jit
def grid_offsets(tile, tiles_along, grid_m, grid_n, step_m, step_n,
                 GM: tl.constexpr, GN: tl.constexpr, IS_TALL: tl.constexpr,
                 IS_WIDE: tl.constexpr):  # fmt: skip
    """Return where a tile's blocks lie in the grid; a block as tall as the matrix is row 0."""
    m = (tile // tiles_along) * GM + tl.arange(0, GM)
    n = (tile % tiles_along) * GN + tl.arange(0, GN)
    if IS_TALL:
        m = tl.arange(0, GM)
    if IS_WIDE:
        n = tl.arange(0, GN)
    mask = (m[:, None] < grid_m) & (n[None, :] < grid_n)
    return m[:, None].to(tl.int64) * step_m + n[None, :] * step_n, mask


@triton.jit
def block_tops(
    x, tops, rows, columns, tiles_along, grid_m, grid_n, step_m, step_n,
    KIND: tl.constexpr, GM: tl.constexpr, AM: tl.constexpr, GN: tl.constexpr, AN: tl.constexpr,
    IS_TALL: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Raise the amaxes (bits) of blocks to those of a tile."""
    tile = tl.program_id(0)
    m, n, mask = tile_offsets(tile, rows, columns, tiles_along, GM * AM, GN * AN)
    bits = load_bits(x, m[:, None].to(tl.int64) * columns + n[None, :], mask, KIND)
    top = block_maxima(finite_bits(bits), GM, AM, GN, AN)
    at, there = grid_offsets(
        tile, tiles_along, grid_m, grid_n, step_m, step_n, GM, GN, IS_TALL, IS_WIDE
    )
    tl.atomic_max(tops + at, top, mask=there, sem="relaxed")


@triton.jit
def add_up(parts, stats, amax, programs, elements, scales, SIZE: tl.constexpr):
    """Make the statistics of a cast from those of its programs; amaxes -1 if nothing is finite."""
    at = tl.arange(0, SIZE)
    start = programs * 0
    largest = tl.zeros([SIZE], tl.float64)
    inv = tl.zeros([SIZE], tl.float64)
    saturated = tl.zeros([SIZE], tl.float64)
    underflowed = tl.zeros([SIZE], tl.float64)
    nonfinite = tl.zeros([SIZE], tl.float64)
    recast = tl.zeros([SIZE], tl.float64)
    square = tl.zeros([SIZE], tl.float64)
    removed = tl.zeros([SIZE], tl.float64)
    while start < programs:
        here = parts + start + at
        mask = start + at < programs
        most = tl.load(here, mask=mask, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, most)
        most = tl.load(here + programs, mask=mask, other=0.0, cache_modifier=".cg")
        inv = tl.maximum(inv, most)
        saturated += tl.load(here + 2 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        underflowed += tl.load(here + 3 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        nonfinite += tl.load(here + 4 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        most = tl.load(here + 5 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        recast = tl.maximum(recast, most)
        square += tl.load(here + 6 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        removed += tl.load(here + 7 * programs, mask=mask, other=0.0, cache_modifier=".cg")
        start += SIZE
    wild = tl.sum(nonfinite)
    nothing = wild * 0
    tl.store(stats + AMAX, tl.where(wild < elements, tl.max(largest), nothing - 1))
    tl.store(stats + SCALE_INV, tl.max(inv))
    tl.store(stats + ELEMENTS, nothing + elements)
    tl.store(stats + SATURATED, tl.sum(saturated))
    tl.store(stats + UNDERFLOWED, tl.sum(underflowed))
    tl.store(stats + NONFINITE, wild)
    tl.store(stats + RECAST, tl.max(recast))
    tl.store(stats + SQUARE, tl.sum(square))
    tl.store(stats + SATURATED_SQUARE, tl.sum(removed))
    tl.store(stats + CASTS, nothing + 1)
    if wild >= elements:
        start = programs * 0
        while start < scales:
            none = tl.zeros([SIZE], tl.float32) - 1
            tl.store(amax + start + at, none, mask=start + at < scales)
            start += SIZE


@triton.jit
def cast_blocks(
    x, scale, slot, tops, out, turned, scale_inv, amax, parts, stats, rows, columns, tiles_along,
    grid_m, grid_n, step_m, step_n, elements,
    KIND: tl.constexpr, F: tl.constexpr,
    GM: tl.constexpr, AM: tl.constexpr, GN: tl.constexpr, AN: tl.constexpr,
    IS_TALL: tl.constexpr, IS_WIDE: tl.constexpr, FITS: tl.constexpr,
    GIVEN: tl.constexpr, GUARD: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Cast a tile; where its blocks fit into it, `tops` is not read."""
    tile, programs = tl.program_id(0), tl.num_programs(0)
    m, n, mask = tile_offsets(tile, rows, columns, tiles_along, GM * AM, GN * AN)
    bits = load_bits(x, m[:, None].to(tl.int64) * columns + n[None, :], mask, KIND)
    size = finite_bits(bits)
    at, there = grid_offsets(
        tile, tiles_along, grid_m, grid_n, step_m, step_n, GM, GN, IS_TALL, IS_WIDE
    )
    if FITS:
        top = block_maxima(size, GM, AM, GN, AN)
    else:
        top = tl.load(tops + at, mask=there, other=0)
    used = own_scale(top, F)
    recast = tile * 0
    if GIVEN:
        given = tl.load(scale + at, mask=there, other=1.0)
        passes = (as_float(top) * given > F.limit) & GUARD
        used = tl.where((given > 0) & (passes == 0), given, used)
        recast = tl.max(passes.to(tl.int32))
    inv = tl.div_rn(used * 0 + 1.0, used)
    tl.store(scale_inv + at, inv, mask=there)
    tl.store(amax + at, as_float(top), mask=there)
    scaled = as_float(bits) * over_blocks(used, GM, AM, GN, AN)
    store_codes(
        careful_codes(bits, scaled, F), out, turned, m, n, mask, rows, columns, STRAIGHT, TURNED
    )
    magnitude = as_float(size)
    highest = tl.max(size)
    unit, each = unit_of(highest), unit_square(highest)
    brought = magnitude * unit
    lost = (tl.abs(scaled) > F.limit) & ((bits & ABS) < INF)
    excess = tl.where(lost, (magnitude - F.max * over_blocks(inv, GM, AM, GN, AN)) * unit, 0.0)
    vanishes = (tl.abs(scaled) <= F.vanishing) & (as_float(bits) != 0)
    nonfinite = tl.sum(((bits & ABS) >= INF).to(tl.int32))
    tl.store(parts + tile, as_float(highest).to(tl.float64))
    tl.store(parts + programs + tile, tl.max(tl.where(there, inv, 0.0)).to(tl.float64))
    tl.store(parts + 2 * programs + tile, tl.sum(lost.to(tl.int32)).to(tl.float64))
    tl.store(parts + 3 * programs + tile, tl.sum(vanishes.to(tl.int32)).to(tl.float64))
    tl.store(parts + 4 * programs + tile, nonfinite.to(tl.float64))
    tl.store(parts + 5 * programs + tile, recast.to(tl.float64))
    tl.store(parts + 6 * programs + tile, tl.sum(brought * brought).to(tl.float64) * each)
    tl.store(parts + 7 * programs + tile, tl.sum(excess * excess).to(tl.float64) * each)
    if is_last(slot, programs):
        add_up(parts, stats, amax, programs, elements, grid_m * grid_n, SIZE)
