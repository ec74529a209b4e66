"""The kernels of the cast on a CPU: a chunk of a tensor in, everything that a cast makes out.

A chunk is loaded into the nearest cache once, and codes, values, amax and counts are made from it
in short loops without branches, which LLVM turns into vector instructions (numba):

    s  = |x * scale|, at most max              float32, as everywhere
    normal     round the bits to the format's mantissa, ties to even, and shift
    subnormal  add 2**(emin - mantissa + 23): the adder rounds; the sum's low bits are the code

`unclamp.numerics.cpu` cuts tensors into ranges for these, and says what holds of the results.
"""

from functools import partial
from typing import Any

import numpy as np
import torch

from unclamp.numerics.compiled import compiled
from unclamp.numerics.layout import Layout

CHUNK = 1024
"""Elements worked on at a time; the six arrays of them fit the first-level cache."""
TASK = 512 * CHUNK
"""Elements a thread takes at a time."""

AMAX, SATURATED, UNDERFLOWED, NONFINITE, COUNTS = range(5)
SQUARE, SATURATED_SQUARE, SUMS = range(3)
FLOAT32, _BFLOAT16, _FLOAT16 = range(3)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}
_ABS = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)


_compiled = partial(compiled, error_model="numpy")
_summing = partial(compiled, error_model="numpy", fastmath={"reassoc", "contract"})


@_compiled
def _load(x: Any, kind: int, count: int, bits: Any, values: Any) -> None:
    """Put a chunk as the bits of float32 values into `bits`, which `values` views as float32."""
    if kind == FLOAT32:
        for i in range(count):
            bits[i] = x[i]
    elif kind == _BFLOAT16:
        for i in range(count):
            bits[i] = np.int32(x[i]) << np.int32(16)
    else:
        # Through a float32 whose exponent is off by 112, so that subnormals come out right.
        for i in range(count):
            bits[i] = (np.int32(x[i]) & np.int32(0x7FFF)) << np.int32(13)
        for i in range(count):
            values[i] = values[i] * np.float32(2.0**112)
        for i in range(count):
            half = np.int32(x[i])
            wild = np.int32((half & np.int32(0x7C00)) == np.int32(0x7C00)) * _INF
            bits[i] = bits[i] | wild | ((half & np.int32(0x8000)) << np.int32(16))


@_compiled
def _fill(target: Any, blocks: Any, first: int, count: int, along: int) -> None:
    """Spread the values of a row of blocks over the elements `first` to `first + count`."""
    if along == 1:
        for i in range(count):
            target[i] = blocks[first + i]
        return
    done = 0
    while done < count:
        block = (first + done) // along
        stop = min(count, (block + 1) * along - first)
        for i in range(done, stop):
            target[i] = blocks[block]
        done = stop


@_summing
def _square_sum(x: Any, count: int) -> float:
    total = 0.0
    for i in range(count):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@_compiled
def _careful_sums(x: Any, bits: Any, scale: Any, inv: Any, fmt: Layout, count: int) -> tuple:
    """Sum squares over finite elements alone, and those of what saturation removed."""
    total, removed = 0.0, 0.0
    for i in range(count):
        if (bits[i] & _ABS) < _INF:
            total += np.float64(x[i]) * np.float64(x[i])
            if abs(x[i] * scale[i]) > fmt.limit:
                lost = np.float64(abs(x[i])) - np.float64(fmt.max * inv[i])
                removed += lost * lost
    return total, removed


@_compiled
def _codes(
    bits: Any, kept: Any, kept_bits: Any, magic_bits: Any, fmt: Layout, codes: Any, count: int
) -> None:
    """Make codes of |x * scale|, at most max, without NaN, for formats with a negative zero."""
    for i in range(count):
        b = kept_bits[i]
        rounded = (b + fmt.half + ((b >> fmt.shift) & np.int32(1))) & fmt.mask
        small = b < fmt.min_normal_bits
        code = magic_bits[i] - fmt.magic_bits if small else (rounded >> fmt.shift) - fmt.rebias
        codes[i] = np.uint8(code | ((bits[i] >> np.int32(24)) & np.int32(-128)))
        kept_bits[i] = b if small else rounded


