"""The cast of a whole tensor with one scale, in two kernels that need no look from the host.

    cast_tiles    reads the tensor once: codes with the given scale, amax and counts by program
    settle        every program learns the amax from those of all programs, and decides:
                  usually the first one adds up the statistics and all leave; where there was no
                  scale to use (dynamic scaling; 0: nothing measured yet), or a guarded one would
                  saturate, they cast again with the tensor's own scale

Both are launched always, so that a CUDA graph can hold them. Dynamic scaling is the same with
`cast_tiles` that only measures: reading a tensor twice is what it costs.

Where the second kernel casts, its scale is the tensor's own, and nothing can saturate; of the
first one's counts only underflow changes, and it is added up in whole numbers, in any order.
Squares are summed in float32 within a tile of values brought to about 1, and tiles in float64,
in order: the same tensor gives the same bits at every call.

A guarded cast that will be repeated need not write codes: the first program that meets an
overflow raises a flag, and tiles that see it only measure. Whether one sees it or not, the
second kernel overwrites the codes.
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
    quick_codes,
    unit_of,
    unit_square,
)
from unclamp.numerics.stats import Stat

AMAX = tl.constexpr(int(Stat.AMAX))
SCALE_INV = tl.constexpr(int(Stat.SCALE_INV))
ELEMENTS = tl.constexpr(int(Stat.ELEMENTS))
SATURATED = tl.constexpr(int(Stat.SATURATED))
UNDERFLOWED = tl.constexpr(int(Stat.UNDERFLOWED))
NONFINITE = tl.constexpr(int(Stat.NONFINITE))
RECAST = tl.constexpr(int(Stat.RECAST))
SQUARE = tl.constexpr(int(Stat.SQUARE))
SATURATED_SQUARE = tl.constexpr(int(Stat.SATURATED_SQUARE))
CASTS = tl.constexpr(int(Stat.CASTS))
SMALL = tl.constexpr(0x2B800000)
LARGE = tl.constexpr(0x58800000)
"""Bits of 2**-40 and 2**50: in between, squares of a tile's values fit float32 as they are."""
PARTS = 5
"""Sums of a program, float64 `[PARTS, programs]`: the three counts, then the two squares."""


