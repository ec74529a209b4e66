"""The kernels of the cast on a CPU: a chunk of a tensor in, everything that a cast makes out.

A chunk is loaded into the nearest cache once. One loop without branches, which LLVM turns into
vector instructions (numba), makes codes, values, amax and the count of what vanished:

    s = |x * scale|, at most max                                   float32, as everywhere
    c = the power of two in s, min_normal at least, * 2**(23 - mantissa)
    t = s + c, q = t - c                          the adder rounds to the format's mantissa
    code = bits of t - bits of c + binades above the first * 2**mantissa

Where the largest s is beyond the limit, or NaN, the chunk's counts and sums are made anew with
care; most chunks have no such element. A loop holds int32 and float32 only: one float64 among them
would halve how many elements an instruction takes, and so squares are summed in a loop of their
own.

Arrays of users come as addresses and everything else as whole numbers, so that each kernel is
compiled for one signature. `unclamp.numerics.cpu` cuts tensors into ranges for these, and says
what holds of the results.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, types
from numba.extending import intrinsic

from unclamp.formats import FORMATS
from unclamp.numerics.compiled import compiled
from unclamp.numerics.layout import Layout, layout
from unclamp.reference import SCALE_MAX, SCALE_MIN
from unclamp.scaling import MAX_SCALE_EXPONENT

CHUNK = 1024
"""Elements worked on at a time; the arrays of them fit the first-level cache."""
TASK = 512 * CHUNK
"""Elements a thread takes at a time."""

AMAX, SATURATED, UNDERFLOWED, NONFINITE, COUNTS = range(5)
SQUARE, SATURATED_SQUARE, SUMS = range(3)
FLOAT32, _BFLOAT16, _FLOAT16 = range(3)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}
NUMBER = {name: number for number, name in enumerate(FORMATS)}
"""A format's place in the kernels' table, by its name: a format's own hash takes longer."""
TABLE = tuple(map(layout, FORMATS.values()))
_ABS = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)

