"""The cast on a CPU, in one pass: amax, scale, round, saturate, count, codes and values.

Torch needs some 25 passes over a tensor for what a cast makes, and memory is what they wait for.
Here a chunk of the tensor is loaded into the nearest cache once, and everything is made from it
in short loops without branches, which LLVM turns into vector instructions (numba):

    s  = |x * scale|, at most max              float32, as everywhere
    normal     round the bits to the format's mantissa, ties to even, and shift
    subnormal  add 2**(emin - mantissa + 23): the adder rounds; the sum's low bits are the code

Results equal those of `unclamp.numerics.cast.quantize` in plain torch bit for bit, codes, scales
and counts; sums of squares are taken in float64 here and lie within 1e-6 of each other. A tensor
is cut into tasks of fixed size whose sums are added in order, so that nothing depends on the
number of threads.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from unclamp.formats import E4M3FN, Format

CHUNK = 1024
"""Elements worked on at a time; the six arrays of them fit the first-level cache."""
TASK = 512 * CHUNK
"""Elements a thread takes at a time."""

_AMAX, _SATURATED, _UNDERFLOWED, _NONFINITE, _COUNTS = range(5)
_SQUARE, _SATURATED_SQUARE, _SUMS = range(3)
_FLOAT32, _BFLOAT16, _FLOAT16 = range(3)
_KINDS = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}
_ABS = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)


class Layout(NamedTuple):
    """A format's numbers as the kernel wants them; see the module's two cases."""

    shift: np.int32
    half: np.int32
    mask: np.int32
    rebias: np.int32
    min_normal_bits: np.int32
    magic: np.float32
    magic_bits: np.int32
    max: np.float32
    limit: np.float32
    vanishing: np.float32
    nan_code: np.int32
    nan_is_signed: np.int32
    zero_is_signed: np.int32


@cache
def layout(fmt: Format) -> Layout:
    """Return the kernel's numbers for a format."""
    shift = 23 - fmt.mantissa_bits
    magic = np.float32(fmt.min_subnormal * 2.0**23)
    dtype = getattr(torch, f"float8_{fmt.name}")
    nan, minus_nan = torch.tensor([np.nan, -np.nan]).to(dtype).view(torch.uint8).tolist()
    return Layout(
        shift=np.int32(shift),
        half=np.int32((1 << (shift - 1)) - 1),
        mask=np.int32(-(1 << shift)),
        rebias=np.int32((127 - fmt.bias) << fmt.mantissa_bits),
        min_normal_bits=_bits(fmt.min_normal),
        magic=magic,
        magic_bits=_bits(magic),
        max=np.float32(fmt.max),
        limit=np.float32(fmt.overflow_limit),
        vanishing=np.float32(fmt.min_subnormal / 2),
        nan_code=np.int32(nan & 0x7F if nan != minus_nan else nan),
        nan_is_signed=np.int32(nan != minus_nan),
        zero_is_signed=np.int32(fmt.has_negative_zero),
    )


def _bits(value: float | np.float32) -> np.int32:
    return np.float32(value).view(np.int32)


_compiled = njit(nogil=True, cache=True, error_model="numpy")
_summing = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})


@_compiled
def _load(x: Any, kind: int, count: int, bits: Any, values: Any) -> None:
    """Put a chunk as the bits of float32 values into `bits`, which `values` views as float32."""
    if kind == _FLOAT32:
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
        sums[_SATURATED_SQUARE] += removed
    else:
        total = _square_sum(x, count)
    sums[_SQUARE] += total
    if nonfinite > 0 or fmt.zero_is_signed == 0:
        _careful_codes(bits, kept, kept_bits, magic_bits, fmt, codes, count)
    else:
        _codes(bits, kept, kept_bits, magic_bits, fmt, codes, count)
    counts[_AMAX] = max(counts[_AMAX], np.int64(amax))
    counts[_SATURATED] += saturated
    counts[_UNDERFLOWED] += underflowed
    counts[_NONFINITE] += nonfinite
    if len(values) == 0:
        return
    for i in range(count):
        q = magic[i] - fmt.magic if kept_bits[i] < fmt.min_normal_bits else kept[i]
        values[i] = np.copysign(q, x[i]) * inv[i]
    if fmt.zero_is_signed == 0:
        for i in range(count):
            values[i] = values[i] + np.float32(0.0)  # -0 becomes 0