@triton.jit
def tile_offsets(tile, rows, columns, tiles_along, BM: tl.constexpr, BN: tl.constexpr):
    """Return the rows and columns of a tile, and which of its elements exist."""
    if BM == 1:  # one row: no division
        m = tl.arange(0, BM)
        n = tile.to(tl.int64) * BN + tl.arange(0, BN)
    else:
        m = (tile // tiles_along) * BM + tl.arange(0, BM)
        n = (tile % tiles_along).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (m[:, None] < rows) & (n[None, :] < columns)
    return m, n, mask


@triton.jit
def store_codes(codes, out, turned, m, n, mask, rows, columns,
                STRAIGHT: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Write a tile of codes as rows, as columns, or as both."""
    if STRAIGHT:
        tl.store(out + m[:, None].to(tl.int64) * columns + n[None, :], codes, mask=mask)
    if TURNED:
        # Turned in registers, so that either way a warp writes what is side by side in memory.
        at = turned + n[:, None] * rows + m[None, :]
        tl.store(at, tl.trans(codes), mask=tl.trans(mask))


@triton.jit
def quick_tile(bits, scale, F: tl.constexpr):
    """Return codes, and how many elements vanish, of a tile without overflow or NaN."""
    scaled = as_float(bits) * scale
    vanishes = (tl.abs(scaled) <= F.vanishing) & (as_float(bits) != 0)
    return quick_codes(bits, scaled, F), tl.sum(vanishes.to(tl.int32))


@triton.jit
def careful_tile(bits, scale, F: tl.constexpr):
    """Return the same of any tile."""
    scaled = as_float(bits) * scale
    vanishes = (tl.abs(scaled) <= F.vanishing) & (as_float(bits) != 0)
    return careful_codes(bits, scaled, F), tl.sum(vanishes.to(tl.int32))


@triton.jit
def squares(value, top):
    """Return the sum of squares of values with this amax (bits), float64."""
    if (top > SMALL) & (top < LARGE):
        total = tl.sum(value * value).to(tl.float64)
    else:
        brought = value * unit_of(top)
        total = tl.sum(brought * brought).to(tl.float64) * unit_square(top)
    return total


@triton.jit
def cast_tiles(
    x, scale, flag, out, turned, tops, parts, stats, rows, columns, tiles_along, tiles,
    KIND: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GIVEN: tl.constexpr, GUARD: tl.constexpr, TURNED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Cast tiles with the given scale and measure them; see the module.

    A tile takes one of two branches, and stores its codes there: what a branch passes on costs
    registers. Without `COUNT` only the amax is measured, to see what counting costs.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if program == 0:
        tl.store(stats + UNDERFLOWED, (program * 0).to(tl.float64))
    largest = program * 0
    saturated = program * 0
    underflowed = program * 0
    nonfinite = program * 0
    square = (program * 0).to(tl.float64)
    removed = square
    given = (program * 0).to(tl.float32)
    if GIVEN:
        given = tl.load(scale)
    makes_codes = given > 0
    inv = tl.div_rn(given * 0 + 1.0, tl.where(makes_codes, given, 1.0))
    tile = program
    while tile < tiles:  # not `for`: the interpreter's range fails with numpy 2.4
        m, n, mask = tile_offsets(tile, rows, columns, tiles_along, BM, BN)
        bits = load_bits(x, m[:, None].to(tl.int64) * columns + n[None, :], mask, KIND)
        top = tl.max(bits & ABS)
        is_wild = top >= INF
        is_over = as_float(top) * given > F.limit  # of Inf and of NaN bits too, or is_wild
        if GUARD:
            # Stale zeros cost time only.
            makes_codes = (given > 0) & (tl.load(flag, volatile=True) == 0)
        if is_wild | is_over | (not F.zero_is_signed):
            size = bits & ABS
            is_finite = size < INF
            size = tl.where(is_finite, size, 0)
            top = tl.max(size)
            if COUNT:
                nonfinite += tl.sum(tl.where(is_finite, 0, 1))
                square += squares(as_float(size), top)
            if GUARD:  # noqa: SIM102  # one is a constant
                if as_float(top) * given > F.limit:
                    tl.store(flag, 1)
            if makes_codes:
                codes, vanished = careful_tile(bits, given, F)
                store_codes(codes, out, turned, m, n, mask, rows, columns, True, TURNED)
                if COUNT:
                    underflowed += vanished
                    lost = tl.abs(as_float(size) * given) > F.limit
                    saturated += tl.sum(lost.to(tl.int32))
                    excess = tl.where(lost, (as_float(size) - F.max * inv) * unit_of(top), 0.0)
                    removed += tl.sum(excess * excess).to(tl.float64) * unit_square(top)
        else:
            if COUNT:
                square += squares(as_float(bits), top)
            if makes_codes:
                codes, vanished = quick_tile(bits, given, F)
                store_codes(codes, out, turned, m, n, mask, rows, columns, True, TURNED)
                if COUNT:
                    underflowed += vanished
        largest = tl.maximum(largest, top)
        tile += programs
    tl.store(tops + program, largest)
    tl.store(parts + program, saturated.to(tl.float64))
    tl.store(parts + programs + program, underflowed.to(tl.float64))
    tl.store(parts + 2 * programs + program, nonfinite.to(tl.float64))
    tl.store(parts + 3 * programs + program, square)
    tl.store(parts + 4 * programs + program, removed)


@triton.jit
def settle(
    x, scale, out, turned, tops, parts, stats, scale_inv, amax,
    rows, columns, tiles_along, tiles, programs, elements,
    KIND: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GIVEN: tl.constexpr, GUARD: tl.constexpr, TURNED: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Add up the statistics; cast with the tensor's own scale where that is due.

    `cast_tiles` has set `stats[UNDERFLOWED]` to 0. `PROGRAMS`: a power of two, at least `programs`.
    """
    program = tl.program_id(0)
    each = tl.arange(0, PROGRAMS)
    top = tl.max(tl.load(tops + each, mask=each < programs, other=0))
    own = own_scale(top, F)
    given = own * 0
    if GIVEN:
        given = tl.load(scale)
    passes = (as_float(top) * given > F.limit) & GUARD
    casts_again = passes | (given <= 0)
    used = tl.where(casts_again, own, given)
    inv = tl.div_rn(used * 0 + 1.0, used)
    if program == 0:
        saturated = tl.sum(tl.load(parts + each, mask=each < programs, other=0.0))
        underflowed = tl.sum(tl.load(parts + programs + each, mask=each < programs, other=0.0))
        nonfinite = tl.sum(tl.load(parts + 2 * programs + each, mask=each < programs, other=0.0))
        square = tl.sum(tl.load(parts + 3 * programs + each, mask=each < programs, other=0.0))
        removed = tl.sum(tl.load(parts + 4 * programs + each, mask=each < programs, other=0.0))
        nothing = square * 0
        largest = as_float(tl.where(nonfinite < elements, top, -0x40800000))  # bits of -1
        tl.store(scale_inv, inv)
        tl.store(amax, largest)
        tl.store(stats + AMAX, largest.to(tl.float64))
        tl.store(stats + SCALE_INV, inv.to(tl.float64))
        tl.store(stats + ELEMENTS, nothing + elements)
        tl.store(stats + SATURATED, tl.where(casts_again, nothing, saturated))
        tl.store(stats + NONFINITE, nonfinite)
        tl.store(stats + RECAST, tl.where(passes, nothing + 1, nothing))
        tl.store(stats + SQUARE, square)
        tl.store(stats + SATURATED_SQUARE, tl.where(casts_again, nothing, removed))
        tl.store(stats + CASTS, nothing + 1)
        if not casts_again:
            tl.store(stats + UNDERFLOWED, underflowed)
    if casts_again:
        vanished = program * 0
        tile = program
        while tile < tiles:
            m, n, mask = tile_offsets(tile, rows, columns, tiles_along, BM, BN)
            bits = load_bits(x, m[:, None].to(tl.int64) * columns + n[None, :], mask, KIND)
            if (tl.max(bits & ABS) >= INF) | (not F.zero_is_signed):
                codes, count = careful_tile(bits, used, F)
                vanished += count
                store_codes(codes, out, turned, m, n, mask, rows, columns, True, TURNED)
            else:
                codes, count = quick_tile(bits, used, F)
                vanished += count
                store_codes(codes, out, turned, m, n, mask, rows, columns, True, TURNED)
            tile += tl.num_programs(0)
        # Whole numbers in float64: exact in any order.
        tl.atomic_add(stats + UNDERFLOWED, vanished.to(tl.float64), sem="relaxed")
