"""Hopper-like accumulation: how a Hopper tensor core adds an FP8 GEMM, emulated on the CPU.

A float32 matmul of FP8 values is kinder than the hardware. The tensor core adds 32 products at a
time in fixed point, on a grid set by the largest of them, and cuts off what lies below. For one
output and one block of 32 products p_k = a_k * b_k:

    E  = max(e(c), max_k e(a_k) + e(b_k))       over what is not zero; c: the sum so far
    u  = 2**(E - 13)
    s  = trunc(c / u) + sum_k trunc(p_k / u)    exact integers; trunc goes towards zero
    c' = s * u, cut towards zero to 13 fraction bits

- e(x) is the exponent as stored: floor(log2 |x|), but for an operand not below its format's
  smallest normal exponent. Hence the formats are arguments: 2**-9 is subnormal in E4M3 and counts
  as 2**-6; in E5M2 it is normal.
- e(a_k) + e(b_k) is not the exponent of the product: 1.5 * 1.5 counts as 2**0, not 2**1.
- The sum so far is aligned like a product: each cuts the other.

With fast accumulation c runs all along K. Without, it starts from zero every 128 along K and is
then added to a float32 accumulator, rounded to nearest even. Zeros fill up the last block and
change nothing. A sum of zero is +0.

On uniform data in [0, 1) fast accumulation loses 0.5 % at K = 512, 3.1 % at 2048 and 13 % at 8192:
the further c is above the products, the more of each is cut off. Without, it loses 0.05 %.

Not modelled: split-K, the epilogue (scales, bias, rounding of the output), NaN payloads, other
devices. The rule comes from public measurements, not from NVIDIA: it is Hopper-like.

Sources: about 14 bits kept and promotion every 128, DeepSeek-V3 report, arXiv 2412.19437. Models
of tensor cores, Khattak & Mikaitis, arXiv 2512.07004. The tests hold this module bit for bit to
mmaemu 0.1 (splitk=1), whose authors hold it to cuBLAS on an H100 PCIe.
"""

from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from unclamp.formats import E4M3FN, E5M2, Format
from unclamp.numerics.compiled import compiled, run

BLOCK = 32  # products added at a time
PROMOTION = 128  # length along K of one tensor-core sum without fast accumulation
FRACTION_BITS = 13  # of the aligned terms, and of the sum
_KEPT = -1 << (23 - FRACTION_BITS)  # mask of a float32's own 23
_ZERO = -64  # exponent of a zero: with any other in the sum, it stays below every real product
_LOWEST = -60  # below any sum's exponent; keeps 1 / u finite in a block of zeros
_TILE = 256  # rows and columns of an output tile


def hopper_matmul(
    a: Tensor, b: Tensor, *, fast: bool, a_format: Format = E4M3FN, b_format: Format = E4M3FN
) -> Tensor:
    """Return `a @ b.T` in float32, added the way a Hopper tensor core adds FP8 products.

    Shapes: `a` [M, K], `b` [N, K]; the result is [M, N]. Any strides.

    Args:
        a: float32 on the CPU, values of `a_format` without a scale.
        b: The same, of `b_format`.
        fast: Accumulate in the tensor core all along K, not promoting to float32 every 128.
        a_format: E4M3FN or E5M2.
        b_format: E4M3FN or E5M2.

    Raises:
        ValueError: A shape, dtype or device is not as above, a format is one that Hopper does not
            have, or a finite value is not of its format.

    Numerics: a row with NaN or Inf gets what IEEE arithmetic gives, NaN or Inf, in its own row or
    column of the result and touches no other. Empty K gives zeros. The bits depend neither on the
    number of threads (torch's) nor on other rows.
    """
    _check_operands(a, b, a_format, b_format)
    a, b = a.detach(), b.detach()
    out = torch.zeros(len(a), len(b), dtype=torch.float32)
    if 0 in a.shape or 0 in b.shape:
        return out
    left, right = (pad(x.nan_to_num(0, 0, 0), (0, -x.shape[1] % BLOCK)) for x in (a, b))
    left, right = left.contiguous(), right.t().contiguous()
    left_exponents = _stored_exponents(left, "a", a_format)
    right_exponents = _stored_exponents(right, "b", b_format)
    stride = left.shape[1] if fast else PROMOTION
    operands = (left.numpy(), left_exponents, right.numpy(), right_exponents, out.numpy(), stride)
    tiles = product(*(range(0, size, _TILE) for size in out.shape))
    run([(_fill_tile, *operands, *tile) for tile in tiles])
    if len(wild := _nonfinite_rows(a)):
        out[wild] = a[wild] @ b.t()
    if len(wild := _nonfinite_rows(b)):
        out[:, wild] = a @ b[wild].t()
    return out