kernel = partial(compiled, error_model="numpy")
part = partial(kernel, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""What only other kernels call needs no door to Python, which takes long to compile."""
_summing = partial(part, fastmath={"reassoc", "contract"})


def _take_for_a_pointer(_context: Any, address: Any) -> Any:
    """Take a whole number for an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _bits_as_float(_context: Any, _bits: Any) -> Any:
    """Return the float32 that has these bits."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


def _float_as_bits(_context: Any, _value: Any) -> Any:
    """Return the bits of a float32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


pointer: Any = intrinsic(_take_for_a_pointer)
as_float: Any = intrinsic(_bits_as_float)
as_bits: Any = intrinsic(_float_as_bits)


@part
def load(halves: Any, kind: int, count: int, bits: Any) -> None:
    """Put 16-bit floats as the bits of float32 into `bits`."""
    if kind == _BFLOAT16:
        for i in range(count):
            bits[i] = np.int32(halves[i]) << np.int32(16)
        return
    # Through a float32 whose exponent is off by 112, so that subnormals come out right.
    for i in range(count):
        half = np.int32(halves[i])
        small = np.int32((half & np.int32(0x7FFF)) << np.int32(13))
        size = as_bits(as_float(small) * np.float32(2.0**112))
        wild = _INF if (half & np.int32(0x7C00)) == np.int32(0x7C00) else np.int32(0)
        bits[i] = size | wild | ((half & np.int32(0x8000)) << np.int32(16))


@part
def _fill(target: Any, value: Any) -> None:
    for i in range(len(target)):
        target[i] = value


@part
def _spread(
    scales: Any, invs: Any, first: int, count: int, along: int, scale: Any, inv: Any
) -> None:
    """Spread what a row of blocks has over the elements `first` to `first + count`.

    Loops start at 0: numba takes an index that may be negative to count from the end, and LLVM
    makes no vector instructions of that.
    """
    if along == 1:
        one, other = scales[first : first + count], invs[first : first + count]
        for i in range(count):
            scale[i] = one[i]
            inv[i] = other[i]
        return
    block = first // along
    left = along - first % along
    done = 0
    while done < count:
        stop = min(count, done + left)
        _fill(scale[done:stop], scales[block])
        _fill(inv[done:stop], invs[block])
        done, left = stop, along
        block += 1


@_summing
def _square_sum(x: Any, count: int) -> float:
    total = 0.0
    for i in range(count):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@part
def _cast(
    bits: Any, scale: Any, inv: Any, fmt: Layout, codes: Any, values: Any, count: int
) -> tuple[Any, Any, Any]:
    """Make codes and values; return the bits of the largest |x| and s, and how many s vanish.

    Right for elements that are finite or Inf, in formats with a negative zero. Numba adds int32 as
    int64; so each sum is said to be an int32.
    """
    top = most = vanished = np.int32(0)
    for i in range(count):
        size = np.int32(bits[i] & _ABS)
        sign = np.int32(bits[i] ^ size)
        s = as_float(size) * scale[i]
        top = max(top, size)
        most = max(most, np.int32(as_bits(s) & _ABS))  # 0 * Inf is a NaN with a sign
        vanished = np.int32(vanished + np.int32(s <= fmt.vanishing))
        s = min(s, fmt.max)
        binade = max(np.int32(as_bits(s) & _INF), fmt.min_normal_bits)
        c = as_float(np.int32(binade + fmt.span))
        t = s + c
        steps = np.int32(as_bits(t) - as_bits(c))
        code = np.int32(steps + (np.int32(binade - fmt.min_normal_bits) >> fmt.shift))
        codes[i] = np.uint8(code | (sign >> np.int32(24)))
        values[i] = as_float(np.int32(as_bits(t - c) | sign)) * inv[i]
    return top, most, vanished


@part
def _without_negative_zero(codes: Any, values: Any, count: int) -> None:
    """Mend what `_cast` made, where 0x80 is no zero."""
    for i in range(count):
        codes[i] = np.uint8(0) if codes[i] == np.uint8(0x80) else codes[i]
    for i in range(count):
        values[i] = values[i] + np.float32(0.0)  # -0 becomes 0


@part
def _with_nan(bits: Any, scale: Any, fmt: Layout, codes: Any, values: Any, count: int) -> None:
    """Mend what `_cast` made of elements that are NaN when scaled."""
    for i in range(count):
        if np.isnan(as_float(np.int32(bits[i] & _ABS)) * scale[i]):
            sign = (bits[i] >> np.int32(24)) & np.int32(-128)
            codes[i] = np.uint8(fmt.nan_code | (sign * fmt.nan_is_signed))
            values[i] = np.float32(np.nan)


@part
def _vanished(bits: Any, scale: Any, fmt: Layout, count: int) -> Any:
    """Count the elements, not zero, that become zero."""
    found = np.int32(0)
    for i in range(count):
        size = np.int32(bits[i] & _ABS)
        gone = np.int32(as_float(size) * scale[i] <= fmt.vanishing)
        found = np.int32(found + (gone & np.int32(size != np.int32(0))))
    return found


@_summing
def _with_care(
    bits: Any, scale: Any, inv: Any, fmt: Layout, count: int, counts: Any, sums: Any
) -> None:
    """Count and sum up finite elements alone, and what saturation removed."""
    total = removed = 0.0
    top = saturated = nonfinite = np.int32(0)
    for i in range(count):
        size = np.int32(bits[i] & _ABS)
        finite = np.int32(size < _INF)
        size = size if finite else np.int32(0)
        top = max(top, size)
        nonfinite = np.int32(nonfinite + np.int32(1) - finite)
        beyond = as_float(size) * scale[i] > fmt.limit
        saturated = np.int32(saturated + np.int32(beyond))
        x = np.float64(as_float(size))
        total += x * x
        lost = x - np.float64(fmt.max * inv[i]) if beyond else 0.0
        removed += lost * lost
    counts[AMAX] = max(counts[AMAX], np.int64(top))
    counts[SATURATED] += saturated
    counts[NONFINITE] += nonfinite
    sums[SQUARE] += total
    sums[SATURATED_SQUARE] += removed


@part
def _chunk(
    bits: Any, x: Any, scale: Any, inv: Any, fmt: Layout, codes: Any, values: Any,
    counts: Any, sums: Any,
) -> None:  # fmt: skip
    """Cast one chunk: codes, values, counts and sums; `x` views the bits."""
    count = len(codes)
    top, most, vanished = _cast(bits, scale, inv, fmt, codes, values, count)
    if vanished > 0:
        counts[UNDERFLOWED] += _vanished(bits, scale, fmt, count)
    if most > as_bits(fmt.limit):
        _with_care(bits, scale, inv, fmt, count, counts, sums)
    else:
        counts[AMAX] = max(counts[AMAX], np.int64(top))
        sums[SQUARE] += _square_sum(x, count)
    if fmt.zero_is_signed == 0:
        _without_negative_zero(codes, values, count)
    if most > _INF:
        _with_nan(bits, scale, fmt, codes, values, count)


@part
def cast_row(
    x_at: int, kind: int, start: int, count: int, scales: Any, invs: Any, first: int, along: int,
    fmt: Layout, codes: Any, values: Any, counts: Any, sums: Any, work: Any,
) -> None:  # fmt: skip
    """Cast `count` elements of a row, which lie at `start` in memory and at `first` in the row.

    `scales` and `invs` have one a block of `along` elements of the row. `values` may be empty;
    `work` is `[4, CHUNK]`.
    """
    scale, inv, loaded = work[0], work[1], work[2]
    single = first // along == (first + count - 1) // along
    if single:
        _spread(scales, invs, first, min(count, CHUNK), along, scale, inv)
    for done in range(0, count, CHUNK):
        size = min(CHUNK, count - done)
        at = start + done
        if not single:
            _spread(scales, invs, first + done, size, along, scale, inv)
        if kind == FLOAT32:
            x = carray(pointer(x_at + 4 * at), size, dtype=np.float32)
        else:
            x = loaded[:size]
            halves = carray(pointer(x_at + 2 * at), size, dtype=np.uint16)
            load(halves, kind, size, x.view(np.int32))
        _chunk(
            x.view(np.int32), x, scale, inv, fmt, codes[at : at + size],
            values[at : at + size] if len(values) else work[3][:size], counts, sums,
        )  # fmt: skip


@part
def _largest(bits: Any) -> Any:
    """Return the bits of the largest |x| that is finite, 0 without one."""
    top = np.int32(0)
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] & _ABS))
    if top < _INF:
        return top
    top = np.int32(0)
    for i in range(len(bits)):
        size = np.int32(bits[i] & _ABS)
        top = max(top, size if size < _INF else np.int32(0))
    return top