@_compiled
def _cast_range(
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
            if along < x.shape[1] or group != filled:
                _fill(scale, scales[group], first, CHUNK if along >= x.shape[1] else count, along)
                _fill(inv, invs[group], first, CHUNK if along >= x.shape[1] else count, along)
                filled = group
            xs = x[row, first : first + count]
            if kind == _FLOAT32:
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
def _amax_range(
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
def _decode_range(codes: Any, table: Any, values: Any, first: int, last: int) -> None:
    for i in range(first, last):
        values[i] = table[codes[i]]


class Blocks(NamedTuple):
    """A row-major matrix and the blocks of it that share a scale, in elements of memory."""

    rows: int
    columns: int
    across: int
    along: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and along."""
        return -(-self.rows // self.across), -(-self.columns // self.along)


class Cast(NamedTuple):
    """What the kernel makes: codes, and what `Stat` counts and sums."""

    codes: Tensor
    amax: float
    saturated: int
    underflowed: int
    nonfinite: int
    square: float
    saturated_square: float


def block_amax(x: Tensor, blocks: Blocks) -> np.ndarray:
    """Return the amax over the finite elements of each block, float32, `blocks.grid`; 0 if none."""
    data, kind = _data(x, blocks)
    amax = np.zeros(blocks.grid, np.int32)
    tasks = _tasks(blocks, whole=blocks.across)
    parts = [amax if blocks.grid[0] > 1 or len(tasks) == 1 else np.zeros_like(amax) for _ in tasks]
    calls = [
        (_amax_range, data, kind, blocks.across, blocks.along, *task, part)
        for task, part in zip(tasks, parts, strict=True)
    ]
    _run(calls)
    return (
        np.maximum.reduce(parts).view(np.float32) if len(parts) > 1 else parts[0].view(np.float32)
    )


def cast(
    x: Tensor,
    scales: np.ndarray,
    invs: np.ndarray,
    blocks: Blocks,
    fmt: Format,
    *,
    values: Tensor | None = None,
) -> Cast:
    """Cast a contiguous matrix with the scales of its blocks, float32, `blocks.grid`.

    `values` is written, if given: contiguous float32 of as many elements.
    """
    data, kind = _data(x, blocks)
    shape = (blocks.rows, blocks.columns)
    codes = torch.empty(shape, dtype=torch.uint8)
    hat = torch.empty(0, 0, dtype=torch.float32) if values is None else values.view(shape)
    tasks = _tasks(blocks, whole=1)
    counts = np.zeros((len(tasks), _COUNTS), np.int64)
    sums = np.zeros((len(tasks), _SUMS))
    is_float32 = kind == _FLOAT32
    ints = data if is_float32 else np.empty((0, 0), np.int32)
    views = (data, ints, ints.view(np.float32), kind)
    outs = (layout(fmt), codes.numpy(), hat.numpy())
    calls = [
        (_cast_range, *views, scales, invs, blocks.across, blocks.along, *outs, *task, *out)
        for task, *out in zip(tasks, counts, sums, strict=True)
    ]
    _run(calls)
    total, added = counts.sum(0), sums.sum(0)
    return Cast(
        codes=codes,
        amax=float(counts[:, _AMAX].max().astype(np.int32).view(np.float32)),
        saturated=int(total[_SATURATED]),
        underflowed=int(total[_UNDERFLOWED]),
        nonfinite=int(total[_NONFINITE]),
        square=float(added[_SQUARE]),
        saturated_square=float(added[_SATURATED_SQUARE]),
    )


def decode(codes: Tensor, fmt: Format, scale_inv: float) -> Tensor:
    """Return `codes * scale_inv` in float32 for contiguous codes with one scale."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    with np.errstate(over="ignore"):
        table = decode_table(fmt) * np.float32(scale_inv)
    data = (codes.view(torch.uint8).numpy().reshape(-1), table, values.numpy().reshape(-1))
    size = codes.numel()
    _run([(_decode_range, *data, i, min(i + TASK, size)) for i in range(0, size, TASK)])
    return values


@cache
def decode_table(fmt: Format) -> np.ndarray:
    """Return the value of each code, float32."""
    return np.array([fmt.decode(code) for code in range(256)], np.float32)


def _data(x: Tensor, blocks: Blocks) -> tuple[np.ndarray, int]:
    """Return the tensor's bits as a numpy matrix, and the kind of float that they are."""
    bits = torch.int32 if x.dtype == torch.float32 else torch.uint16
    return x.view(bits).numpy().reshape(blocks.rows, blocks.columns), _KINDS[x.dtype]


Range = tuple[int, int]


def _tasks(blocks: Blocks, *, whole: int) -> list[tuple[Range, Range]]:
    """Cut a matrix into ranges of rows and columns of about `TASK` elements.

    `whole` rows stay together; a matrix of one group of rows is cut by columns.
    """
    rows, columns = blocks.rows, blocks.columns
    if rows <= whole:
        step = max(TASK // rows // CHUNK, 1) * CHUNK
        return [((0, rows), (c, min(c + step, columns))) for c in range(0, columns, step)]
    step = max(TASK // columns // whole, 1) * whole
    return [((r, min(r + step, rows)), (0, columns)) for r in range(0, rows, step)]


def _run(calls: list[tuple[Any, ...]]) -> None:
    threads = min(torch.get_num_threads(), len(calls))
    if threads <= 1:
        for function, *arguments in calls:
            function(*arguments)
    else:
        for future in [_pool(threads).submit(*call) for call in calls]:
            future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="unclamp-cast")


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache; later calls do nothing."""
    x = torch.ones(1, 1, dtype=torch.float32)
    blocks = Blocks(1, 1, 1, 1)
    one = np.ones((1, 1), np.float32)
    for dtype in _KINDS:
        block_amax(x.to(dtype), blocks)
        cast(x.to(dtype), one, one, blocks, E4M3FN, values=torch.empty(1, 1, dtype=torch.float32))
    decode(torch.zeros(1, dtype=torch.float8_e4m3fn), E4M3FN, 1.0)
