"""What the 8-bit floating-point formats are. Every number is derived from a record.

A `Format` holds what the standard's table says (widths, bias, which codes are special);
maximum, subnormals and the overflow limit follow from it. Rounding lives in
`unclamp.reference` (scalars) and `unclamp.numerics.cast` (tensors).
"""

import math
import struct
from dataclasses import dataclass
from functools import cached_property

from unclamp.errors import RecipeError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Format:
    """An 8-bit floating-point format: sign, exponent, mantissa.

    Args:
        name: The field's name, and the suffix of torch's dtype `float8_<name>`.
        standard: The document that defines it.
        exponent_bits: Width of the exponent; the mantissa has `7 - exponent_bits`.
        bias: Subtracted from a normal number's exponent field.
        infinity_code: Code of +Inf, or None where the format has none.
        nan_codes: Every code that is NaN.

    Numerics: e4m3fn and the fnuz formats have no Inf; the fnuz formats have no -0 (code 0x80
    is their NaN). Source: OCP 8-bit Floating Point Specification (OFP8) rev 1.0, table 1;
    arXiv 2206.02915 for fnuz.
    """

    name: str
    standard: str
    exponent_bits: int
    bias: int
    infinity_code: int | None
    nan_codes: frozenset[int]

    @property
    def mantissa_bits(self) -> int:
        """Explicit bits of the significand."""
        return 7 - self.exponent_bits

    @property
    def has_negative_zero(self) -> bool:
        """Whether 0x80 is -0 and not NaN."""
        return 0x80 not in self.nan_codes

    def decode(self, code: int) -> float:
        """Return the value of a code in 0..255, exact in a Python float.

        Raises:
            ValueError: `code` is not a byte.
        """
        if not 0 <= code <= 0xFF:
            raise ValueError(f"expected a code in 0..255, got {code!r}")
        if code in self.nan_codes:
            return math.nan
        sign = -1.0 if code & 0x80 else 1.0
        if code & 0x7F == self.infinity_code:
            return sign * math.inf
        exponent = (code & 0x7F) >> self.mantissa_bits
        fraction = (code & ((1 << self.mantissa_bits) - 1)) / (1 << self.mantissa_bits)
        if exponent == 0:
            return sign * math.ldexp(fraction, 1 - self.bias)
        return sign * math.ldexp(1 + fraction, exponent - self.bias)

    @cached_property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        return max(code for code in range(0x80) if math.isfinite(self.decode(code)))

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return self.decode(self.max_code)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share its spacing."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def overflow_limit(self) -> float:
        """Largest float32 that rounds, with unbounded exponent, to at most `max`.

        An element is *saturated* exactly where |x * scale| > overflow_limit. The tie above max
        goes to the even neighbour: down to max where max's last bit is 0 (e4m3fn: 464 is not
        saturated), up and away where it is 1 (e5m2: 61440 is).
        """
        exponent = math.frexp(self.max)[1] - 1
        tie = self.max + math.ldexp(0.5, exponent - self.mantissa_bits)
        if self.max_code % 2 == 0:
            return tie
        (bits,) = struct.unpack("<I", struct.pack("<f", tie))
        return struct.unpack("<f", struct.pack("<I", bits - 1))[0]


E4M3FN = Format(
    name="e4m3fn",
    standard="OCP OFP8 rev 1.0, E4M3",
    exponent_bits=4,
    bias=7,
    infinity_code=None,
    nan_codes=frozenset({0x7F, 0xFF}),
)
E5M2 = Format(
    name="e5m2",
    standard="OCP OFP8 rev 1.0, E5M2",
    exponent_bits=5,
    bias=15,
    infinity_code=0x7C,
    nan_codes=frozenset({0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}),
)
E4M3FNUZ = Format(
    name="e4m3fnuz",
    standard="arXiv 2206.02915 (Graphcore, AMD), E4M3 with one NaN and no -0",
    exponent_bits=4,
    bias=8,
    infinity_code=None,
    nan_codes=frozenset({0x80}),
)
E5M2FNUZ = Format(
    name="e5m2fnuz",
    standard="arXiv 2206.02915 (Graphcore, AMD), E5M2 with one NaN and no -0",
    exponent_bits=5,
    bias=16,
    infinity_code=None,
    nan_codes=frozenset({0x80}),
)

FORMATS: dict[str, Format] = {f.name: f for f in (E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ)}


def unknown_name(kind: str, name: object, known: list[str]) -> RecipeError:
    """Return the error for a name that is none of `known`, with the nearest match."""
    hint = did_you_mean(name, known)
    return RecipeError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}{hint}")


def get_format(name: str) -> Format:
    """Return the format of this name.

    Raises:
        RecipeError: No such format; the message names the nearest.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise unknown_name("format", name, list(FORMATS))
    return FORMATS[name]