@part
def _raise(bits: Any, count: int, first: int, along: int, amax: Any) -> None:
    """Raise the amaxes of a row of blocks by the elements `first` to `first + count`."""
    if along == 1:
        amax = amax[first : first + count]
        for i in range(count):
            size = np.int32(bits[i] & _ABS)
            amax[i] = max(amax[i], size if size < _INF else np.int32(0))
        return
    block = first // along
    left = along - first % along
    done = 0
    while done < count:
        stop = min(count, done + left)
        amax[block] = max(amax[block], _largest(bits[done:stop]))
        done, left = stop, along
        block += 1


@part
def amax_row(
    x_at: int, kind: int, start: int, count: int, first: int, along: int, amax: Any, work: Any
) -> None:
    """Raise the amaxes of a row of blocks, bits of float32; the arguments are as in `cast_row`."""
    loaded = work[2].view(np.int32)
    for done in range(0, count, CHUNK):
        size = min(CHUNK, count - done)
        at = start + done
        if kind == FLOAT32:
            bits = carray(pointer(x_at + 4 * at), size, dtype=np.int32)
        else:
            bits = loaded[:size]
            load(carray(pointer(x_at + 2 * at), size, dtype=np.uint16), kind, size, bits)
        _raise(bits, size, first + done, along, amax)


_LOW, _HIGH = np.float32(SCALE_MIN), np.float32(SCALE_MAX)


@kernel
def own_scale(top: Any, largest: Any, power_of_two: Any) -> Any:
    """Return the scale of an amax: `unclamp.reference.scale_from_amax`, bit for bit."""
    if top == 0:
        return np.float32(1)
    if not power_of_two:
        return min(max(np.float32(np.float64(largest) / np.float64(top)), _LOW), _HIGH)
    most, highest = math.frexp(np.float64(largest))
    mantissa, exponent = math.frexp(np.float64(top))
    power = highest - exponent - (1 if mantissa > most else 0)
    power = min(max(power, -MAX_SCALE_EXPONENT), MAX_SCALE_EXPONENT)
    return as_float(np.int32(np.int32(power + 127) << np.int32(23)))
