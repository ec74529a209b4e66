"""A tensor with one scale, small enough for one thread: cast, measured and decided in one call.

What a cast costs beside its arithmetic is Python. So everything that is decided by numbers is
decided in here: the scale of the tensor's own, whether a guard casts again, the statistics. Tensors
come as addresses, which costs nothing and leaves the user's storage as it is (`Tensor.numpy` would
make it non-resizable for good).

Results are those of `unclamp.numerics.cpu` for larger tensors, which are cut into such pieces.
"""

import math
from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, types
from numba.extending import intrinsic

from unclamp.formats import FORMATS
from unclamp.numerics.compiled import compiled
from unclamp.numerics.kernels import (
    AMAX,
    COUNTS,
    FLOAT32,
    NONFINITE,
    SATURATED,
    SATURATED_SQUARE,
    SQUARE,
    SUMS,
    UNDERFLOWED,
    amax_range,
    cast_range,
)
from unclamp.numerics.layout import layout
from unclamp.numerics.stats import Stat
from unclamp.reference import SCALE_MAX, SCALE_MIN
from unclamp.scaling import MAX_SCALE_EXPONENT

NUMBER = {name: number for number, name in enumerate(FORMATS)}
"""A format's place in the kernels' table, by its name: a format's own hash takes longer."""
_TABLE = tuple(map(layout, FORMATS.values()))
_LOW, _HIGH = np.float32(SCALE_MIN), np.float32(SCALE_MAX)
_FIELDS = len(Stat)
_AMAX, _SCALE_INV, _ELEMENTS = int(Stat.AMAX), int(Stat.SCALE_INV), int(Stat.ELEMENTS)
_SATURATED, _UNDERFLOWED = int(Stat.SATURATED), int(Stat.UNDERFLOWED)
_NONFINITE, _RECAST, _CASTS = int(Stat.NONFINITE), int(Stat.RECAST), int(Stat.CASTS)
_SQUARE, _REMOVED = int(Stat.SQUARE), int(Stat.SATURATED_SQUARE)


