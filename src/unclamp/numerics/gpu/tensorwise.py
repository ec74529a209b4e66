"""The cast of a whole tensor with one scale, without a look from the host.

    cast_tiles    reads the tensor once: codes with the given scale, amax and counts by program;
                  the last program to finish adds them up, and decides
    cast_again    where there was no scale to use (dynamic scaling; 0: nothing measured yet), or
                  a guarded one would saturate, casts with the tensor's own scale; else it
                  finds that nothing is to be done, and leaves

Whether the second is launched is settled before, so that a CUDA graph can hold the cast. Dynamic
scaling is the same with `cast_tiles` that only measures: reading a tensor twice is what it costs.
With `ALONE` there is no second launch. Whoever says so knows that a scale has been measured. Where
there is none after all, the last program casts the tensor by itself: the same bits, a hundred
times later.

The last program is known by a counter (`gpu.slots`). Each program writes its findings, waits for
its own threads, and counts itself in a way that orders memory: who counts last sees what all have
written. It sets counter and flag back to 0 for the next launch.

Where the second kernel casts, its scale is the tensor's own, and nothing can saturate; of the
first one's counts only underflow changes, and it is added up in whole numbers, in any order.
The same tensor gives the same bits at every call: sums are taken in a fixed order, whoever is last.
(Only the sum of squares of a guarded cast that is repeated may differ in its last bits, by who saw
the flag.)

What counting costs is arithmetic, not memory. So a row of a tile lies in few threads, sums are
kept by row from tile to tile, and whole programs are reduced once, at their end. Only the
largest element of a tile is needed at once: it says whether the tile is ordinary (nothing wild,
nothing beyond the limit, squares that fit float32), and what is not takes the careful way.

A tile is `SLICES` slices of BM rows by BN columns. A tensor written as it lies has one, and rows
of 16 elements. One that is written turned has four, of every fourth row: the codes of four rows
at one column are a word of the turned tensor, and words are turned four times as fast as bytes.

A guarded cast that will be repeated need not write codes: a program that meets an overflow
raises a flag and from then on only measures, and so do programs that start later and find it up.
Whether one finds it or not, the second kernel overwrites the codes.
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
    quick_codes,
    unit_of,
    unit_square,
)
from unclamp.numerics.gpu.settling import FLAG, UNDERFLOWED, is_last, settled

SMALL = tl.constexpr(2.0**-40)
LARGE = tl.constexpr(2.0**50)
"""In between, squares of a tile's scaled values fit float32 as they are."""


