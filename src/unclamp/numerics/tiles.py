"""Blocks with a scale each: amaxes, scales and codes of some blocks in one visit to memory.

What is visited at once is about a task and not what fits the second-level cache: reading short
pieces of rows that lie a power of two apart costs more than the third level does.
"""

from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from unclamp.numerics.kernels import (
    CHUNK,
    COUNTS,
    SUMS,
    TABLE,
    TASK,
    amax_row,
    as_float,
    cast_row,
    kernel,
    own_scale,
    part,
    pointer,
)

TALL = 512
"""Rows of a block, from beyond which on blocks are measured and cast in two visits to memory.

Fewer columns at a time would keep a tile in the cache, and wait for a page of memory every row.
"""


@part
def _choose(
    amax: Any, given: Any, scales: Any, invs: Any, first: int, last: int, limit: Any, largest: Any,
    power_of_two: Any,
) -> bool:  # fmt: skip
    """Choose the scales of a row of blocks: `unclamp.numerics.scale.choose_scale`."""
    recast = False
    for block in range(first, last):
        top = as_float(amax[block])
        used = given[block] if len(given) else np.float32(0)
        passed = top * used > limit
        recast |= passed
        if passed or not used > 0:
            used = own_scale(top, largest, power_of_two)
        scales[block] = used
        invs[block] = np.float32(1) / used
    return recast


@kernel
def cast_tiles(
    x_at: int, kind: int, rows: int, columns: int, across: int, along: int, given_at: int,
    number: int, largest: float, power_of_two: bool, guard: bool, codes_at: int, values_at: int,
    amax_at: int, scales_at: int, invs_at: int, counts_at: int, sums_at: int,
    is_measured: bool, top: int, bottom: int, left: int, right: int,
) -> bool:  # fmt: skip
    """Cast rows `top` to `bottom` and columns `left` to `right` of a row-major matrix.

    `given_at` and `values_at` are 0 where there are none; amaxes, bits of float32 that start as 0,
    scales and their inverses have one a block. Unless these are there already (`is_measured`), the
    ranges cut no block. Return whether a guarded block has taken its own scale.
    """
    fmt = TABLE[number]
    limit = fmt.limit if guard else np.float32(np.inf)
    wide = -(-columns // along)
    grid = (-(-rows // across), wide)
    amax = carray(pointer(amax_at), grid, dtype=np.int32)
    given = carray(pointer(given_at), grid if given_at else (grid[0], 0), dtype=np.float32)
    scales = carray(pointer(scales_at), grid, dtype=np.float32)
    invs = carray(pointer(invs_at), grid, dtype=np.float32)
    codes = carray(pointer(codes_at), rows * columns, dtype=np.uint8)
    values = carray(pointer(values_at), rows * columns if values_at else 0, dtype=np.float32)
    counts = carray(pointer(counts_at), COUNTS, dtype=np.int64)
    sums = carray(pointer(sums_at), SUMS, dtype=np.float64)
    work = np.empty((4, CHUNK), np.float32)
    step = columns if is_measured else along * max(1, TASK // (across * along))
    recast, first = False, top
    while first < bottom:
        group = first // across
        last = min((group + 1) * across, bottom)
        for begin in range(left, right, step):
            count = min(step, right - begin)
            if not is_measured:
                for row in range(first, last):
                    at = row * columns + begin
                    amax_row(x_at, kind, at, count, begin, along, amax[group], work)
                recast |= _choose(
                    amax[group], given[group], scales[group], invs[group], begin // along,
                    -(-(begin + count) // along), limit, largest, power_of_two,
                )  # fmt: skip
            for row in range(first, last):
                cast_row(
                    x_at, kind, row * columns + begin, count, scales[group], invs[group], begin,
                    along, fmt, codes, values, counts, sums, work,
                )  # fmt: skip
        first = last
    return recast


@kernel
def amax_at(x_at: int, kind: int, rows: int, columns: int, along: int, amax_at: int) -> None:
    """Put the amaxes of one row of blocks, bits of float32, where zeros are at an address."""
    amax = carray(pointer(amax_at), -(-columns // along), dtype=np.int32)
    work = np.empty((4, CHUNK), np.float32)
    for row in range(rows):
        amax_row(x_at, kind, row * columns, columns, np.int64(0), along, amax, work)
