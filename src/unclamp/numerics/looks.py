"""The kernel of a closer look at a cast, in one pass: see `unclamp.numerics.inspection`."""

from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from unclamp.numerics.kernels import CHUNK, FLOAT32, kernel, load, part, pointer

SUBNORMALS, QUARTERS, MAGNITUDES = 23, 1024, 128
"""Lengths of what is counted."""
_ABS = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_REST_BITS = 21


@part
def _count(size: Any, code: Any, subnormals: Any, quarters: Any, magnitudes: Any) -> None:
    """Count one element by the quarter of its octave, with its rest of mantissa, and its code.

    Quarter k has exponent and first two bits of mantissa k. A subnormal is counted by the place of
    its highest bit.
    """
    magnitudes[code & 0x7F] += 1
    quarter = size >> _REST_BITS
    if quarter > 3:
        quarters[quarter, 0] += 1
        quarters[quarter, 1] += size & ((1 << _REST_BITS) - 1)
    elif size > 0:
        place = 0
        while size > 1:
            size >>= 1
            place += 1
        subnormals[place] += 1


@kernel
def look_at(
    x_at: int, kind: int, codes_at: int, values_at: int, width: int, rows: int, a_decibel: int,
    lowest: int, bins: int, subnormals_at: int, quarters_at: int, magnitudes_at: int,
    ratios_at: int, sums_at: int,
) -> None:  # fmt: skip
    """Count elements by quarter and magnitude, rows by signal over error, and sum up both.

    Rows have `width` elements; their bins are `1 / a_decibel` dB wide, the first around `lowest` of
    these, the last for exact rows; rows beyond the bins go to the outermost.
    """
    subnormals = carray(pointer(subnormals_at), SUBNORMALS, dtype=np.int64)
    quarters = carray(pointer(quarters_at), (QUARTERS, 2), dtype=np.int64)
    magnitudes = carray(pointer(magnitudes_at), MAGNITUDES, dtype=np.int64)
    ratios = carray(pointer(ratios_at), bins, dtype=np.int64)
    sums = carray(pointer(sums_at), 2, dtype=np.float64)
    codes = carray(pointer(codes_at), rows * width, dtype=np.uint8)
    values = carray(pointer(values_at), rows * width, dtype=np.float32)
    loaded = np.empty(CHUNK, np.float32)
    for row in range(rows):
        signal = noise = 0.0
        for start in range(row * width, (row + 1) * width, CHUNK):
            count = min(CHUNK, (row + 1) * width - start)
            if kind == FLOAT32:
                x = carray(pointer(x_at + 4 * start), count, dtype=np.float32)
            else:
                x = loaded[:count]
                halves = carray(pointer(x_at + 2 * start), count, dtype=np.uint16)
                load(halves, kind, count, x.view(np.int32))
            bits = x.view(np.int32)
            for i in range(count):
                size = bits[i] & _ABS
                if size >= _INF:
                    continue
                _count(size, codes[start + i], subnormals, quarters, magnitudes)
                wide = np.float64(x[i])
                error = wide - np.float64(values[start + i])
                signal += wide * wide
                noise += error * error
        sums[0] += signal
        sums[1] += noise
        if noise > 0.0 and signal > 0.0:
            place = int(np.rint(10 * a_decibel * np.log10(signal / noise))) - lowest
            ratios[min(max(place, 0), bins - 2)] += 1
        elif signal > 0.0:
            ratios[bins - 1] += 1