@_compiled
def _careful_codes(
    bits: Any, kept: Any, kept_bits: Any, magic_bits: Any, fmt: Layout, codes: Any, count: int
) -> None:
    """The same where elements may be NaN, or the format has no negative zero."""
    for i in range(count):
        b = kept_bits[i]
        rounded = (b + fmt.half + ((b >> fmt.shift) & np.int32(1))) & fmt.mask
        small = b < fmt.min_normal_bits
        code = magic_bits[i] - fmt.magic_bits if small else (rounded >> fmt.shift) - fmt.rebias
        is_nan = b > _INF
        code = fmt.nan_code if is_nan else code
        signed = fmt.zero_is_signed if code == 0 else np.int32(1)
        signed = fmt.nan_is_signed if is_nan else signed
        sign = (bits[i] >> np.int32(24)) & np.int32(-128)
        codes[i] = np.uint8(code | (sign * signed))
        kept_bits[i] = b if (small or is_nan) else rounded


@_compiled
def _chunk(
    x: Any, bits: Any, scale: Any, inv: Any, fmt: Layout, codes: Any, values: Any,
    kept: Any, kept_bits: Any, magic: Any, magic_bits: Any, counts: Any, sums: Any,
) -> None:  # fmt: skip
    """Cast one chunk: codes, values (if there is room for them), counts and sums."""
    count = len(codes)
    amax = np.int32(0)
    saturated, underflowed, nonfinite = np.int32(0), np.int32(0), np.int32(0)
    for i in range(count):
        size = bits[i] & _ABS
        finite = np.int32(size < _INF)
        size = size * finite
        amax = max(amax, size)
        nonfinite += np.int32(1) - finite
        s = abs(x[i] * scale[i])
        saturated += np.int32(s > fmt.limit) & finite
        underflowed += np.int32(s <= fmt.vanishing) & np.int32(size != 0)
        s = min(s, fmt.max)
        kept[i] = s
        magic[i] = s + fmt.magic
    if saturated > 0 or nonfinite > 0:
        total, removed = _careful_sums(x, bits, scale, inv, fmt, count)
        sums[SATURATED_SQUARE] += removed
    else:
        total = _square_sum(x, count)
    sums[SQUARE] += total
    if nonfinite > 0 or fmt.zero_is_signed == 0:
        _careful_codes(bits, kept, kept_bits, magic_bits, fmt, codes, count)
    else:
        _codes(bits, kept, kept_bits, magic_bits, fmt, codes, count)
    counts[AMAX] = max(counts[AMAX], np.int64(amax))
    counts[SATURATED] += saturated
    counts[UNDERFLOWED] += underflowed
    counts[NONFINITE] += nonfinite
    if len(values) == 0:
        return
    for i in range(count):
        q = magic[i] - fmt.magic if kept_bits[i] < fmt.min_normal_bits else kept[i]
        values[i] = np.copysign(q, x[i]) * inv[i]
    if fmt.zero_is_signed == 0:
        for i in range(count):
            values[i] = values[i] + np.float32(0.0)  # -0 becomes 0


@_compiled
def cast_range(
    x: Any, ints: Any, floats: Any, kind: int, scales: Any, invs: Any, across: int, along: int,
    fmt: Layout, codes: Any, values: Any, rows: Any, columns: Any, counts: Any, sums: Any,
) -> None:  # fmt: skip
    """Cast the rows and columns of a range; `scales` and `invs` hold one a block.

    `ints` and `floats` view float32 input as what it is; other input is loaded by chunks.
    """
    work = np.empty((5, CHUNK), np.float32)
    kept, magic, scale, inv = work[1], work[2], work[3], work[4]
    kept_bits, magic_bits = kept.view(np.int32), magic.view(np.int32)
    loaded, loaded_bits = work[0], work[0].view(np.int32)
    nothing = np.empty(0, np.float32)
    filled = -1
    for row in range(rows[0], rows[1]):
        group = row // across
        for first in range(columns[0], columns[1], CHUNK):
            count = min(CHUNK, columns[1] - first)
            if along < x.shape[1]:
                _fill(scale, scales[group], first, count, along)
                _fill(inv, invs[group], first, count, along)
            elif group != filled:  # one block along: its scale serves every chunk
                _fill(scale, scales[group], 0, CHUNK, CHUNK)
                _fill(inv, invs[group], 0, CHUNK, CHUNK)
                filled = group
            xs = x[row, first : first + count]
            if kind == FLOAT32:
                chunk = floats[row, first : first + count]
                bits = ints[row, first : first + count]
            else:
                _load(xs, kind, count, loaded_bits, loaded)
                chunk = loaded[:count]
                bits = loaded_bits[:count]
            _chunk(
                chunk, bits, scale, inv, fmt, codes[row, first : first + count],
                values[row, first : first + count] if len(values) else nothing,
                kept, kept_bits, magic, magic_bits, counts, sums,
            )  # fmt: skip


