"""The cast in plain Python, one number at a time: what every tensor path is held to.

Slow on purpose and without torch or numpy, so that it can be checked against the standard with
a finger on the page. Values are Python floats; float32 products are rounded explicitly.
"""

import math
import struct
from fractions import Fraction

from unclamp.formats import Format
from unclamp.scaling import MAX_SCALE_EXPONENT

SCALE_MIN = 2.0**-MAX_SCALE_EXPONENT
SCALE_MAX = 2.0**MAX_SCALE_EXPONENT
"""A scale stays in here, so that scale and 1 / scale are both normal float32."""


def float32(value: float) -> float:
    """Round a float64 to the nearest float32, ties to even; overflow gives Inf."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def round_unbounded(value: float, fmt: Format) -> float:
    """Round to the format's precision, ties to even, as if its exponent had no upper end.

    Below the smallest normal the spacing is the subnormal one, so tiny values become 0.
    NaN and Inf come back as they are.
    """
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, fmt.min_exponent)
    spacing = math.ldexp(1.0, exponent - fmt.mantissa_bits)
    return math.copysign(round(value / spacing) * spacing, value)


def is_saturated(value: float, fmt: Format) -> bool:
    """Whether a finite scaled value, correctly rounded, would exceed the format's max."""
    return math.isfinite(value) and abs(round_unbounded(value, fmt)) > fmt.max


def round_to_format(value: float, fmt: Format) -> float:
    """Round a scaled value into the format with saturation: what a cast must give.

    NaN stays NaN; Inf and finite overflow become +-max; -0 stays -0 where the format has one.
    """
    if math.isnan(value):
        return value
    rounded = round_unbounded(value, fmt)
    if abs(rounded) > fmt.max:
        return math.copysign(fmt.max, value)
    if rounded == 0 and not fmt.has_negative_zero:
        return 0.0
    return rounded


def scale_from_amax(
    amax: float,
    fmt: Format,
    *,
    margin: int = 0,
    power_of_two: bool = False,
    previous: float | None = None,
) -> float:
    """Return the multiplying scale `fmt.max / amax / 2**margin` as a float32.

    With `power_of_two` the exact quotient is rounded down to a power of two, so that nothing
    overflows: the exponent of 1 / scale is rounded up.

    Numerics: amax 0, NaN or Inf gives `previous`, or 1 where there is none. The result is kept
    in [2**-126, 2**126], so that its inverse is a normal float32 too.
    """
    if amax == 0 or not math.isfinite(amax):
        return 1.0 if previous is None else previous
    if power_of_two:
        exponent = _floor_log2(Fraction(fmt.max) / Fraction(amax)) - margin
        return 2.0 ** min(max(exponent, -MAX_SCALE_EXPONENT), MAX_SCALE_EXPONENT)
    quotient = float32(math.ldexp(fmt.max, -margin) / amax)
    return min(max(quotient, SCALE_MIN), SCALE_MAX)


def _floor_log2(value: Fraction) -> int:
    """Return the largest n with 2**n <= value, exactly."""
    n = value.numerator.bit_length() - value.denominator.bit_length()
    return n if Fraction(2) ** n <= value else n - 1