def _check_operands(a: Tensor, b: Tensor, a_format: Format, b_format: Format) -> None:
    for name, x, fmt in (("a", a, a_format), ("b", b, b_format)):
        if x.dtype != torch.float32 or x.ndim != 2 or x.device.type != "cpu":
            found = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise ValueError(f"expected {name} to be a float32 matrix on the CPU, got {found}")
        if fmt not in (E4M3FN, E5M2):
            raise ValueError(f"expected {name}_format e4m3fn or e5m2, as Hopper has, got {fmt!r}")
    if a.shape[1] != b.shape[1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"expected a [M, K] and b [N, K] with the same K, got {shapes}")


def _nonfinite_rows(x: Tensor) -> Tensor:
    if bool(x.sum().isfinite()):  # ten times faster than a look at each row
        return torch.empty(0, dtype=torch.int64)
    return x.isfinite().all(1).logical_not().nonzero()[:, 0]


def _stored_exponents(x: Tensor, name: str, fmt: Format) -> np.ndarray:
    """Return e(x) of a contiguous `x` as int8, `_ZERO` where `x` is zero."""
    exponents = np.empty(x.shape, np.int8)
    bits = x.view(torch.int32).numpy().reshape(-1)
    excess = _split_exponents(bits, fmt.min_exponent, fmt.mantissa_bits, exponents.reshape(-1))
    if excess or max(x.max(), -x.min()) > fmt.max:
        remedy = f"pass {name}_format if they are of another format, cast them first if of none"
        raise ValueError(f"expected {name} to hold values of {fmt.name}, got others: {remedy}")
    return exponents


@compiled
def _split_exponents(bits, min_exponent, mantissa_bits, exponents):
    """Write stored exponents; return nonzero if a value has bits below its format's last."""
    excess = 0
    for i in range(bits.size):
        magnitude = bits[i] & 0x7FFFFFFF
        exponent = (magnitude >> 23) - 127
        dropped = min(23 - mantissa_bits + max(min_exponent - exponent, 0), 24)
        significand = (magnitude & 0x7FFFFF) | 0x800000
        excess |= significand & ((1 << dropped) - 1) if magnitude else 0
        exponents[i] = max(exponent, min_exponent) if magnitude else _ZERO
    return excess


@compiled
def _fill_tile(a, a_exponents, b, b_exponents, out, stride, row, column):
    """Fill the tile of `out` that starts there: `a` [M, K], `b` [K, N], K a multiple of 32."""
    rows = range(row, min(row + _TILE, out.shape[0]))
    columns = slice(column, min(column + _TILE, out.shape[1]))
    width = columns.stop - column
    sums, largest = np.zeros((len(rows), width), np.float32), np.empty(width, np.int8)
    scratch = np.empty(width, np.int32), np.empty(width, np.float32)
    for k in range(0, a.shape[1], BLOCK):  # outermost, so that a block of `b` stays in the cache
        block = slice(k, k + BLOCK)
        for m in rows:
            c = sums[m - row]
            _align(a_exponents[m, block], b_exponents[block], columns, c, largest)
            _add_block(a[m, block], b[block], columns, largest, c, scratch)
            if (k + BLOCK) % stride == 0 or k + BLOCK == a.shape[1]:
                out[m, columns] += c
                c[:] = 0


@compiled
def _align(a, b, columns, c, largest):
    """Write E of a block: `a` [32] and `b` [32, N] are stored exponents."""
    bits = c.view(np.int32)
    for j in range(c.size):
        largest[j] = max(((bits[j] >> 23) & 0xFF) - 127, _LOWEST)
    for k in range(BLOCK):
        ak, bk = a[k], b[k, columns]
        for j in range(c.size):
            largest[j] = max(largest[j], np.int8(ak + bk[j]))


@compiled
def _add_block(a, b, columns, largest, c, scratch):
    """Turn c into c': `a` [32] and `b` [32, N] are values, `largest` is E."""
    s, per_unit = scratch  # per_unit: 1 / u
    c_bits, per_unit_bits = c.view(np.int32), per_unit.view(np.int32)
    for j in range(c.size):
        per_unit_bits[j] = (127 + FRACTION_BITS - largest[j]) << 23
    for j in range(c.size):
        s[j] = np.int32(c[j] * per_unit[j])
    for k in range(BLOCK):
        ak, bk = a[k], b[k, columns]
        for j in range(c.size):
            s[j] += np.int32(ak * bk[j] * per_unit[j])
    c[:] = s  # exact: |s| < 2**21
    for j in range(c.size):
        c_bits[j] &= _KEPT
    c /= per_unit
