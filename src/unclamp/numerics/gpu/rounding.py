"""What the GPU kernels do with one tile: load, round, count. Functions for `triton.jit` kernels.

Arithmetic is the same as in `unclamp.numerics.kernels` (CPU), so that codes, scales and counts
are the same bits. Elements travel as the bits of float32 values: comparing the bits of
magnitudes is comparing magnitudes, and NaN is what lies above the bits of Inf.

A format's numbers come as a constant, `Numbers`. Its `native` lets the device round what is not
NaN, where all roundings agree; that saves a third of the arithmetic. Everything else, and every
other device, rounds in integers.
"""

# Kernels are Triton's language, of which pyright sees Python's.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from typing import NamedTuple

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
ABS = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
INF = tl.constexpr(0x7F800000)


class Numbers(NamedTuple):
    """A format and its scaling in plain numbers: `unclamp.numerics.layout`, and scale settings.

    `largest` is the format's max with headroom; `max_bits` the float32 bits of the max itself.
    """

    shift: int
    half: int
    rebias: int
    min_normal: int
    magic: float
    magic_bits: int
    max: float
    max_bits: int
    limit: float
    vanishing: float
    nan_code: int
    nan_is_signed: bool
    zero_is_signed: bool
    exponent_bits: int
    native: bool
    largest: float
    margin: int
    power_of_two: bool


@triton.jit
def load_bits(x, offsets, mask, KIND: tl.constexpr):
    """Return the float32 bits of elements; zeros where the mask is false."""
    if KIND == FLOAT32:
        words = x.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        words = x.to(tl.pointer_type(tl.int16), bitcast=True)
    raw = tl.load(words + offsets, mask=mask, other=0)
    if KIND == FLOAT32:
        bits = raw
    elif KIND == BFLOAT16:
        bits = raw.to(tl.int32) << 16
    else:
        # The sign apart: a conversion may lose that of NaN.
        wide = raw.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        bits = (wide & ABS) | ((raw.to(tl.int32) << 16) & SIGN)
    return bits


@triton.jit
def as_float(bits):
    """Return the float32 of bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def own_scale(amax, F: tl.constexpr):
    """Return the scale of amaxes (float32 bits): `scale.scale_from_amax`, bit for bit."""
    value = as_float(amax)
    if F.power_of_two:
        # frexp: a subnormal amax is brought into the normal range first.
        is_tiny = amax < 0x00800000
        normal = tl.where(is_tiny, value * 16777216.0, value).to(tl.int32, bitcast=True)
        exponent = (normal >> 23) - tl.where(is_tiny, 24, 0)
        is_larger = (normal & 0x7FFFFF) > (F.max_bits & 0x7FFFFF)
        power = (F.max_bits >> 23) - exponent - is_larger.to(tl.int32) - F.margin
        power = tl.minimum(tl.maximum(power, -126), 126)
        scale = as_float((power + 127) << 23)
    else:
        scale = tl.div_rn(value * 0 + F.largest, value)
        scale = tl.minimum(tl.maximum(scale, 2.0**-126), 2.0**126)
    return tl.where(amax > 0, scale, 1.0)


@triton.jit
def round_bits(kept, F: tl.constexpr):
    """Return the codes of magnitudes, at most the format's max: nearest, ties to even."""
    b = kept.to(tl.int32, bitcast=True)
    normal = ((b + F.half + ((b >> F.shift) & 1)) >> F.shift) - F.rebias
    subnormal = (kept + F.magic).to(tl.int32, bitcast=True) - F.magic_bits
    return tl.where(b < F.min_normal, subnormal, normal)


E4M3 = tl.constexpr("e4m3x2")
E5M2 = tl.constexpr("e5m2x2")


@triton.jit
def device_codes(scaled, NAME: tl.constexpr):
    """Return codes as the device rounds: to nearest even, saturating; NaN without its sign.

    Four at a time, and only their word leaves the assembly. Two conversions whose halves are used
    both in a word and alone are compiled wrongly by the ptxas of Triton 3.6 (12.8): it merges the
    second conversion into the first one's register, and loses the first one's value.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite."
        + NAME
        + ".f32 low, $2, $1; cvt.rn.satfinite."
        + NAME
        + ".f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r",
        [scaled],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def quick_codes(bits, scaled, F: tl.constexpr):
    """Return codes where nothing is NaN, and the format has a -0."""
    if F.native:
        if F.exponent_bits == 4:
            codes = device_codes(scaled, E4M3)
        else:
            codes = device_codes(scaled, E5M2)
    else:
        code = round_bits(tl.minimum(tl.abs(scaled), F.max), F)
        codes = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def careful_codes(bits, scaled, F: tl.constexpr):
    """Return codes whatever the elements are: saturating, NaN kept."""
    is_nan = (bits & ABS) > INF
    code = round_bits(tl.minimum(tl.abs(tl.where(is_nan, 0.0, scaled)), F.max), F)
    sign = (bits >> 24) & 0x80
    nan = tl.where(is_nan, sign if F.nan_is_signed else 0, 0) | F.nan_code
    if not F.zero_is_signed:
        sign = tl.where(code == 0, 0, sign)
    return tl.where(is_nan, nan, code | sign).to(tl.uint8)


@triton.jit
def unit_of(top):
    """Return the power of two that brings an amax (bits) to about 1, so that squares fit."""
    return as_float(tl.maximum(254 - (top >> 23), 1) << 23)


@triton.jit
def unit_square(top):
    """Return `unit_of(top)**-2` in float64, exactly."""
    exponent = (127 - tl.maximum(254 - (top >> 23), 1)).to(tl.int64)
    return ((2 * exponent + 1023) << 52).to(tl.float64, bitcast=True)
