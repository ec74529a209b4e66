"""A tensor with one scale, small enough for one thread: cast, measured and decided in one call.

What a cast costs beside its arithmetic is Python. So everything that is decided by numbers is
decided in here: the scale of the tensor's own, whether a guard casts again, the statistics. Tensors
come as addresses, which costs nothing and leaves the user's storage as it is (`Tensor.numpy` would
make it non-resizable for good).

`unclamp.numerics.cpu` cuts larger tensors into such pieces.
"""

from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from unclamp.numerics.kernels import (
    AMAX,
    CHUNK,
    COUNTS,
    NONFINITE,
    SATURATED,
    SATURATED_SQUARE,
    SQUARE,
    SUMS,
    TABLE,
    UNDERFLOWED,
    amax_row,
    as_float,
    cast_row,
    kernel,
    own_scale,
    pointer,
)
from unclamp.numerics.stats import Stat

_FIELDS = len(Stat)
_AMAX, _SCALE_INV, _ELEMENTS = int(Stat.AMAX), int(Stat.SCALE_INV), int(Stat.ELEMENTS)
_SATURATED, _UNDERFLOWED = int(Stat.SATURATED), int(Stat.UNDERFLOWED)
_NONFINITE, _RECAST, _CASTS = int(Stat.NONFINITE), int(Stat.RECAST), int(Stat.CASTS)
_SQUARE, _REMOVED = int(Stat.SQUARE), int(Stat.SATURATED_SQUARE)


@kernel
def cast_at(
    x_at: int, count: int, kind: int, scale_at: int, number: int, largest: float,
    power_of_two: bool, guard: bool, codes_at: int, values_at: int, stats_at: int, results_at: int,
) -> None:  # fmt: skip
    """Cast the elements at an address; `scale_at` and `values_at` are 0 where there are none.

    `results_at` takes scale_inv and amax.
    """
    fmt = TABLE[number]
    start = np.int64(0)  # numba would compile everything anew for a literal 0
    codes = carray(pointer(codes_at), count, dtype=np.uint8)
    values = carray(pointer(values_at), count if values_at else 0, dtype=np.float32)
    stats = carray(pointer(stats_at), _FIELDS, dtype=np.float64)
    results = carray(pointer(results_at), 2, dtype=np.float32)
    scales, invs = np.zeros(1, np.float32), np.zeros(1, np.float32)
    if scale_at:
        scales[0] = carray(pointer(scale_at), 1, dtype=np.float32)[0]
    work, amax = np.empty((4, CHUNK), np.float32), np.zeros(1, np.int32)
    is_own = not scales[0] > 0  # 0: nothing measured yet; NaN
    if is_own:
        amax_row(x_at, kind, start, count, start, count, amax, work)
        scales[0] = own_scale(as_float(amax[0]), largest, power_of_two)
    recast = False
    while True:
        counts, sums = np.zeros(COUNTS, np.int64), np.zeros(SUMS)
        invs[0] = np.float32(1) / scales[0]
        cast_row(
            x_at, kind, start, count, scales, invs, start, count, fmt, codes, values, counts, sums,
            work,
        )  # fmt: skip
        top = as_float(np.int32(counts[AMAX]))
        if recast or is_own or not guard or not top * scales[0] > fmt.limit:
            break
        recast = True
        scales[0] = own_scale(top, largest, power_of_two)
    results[0] = invs[0]
    results[1] = top if counts[NONFINITE] < count else np.float32(-1)
    stats[_AMAX] = results[1]
    stats[_SCALE_INV] = invs[0]
    stats[_ELEMENTS] = count
    stats[_SATURATED] = counts[SATURATED]
    stats[_UNDERFLOWED] = counts[UNDERFLOWED]
    stats[_NONFINITE] = counts[NONFINITE]
    stats[_RECAST] = 1.0 if recast else 0.0
    stats[_SQUARE] = sums[SQUARE]
    stats[_REMOVED] = sums[SATURATED_SQUARE]
    stats[_CASTS] = 1.0


@kernel
def merge_at(total_at: Any, rows: Any, stats_at: Any) -> None:
    """Merge the statistics at some addresses into consecutive rows; 0 is the address of none."""
    total = carray(pointer(total_at), (rows, _FIELDS), dtype=np.float64)
    for row in range(rows):
        if stats_at[row] == 0:
            continue
        stats = carray(pointer(stats_at[row]), _FIELDS, dtype=np.float64)
        for i in range(_FIELDS):
            if i <= _SCALE_INV:
                total[row, i] = max(total[row, i], stats[i])
            else:
                total[row, i] += stats[i]