@_compiled
def amax_range(
    x: Any, kind: int, across: int, along: int, rows: Any, columns: Any, amax: Any
) -> None:
    """Raise the amaxes of blocks (bits of float32) by the finite elements of a range."""
    values = np.empty(CHUNK, np.float32)
    bits = values.view(np.int32)
    for row in range(rows[0], rows[1]):
        group = row // across
        for first in range(columns[0], columns[1], CHUNK):
            count = min(CHUNK, columns[1] - first)
            _load(x[row, first : first + count], kind, count, bits, values)
            for i in range(count):
                size = bits[i] & _ABS
                bits[i] = size * np.int32(size < _INF)
            if along == 1:
                for i in range(count):
                    amax[group, first + i] = max(amax[group, first + i], bits[i])
                continue
            done = 0
            while done < count:
                block = (first + done) // along
                stop = min(count, (block + 1) * along - first)
                largest = np.int32(0)
                for i in range(done, stop):
                    largest = max(largest, bits[i])
                amax[group, block] = max(amax[group, block], largest)
                done = stop


@_compiled
def decode_range(codes: Any, table: Any, values: Any, first: int, last: int) -> None:
    """Put the value of each code of a range into `values`; `table` has one a code."""
    for i in range(first, last):
        values[i] = table[codes[i]]


@_compiled
def look_range(
    x: Any, kind: int, codes: Any, values: Any, first: int, last: int,
    subnormals: Any, quarters: Any, magnitudes: Any, sums: Any,
) -> None:  # fmt: skip
    """Count elements by quarter of an octave and by magnitude, sum up squares.

    `quarters[k]` are those whose exponent and first two bits of mantissa are k, and the sum of
    their other bits; of subnormals `subnormals` has the number by the place of the highest bit.
    """
    loaded = np.empty(CHUNK, np.float32)
    bits = loaded.view(np.int32)
    for start in range(first, last, CHUNK):
        count = min(CHUNK, last - start)
        _load(x[start : start + count], kind, count, bits, loaded)
        for i in range(count):
            size = bits[i] & _ABS
            if size >= _INF:
                continue
            magnitudes[codes[start + i] & 0x7F] += 1
            wide = np.float64(loaded[i])
            error = wide - np.float64(values[start + i])
            sums[0] += wide * wide
            sums[1] += error * error
            quarter = size >> 21
            if quarter > 3:
                quarters[quarter, 0] += 1
                quarters[quarter, 1] += size & 0x1FFFFF
            elif size > 0:
                place = 0
                while size > 1:
                    size >>= 1
                    place += 1
                subnormals[place] += 1


@_compiled
def look_rows(
    x: Any, kind: int, values: Any, width: int, first: int, last: int,
    a_decibel: int, lowest: int, counts: Any,
) -> None:  # fmt: skip
    """Count rows of `width` elements by signal over error: bins `1 / a_decibel` dB wide, then Inf.

    The first bin is around `lowest` of these; rows beyond the bins go to the outermost.
    """
    loaded = np.empty(CHUNK, np.float32)
    bits = loaded.view(np.int32)
    for row in range(first, last):
        signal = noise = 0.0
        for start in range(row * width, (row + 1) * width, CHUNK):
            count = min(CHUNK, (row + 1) * width - start)
            _load(x[start : start + count], kind, count, bits, loaded)
            for i in range(count):
                if bits[i] & _ABS >= _INF:
                    continue
                wide = np.float64(loaded[i])
                error = wide - np.float64(values[start + i])
                signal += wide * wide
                noise += error * error
        if noise > 0.0 and signal > 0.0:
            place = int(np.rint(10 * a_decibel * np.log10(signal / noise))) - lowest
            counts[min(max(place, 0), len(counts) - 2)] += 1
        elif signal > 0.0:
            counts[len(counts) - 1] += 1