@triton.jit
def tile_offsets(tile, rows, columns, tiles_along, BM: tl.constexpr, BN: tl.constexpr):
    """Return the rows and columns of a tile of a matrix, and which of its elements exist."""
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
def slice_offsets(tile, r, rows, columns, elements, tiles_along,
                  SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Return rows and columns of a slice, where its elements lie, and which of them exist."""
    if SLICES == 1:  # rows of BN elements side by side: no division
        m = tile.to(tl.int64) * BM + tl.arange(0, BM)
        n = tl.arange(0, BN).to(tl.int64)
        at = m[:, None] * BN + n[None, :]
        mask = at < elements
    else:
        m = (tile // tiles_along) * (SLICES * BM) + SLICES * tl.arange(0, BM) + r
        n = (tile % tiles_along).to(tl.int64) * BN + tl.arange(0, BN)
        at = m[:, None].to(tl.int64) * columns + n[None, :]
        mask = (m[:, None] < rows) & (n[None, :] < columns)
    return m, n, at, mask


@triton.jit
def store_words(words, turned, tile, rows, columns, tiles_along,
                SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Write the codes of four rows at a column, as one word each, where they lie turned."""
    m = (tile // tiles_along) * BM + tl.arange(0, BM)
    n = (tile % tiles_along).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (n[:, None] < columns) & (m[None, :] < rows // SLICES)
    tl.store(turned + n[:, None] * (rows // SLICES) + m[None, :], tl.trans(words), mask=mask)


@triton.jit
def quick_tile(
    slices, scale, out, turned, words, tile, rows, columns, elements, tiles_along,
    F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TURNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the codes of a tile without NaN; return by row how many elements vanish."""
    vanished = tl.zeros([BM], tl.int32)
    packed = tl.zeros([BM, BN], tl.int32)
    for r in tl.static_range(SLICES):
        bits = slices[r]
        scaled = as_float(bits) * scale
        vanishes = (tl.abs(scaled) <= F.vanishing) & (as_float(bits) != 0)
        vanished += tl.sum(vanishes.to(tl.int32), axis=1)
        codes = quick_codes(bits, scaled, F)
        m, n, at, mask = slice_offsets(
            tile, r, rows, columns, elements, tiles_along, SLICES, BM, BN
        )
        tl.store(out + at, codes, mask=mask)
        if PACKED:
            packed |= codes.to(tl.int32) << (8 * r)
        elif TURNED:
            store_codes(codes, out, turned, m, n, mask, rows, columns, False, True)
    if PACKED:
        store_words(packed, words, tile, rows, columns, tiles_along, SLICES, BM, BN)
    return vanished


@triton.jit
def careful_tile(
    x, scale, out, turned, tile, rows, columns, elements, tiles_along, KIND: tl.constexpr,
    F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Do the same of any tile, slice by slice, loaded again: few registers matter more here."""
    vanished = tl.zeros([BM], tl.int32)
    part = tile * 0
    while part < SLICES:
        m, n, at, mask = slice_offsets(
            tile, part, rows, columns, elements, tiles_along, SLICES, BM, BN
        )
        bits = load_bits(x, at, mask, KIND)
        scaled = as_float(bits) * scale
        vanishes = (tl.abs(scaled) <= F.vanishing) & (as_float(bits) != 0)
        vanished += tl.sum(vanishes.to(tl.int32), axis=1)
        codes = careful_codes(bits, scaled, F)
        tl.store(out + at, codes, mask=mask)
        if TURNED:
            store_codes(codes, out, turned, m, n, mask, rows, columns, False, True)
        part += 1
    return vanished


@triton.jit
def write_tile(
    x, slices, top, scale, out, turned, words, tile, rows, columns, elements, tiles_along,
    KIND: tl.constexpr, F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the codes of a tile, the quick way unless it has a NaN; return what vanishes."""
    if (top <= INF) & F.zero_is_signed:
        vanished = quick_tile(
            slices, scale, out, turned, words, tile, rows, columns, elements, tiles_along,
            F, SLICES, BM, BN, TURNED, PACKED,
        )  # fmt: skip
    else:
        vanished = careful_tile(
            x, scale, out, turned, tile, rows, columns, elements, tiles_along,
            KIND, F, SLICES, BM, BN, TURNED,
        )  # fmt: skip
    return vanished


@triton.jit
def load_slice(x, tile, r, rows, columns, elements, tiles_along, KIND: tl.constexpr,
               SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Return the bits of a slice; zeros where there is nothing."""
    _, _, at, mask = slice_offsets(tile, r, rows, columns, elements, tiles_along, SLICES, BM, BN)
    return load_bits(x, at, mask, KIND)


@triton.jit
def load_slices(x, tile, rows, columns, elements, tiles_along, KIND: tl.constexpr,
                SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Return the bits of a tile's slices, a tuple."""
    first = load_slice(x, tile, 0, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN)
    if SLICES == 1:
        return (first,)
    else:  # Triton wants one way out of each branch
        second = load_slice(x, tile, 1, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN)
        third = load_slice(x, tile, 2, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN)
        fourth = load_slice(x, tile, 3, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN)
        return (first, second, third, fourth)


@triton.jit
def careful_sums(bits, given, inv, F: tl.constexpr):
    """Return of a slice, as scalars: NaN and Inf, saturated, squares, squares removed."""
    size = bits & ABS
    is_finite = size < INF
    size = tl.where(is_finite, size, 0)
    top = tl.max(size)
    value = as_float(size)
    brought = value * unit_of(top)
    square = tl.sum(brought * brought).to(tl.float64) * unit_square(top)
    lost = tl.abs(value * given) > F.limit
    excess = tl.where(lost, (value - F.max * inv) * unit_of(top), 0.0)
    removed = tl.sum(excess * excess).to(tl.float64) * unit_square(top)
    nonfinite = tl.sum(tl.where(is_finite, 0, 1))
    return nonfinite, tl.sum(lost.to(tl.int32)), square, removed


@triton.jit
def cast_from(
    x, scale, out, turned, words, first, step, rows, columns, tiles_along, tiles, elements,
    KIND: tl.constexpr, F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Cast every `step`-th tile from a first one; return how many elements vanish, float64."""
    vanished = tl.zeros([BM], tl.int32)
    tile = first
    while tile < tiles:
        slices = load_slices(x, tile, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN)
        sizes = slices[0] & ABS
        for r in tl.static_range(1, SLICES):
            sizes = tl.maximum(sizes, slices[r] & ABS)
        vanished += write_tile(
            x, slices, tl.max(sizes), scale, out, turned, words, tile, rows, columns, elements,
            tiles_along, KIND, F, SLICES, BM, BN, TURNED, PACKED,
        )  # fmt: skip
        tile += step
    return tl.sum(vanished.to(tl.float64))


# Of single numbers: where they lie changes no code, and would be one more to compile.
@triton.jit(do_not_specialize_on_alignment=["scale", "scale_inv", "amax"])
def cast_tiles(
    x, slot, out, turned, scratch, stats, scale, scale_inv, amax, rows, columns, elements,
    KIND: tl.constexpr, F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, PACKED: tl.constexpr, GIVEN: tl.constexpr,
    GUARD: tl.constexpr, ALONE: tl.constexpr, COUNT: tl.constexpr, SHOWS: tl.constexpr,
    SIZE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Cast tiles; see `cast_and_settle`. `scratch`: a float64 for `tops`, `PARTS` for `parts`.

    A launch takes the host less the fewer arguments there are, and the fewer names of the module
    are used here: Triton compares each of them with what it was, every time.
    """
    tiles_along = tl.cdiv(columns, BN)
    cast_and_settle(
        x, scale, slot, out, turned, turned.to(tl.pointer_type(tl.int32), bitcast=True),
        scratch.to(tl.pointer_type(tl.int32), bitcast=True), scratch + tl.num_programs(0),
        stats, scale_inv, amax, rows, columns, tiles_along,
        tl.cdiv(rows, SLICES * BM) * tiles_along, elements,
        KIND, F, SLICES, BM, BN, TURNED, PACKED, GIVEN, GUARD, ALONE, COUNT, SHOWS,
        SIZE, AHEAD,
    )  # fmt: skip


@triton.jit
def cast_and_settle(
    x, scale, slot, out, turned, words, tops, parts, stats, scale_inv, amax,
    rows, columns, tiles_along, tiles, elements,
    KIND: tl.constexpr, F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, PACKED: tl.constexpr, GIVEN: tl.constexpr,
    GUARD: tl.constexpr, ALONE: tl.constexpr, COUNT: tl.constexpr, SHOWS: tl.constexpr,
    SIZE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Cast tiles with the given scale and measure them; the last program settles. See the module.

    `slot`: int32, counter and flag. The last program leaves the bits of the scale to cast again
    with in `tops[0]`, 0 for none. Without `COUNT` only the amax is measured, to see what counting
    costs.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    largest = tl.zeros([BM], tl.int32)
    underflowed = tl.zeros([BM], tl.int32)
    scaled_square = tl.zeros([BM], tl.float32)
    saturated = program * 0
    nonfinite = program * 0
    square = (program * 0).to(tl.float64)
    removed = square
    given = (program * 0).to(tl.float32)
    if GIVEN:
        given = tl.load(scale)
    has_scale = given > 0
    factor = tl.where(has_scale, given, 1.0)
    inv = tl.div_rn(given * 0 + 1.0, factor)
    is_raised = program * 0
    if GUARD:
        # By way of a maximum: each thread loads for itself, and all must go the same way.
        is_raised = tl.max(tl.load(slot + FLAG + tl.zeros([BM], tl.int32), volatile=True))
    tile = program
    if AHEAD:
        coming = load_slices(x, tile, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN)
    while tile < tiles:  # not `for`: the interpreter's range fails with numpy 2.4
        if AHEAD:
            slices = coming
            coming = load_slices(
                x, tile + programs, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN
            )
        else:
            slices = load_slices(
                x, tile, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN
            )
        sizes = slices[0] & ABS
        for r in tl.static_range(1, SLICES):
            sizes = tl.maximum(sizes, slices[r] & ABS)
        by_row = tl.max(sizes, axis=1)
        top = tl.max(by_row)
        scaled_top = as_float(top) * factor
        # Alone it casts by 1 where there is no scale: right where the tensor's own is 1 (zeros).
        makes_codes = (has_scale | ALONE) & (is_raised == 0)
        # Codes that are not wanted, or that will be written again, need no count of the clamped.
        bound = tl.where(makes_codes, F.limit, LARGE)
        # Of NaN's bits every comparison is false.
        if (scaled_top <= bound) & ((scaled_top > SMALL) | (top == 0)):
            largest = tl.maximum(largest, by_row)
            if COUNT:
                for r in tl.static_range(SLICES):
                    scaled = as_float(slices[r]) * factor
                    scaled_square += tl.sum(scaled * scaled, axis=1)
        else:
            part = program * 0
            while part < SLICES:
                bits = load_slice(
                    x, tile, part, rows, columns, elements, tiles_along, KIND, SLICES, BM, BN
                )
                size = bits & ABS
                size = tl.where(size < INF, size, 0)
                largest = tl.maximum(largest, tl.max(size, axis=1))
                if COUNT:
                    wild, lost, one, excess = careful_sums(bits, given, inv, F)
                    nonfinite += wild
                    saturated += lost
                    square += one
                    removed += excess
                part += 1
            if GUARD:
                passes = tl.max(tl.where(as_float(largest) * given > F.limit, 1, 0))
                if passes > is_raised:
                    tl.store(slot + FLAG, 1)
                is_raised = tl.maximum(is_raised, passes)
        if makes_codes:
            vanished = write_tile(
                x, slices, top, factor, out, turned, words, tile, rows, columns, elements,
                tiles_along, KIND, F, SLICES, BM, BN, TURNED, PACKED,
            )  # fmt: skip
            if COUNT:
                underflowed += vanished
        tile += programs
    wide = inv.to(tl.float64)
    if not has_scale:
        wide = wide * 0 + 1
    square += tl.sum(scaled_square.to(tl.float64)) * wide * wide
    tl.store(tops + program, tl.max(largest))
    tl.store(parts + program, saturated.to(tl.float64))
    tl.store(parts + programs + program, tl.sum(underflowed).to(tl.float64))
    tl.store(parts + 2 * programs + program, nonfinite.to(tl.float64))
    tl.store(parts + 3 * programs + program, square)
    tl.store(parts + 4 * programs + program, removed)
    if is_last(slot, programs):
        again = settled(tops, parts, stats, scale_inv, amax, given, programs, elements,
                        F, GUARD, ALONE, SHOWS, SIZE)  # fmt: skip
        tl.store(tops, again.to(tl.int32, bitcast=True))
        tl.store(slot + FLAG, program * 0)
        if ALONE:  # noqa: SIM102  # of the compiler; the other is the device's
            if again > 0:
                vanished = cast_from(
                    x, again, out, turned, words, program * 0, 1, rows, columns, tiles_along,
                    tiles, elements, KIND, F, SLICES, BM, BN, TURNED, PACKED,
                )  # fmt: skip
                tl.store(stats + UNDERFLOWED, vanished)


@triton.jit
def cast_again(
    x, out, turned, scratch, stats, rows, columns, elements,
    KIND: tl.constexpr, F: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Cast with the scale that `cast_tiles` left in its scratch, where it left one."""
    tops = scratch.to(tl.pointer_type(tl.int32), bitcast=True)
    words = turned.to(tl.pointer_type(tl.int32), bitcast=True)
    tiles_along = tl.cdiv(columns, BN)
    tiles = tl.cdiv(rows, SLICES * BM) * tiles_along
    used = as_float(tl.load(tops))
    if used > 0:
        vanished = cast_from(
            x, used, out, turned, words, tl.program_id(0), tl.num_programs(0), rows, columns,
            tiles_along, tiles, elements, KIND, F, SLICES, BM, BN, TURNED, PACKED,
        )  # fmt: skip
        # Whole numbers in float64: exact in any order.
        tl.atomic_add(stats + UNDERFLOWED, vanished, sem="relaxed")