def _take_for_a_pointer(_context: Any, address: Any) -> Any:
    """Take a whole number for an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_take_for_a_pointer)


def _own_scale(top: Any, largest: Any, power_of_two: Any) -> Any:
    """Return the scale of an amax: `unclamp.reference.scale_from_amax`, bit for bit."""
    if top == 0:
        return np.float32(1)
    if power_of_two:
        mantissa, exponent = math.frexp(np.float64(top))
        most, highest = math.frexp(np.float64(largest))
        power = highest - exponent - (1 if mantissa > most else 0)
        power = min(max(power, -MAX_SCALE_EXPONENT), MAX_SCALE_EXPONENT)
        return np.float32(math.ldexp(1.0, power))
    return min(max(np.float32(np.float64(largest) / np.float64(top)), _LOW), _HIGH)


own_scale = compiled(_own_scale, error_model="numpy")


def _whole(
    x: Any, ints: Any, floats: Any, kind: Any, scale: Any, number: Any, largest: Any,
    power_of_two: Any, guard: Any, codes: Any, values: Any, stats: Any, results: Any,
) -> None:  # fmt: skip
    """Cast a row; `scale` has one number or none, `results` takes scale_inv and amax."""
    fmt = _TABLE[number]
    count = x.shape[1]
    rows, columns = (0, 1), (0, count)
    used = np.float32(0)
    if len(scale):
        used = scale[0]
    amax = np.zeros((1, 1), np.int32)
    if not used > 0:  # 0: nothing measured yet; NaN
        amax_range(x, kind, 1, count, rows, columns, amax)
        used = own_scale(amax.view(np.float32)[0, 0], largest, power_of_two)
        guard = False
    scales = np.full((1, 1), used, np.float32)
    invs = np.float32(1) / scales
    counts, sums = np.zeros(COUNTS, np.int64), np.zeros(SUMS)
    cast_range(
        x, ints, floats, kind, scales, invs, 1, count, fmt, codes, values, rows, columns,
        counts, sums,
    )  # fmt: skip
    amax[0, 0] = counts[AMAX]
    top = amax.view(np.float32)[0, 0]
    recast = guard and top * used > fmt.limit
    if recast:
        scales[0, 0] = own_scale(top, largest, power_of_two)
        invs[0, 0] = np.float32(1) / scales[0, 0]
        counts[:] = 0
        sums[:] = 0
        cast_range(
            x, ints, floats, kind, scales, invs, 1, count, fmt, codes, values, rows, columns,
            counts, sums,
        )  # fmt: skip
    results[0] = invs[0, 0]
    results[1] = top if counts[NONFINITE] < count else np.float32(-1)
    stats[_AMAX] = results[1]
    stats[_SCALE_INV] = invs[0, 0]
    stats[_ELEMENTS] = count
    stats[_SATURATED] = counts[SATURATED]
    stats[_UNDERFLOWED] = counts[UNDERFLOWED]
    stats[_NONFINITE] = counts[NONFINITE]
    stats[_RECAST] = 1.0 if recast else 0.0
    stats[_SQUARE] = sums[SQUARE]
    stats[_REMOVED] = sums[SATURATED_SQUARE]
    stats[_CASTS] = 1.0


whole = compiled(_whole, error_model="numpy")


def _cast_at(
    x_at: Any, count: Any, kind: Any, scale_at: Any, number: Any, largest: Any, power_of_two: Any,
    guard: Any, codes_at: Any, values_at: Any, stats_at: Any, results_at: Any,
) -> None:  # fmt: skip
    """Cast the elements at an address; `scale_at` and `values_at` are 0 where there are none."""
    scale = carray(_pointer(scale_at), 1 if scale_at else 0, dtype=np.float32)
    codes = carray(_pointer(codes_at), (1, count), dtype=np.uint8)
    room = (1, count) if values_at else (0, 0)
    values = carray(_pointer(values_at), room, dtype=np.float32)
    stats = carray(_pointer(stats_at), _FIELDS, dtype=np.float64)
    results = carray(_pointer(results_at), 2, dtype=np.float32)
    if kind == FLOAT32:
        ints = carray(_pointer(x_at), (1, count), dtype=np.int32)
        floats = carray(_pointer(x_at), (1, count), dtype=np.float32)
        whole(
            ints, ints, floats, kind, scale, number, largest, power_of_two, guard, codes, values,
            stats, results,
        )  # fmt: skip
    else:
        halves = carray(_pointer(x_at), (1, count), dtype=np.uint16)
        ints = carray(_pointer(x_at), (0, 0), dtype=np.int32)
        floats = carray(_pointer(x_at), (0, 0), dtype=np.float32)
        whole(
            halves, ints, floats, kind, scale, number, largest, power_of_two, guard, codes, values,
            stats, results,
        )  # fmt: skip


cast_at = compiled(_cast_at, error_model="numpy")


def _decode_at(codes_at: Any, count: Any, table_at: Any, scale_inv_at: Any, values_at: Any) -> None:
    """Put what codes stand for at an address; the table has a value a code."""
    codes = carray(_pointer(codes_at), count, dtype=np.uint8)
    table = carray(_pointer(table_at), 256, dtype=np.float32)
    values = carray(_pointer(values_at), count, dtype=np.float32)
    scaled = table * carray(_pointer(scale_inv_at), 1, dtype=np.float32)[0]
    for i in range(count):
        values[i] = scaled[codes[i]]


decode_at = compiled(_decode_at, error_model="numpy")


def _merge_at(total_at: Any, rows: Any, stats_at: Any) -> None:
    """Merge the statistics at some addresses into consecutive rows; 0 is the address of none."""
    total = carray(_pointer(total_at), (rows, _FIELDS), dtype=np.float64)
    for row in range(rows):
        if stats_at[row] == 0:
            continue
        stats = carray(_pointer(stats_at[row]), _FIELDS, dtype=np.float64)
        for i in range(_FIELDS):
            if i <= _SCALE_INV:
                total[row, i] = max(total[row, i], stats[i])
            else:
                total[row, i] += stats[i]


merge_at = compiled(_merge_at)
