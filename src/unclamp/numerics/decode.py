"""The kernel that decodes a part of a matrix of codes: some rows, or some columns.

A GEMM in float32 multiplies by panels (`unclamp.numerics.panels`), each decoded into memory
that stays. The arithmetic is that of a table of the codes' values times the scale, bit for bit:

    normal     shift exponent and mantissa to their places, and add the difference of the biases
    subnormal  the smallest value times the code, exact
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from unclamp.formats import FORMATS, Format
from unclamp.numerics.kernels import as_bits, as_float, kernel, part, pointer

_INF, _NAN = np.float32(np.inf), np.float32(np.nan)
_NONE = np.int32(-1)
"""Stands for a code that a format does not have."""


_AHEAD, _LINE = 32, 64
"""Rows that are fetched at a time, and bytes of a cache line."""


class Places(NamedTuple):
    """Where a format's bits go in a float32, and which of its codes are no numbers."""

    shift: np.int32
    rebias: np.int32
    min_normal_code: np.int32
    min_subnormal: np.float32
    max_code: np.int32
    infinity_code: np.int32
    negative_nan: np.int32


def _places(fmt: Format) -> Places:
    return Places(
        shift=np.int32(23 - fmt.mantissa_bits),
        rebias=np.int32((127 - fmt.bias) << 23),
        min_normal_code=np.int32(1 << fmt.mantissa_bits),
        min_subnormal=np.float32(fmt.min_subnormal),
        max_code=np.int32(fmt.max_code),
        infinity_code=_NONE if fmt.infinity_code is None else np.int32(fmt.infinity_code),
        negative_nan=_NONE if fmt.has_negative_zero else np.int32(0x80),
    )


_TABLE = tuple(map(_places, FORMATS.values()))
"""By `kernels.NUMBER`."""


@part
def _number(code: Any, fmt: Places) -> Any:
    """Return the size of the number that a code stands for; its sign is the code's."""
    size = code & np.int32(0x7F)
    number = as_float(np.int32(np.int32(size << fmt.shift) + fmt.rebias))
    number = np.float32(size) * fmt.min_subnormal if size < fmt.min_normal_code else number
    wild = _INF if size == fmt.infinity_code else _NAN
    return wild if size > fmt.max_code or code == fmt.negative_nan else number


@part
def _signed(number: Any, code: Any) -> Any:
    sign = (code & np.int32(0x80)) << np.int32(24)
    return as_float(np.int32(as_bits(number) ^ np.int32(sign)))


@part
def _decode_each(codes: Any, invs: Any, fmt: Places, values: Any) -> None:
    """Decode codes that have a scale each."""
    for i in range(len(codes)):
        code = np.int32(codes[i])
        values[i] = _signed(_number(code, fmt) * invs[i], code)


@part
def _decode_run(codes: Any, inv: Any, fmt: Places, values: Any) -> None:
    """Decode codes that share a scale."""
    for i in range(len(codes)):
        code = np.int32(codes[i])
        values[i] = _signed(_number(code, fmt) * inv, code)


@part
def _touch(codes: Any, seen: Any) -> None:
    """Read a byte of each cache line of some pieces of rows, so that they come all at a time.

    A loop that decodes waits for memory anew at each row: it is too long for a processor to look
    ahead of, and no prefetcher knows where the next row's piece is.
    """
    total = np.int64(0)
    for row in range(len(codes)):
        for i in range(0, codes.shape[1], _LINE):
            total += codes[row, i]
    seen[0] += total


@kernel
def decode_panel(
    codes_at: int, rows: int, columns: int, invs_at: int, down: int, along: int, number: int,
    first_row: int, last_row: int, first_column: int, last_column: int, values_at: int,
) -> None:  # fmt: skip
    """Decode some rows and columns of a matrix.

    Args:
        codes_at: Where the matrix is, uint8.
        rows: Its rows.
        columns: Its columns.
        invs_at: Where that is what multiplies the codes of each of its blocks, float32.
        down: Rows of a block.
        along: Columns of a block.
        number: The codes' format, of `kernels.NUMBER`.
        first_row: The first row.
        last_row: That after the last.
        first_column: The first column.
        last_column: That after the last.
        values_at: Where the values go, float32, as many rows and columns.
    """
    fmt, width = _TABLE[number], last_column - first_column
    codes = carray(pointer(codes_at), (rows, columns), dtype=np.uint8)
    grid = (-(-rows // down), -(-columns // along))
    invs = carray(pointer(invs_at), grid, dtype=np.float32)
    values = carray(pointer(values_at), (last_row - first_row, width), dtype=np.float32)
    seen = np.zeros(1, np.int64)
    for row in range(first_row, last_row):
        if width < columns and (row - first_row) % _AHEAD == 0:
            _touch(codes[row : min(row + _AHEAD, last_row), first_column:last_column], seen)
        scales = invs[row // down]
        line, out = codes[row, first_column:last_column], values[row - first_row]
        if along == 1:
            _decode_each(line, scales[first_column:last_column], fmt, out)
            continue
        done = 0
        while done < width:
            block = (first_column + done) // along
            stop = min((block + 1) * along - first_column, width)
            _decode_run(line[done:stop], scales[block], fmt, out[done:stop])
            done = stop
