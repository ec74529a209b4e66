import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp import E4M3FN, E4M3FNUZ, E5M2, FORMATS, Format
from unclamp.reference import (
    SCALE_MAX,
    SCALE_MIN,
    float32,
    is_saturated,
    round_to_format,
    round_unbounded,
    scale_from_amax,
)

formats = st.sampled_from(list(FORMATS.values()))
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


# Golden roundings of shared/facts.md.
@pytest.mark.parametrize(
    ("fmt", "value", "expected"),
    [
        (E4M3FN, 2.0**-10, 0.0),
        (E4M3FN, 0.0009766, 2.0**-9),
        (E4M3FN, 0.0029296875, 0.00390625),
        (E4M3FN, 17.0, 16.0),
        (E4M3FN, 19.0, 20.0),
        (E4M3FN, 432.0, 448.0),
        (E4M3FN, 447.0, 448.0),
        (E4M3FN, 464.0, 448.0),
        (E4M3FN, 1e30, 448.0),
        (E4M3FN, math.inf, 448.0),
        (E4M3FN, -math.inf, -448.0),
        (E5M2, 7.6293945e-6, 0.0),
        (E5M2, 9.0, 8.0),
        (E5M2, 11.0, 12.0),
        (E5M2, 53248.0, 49152.0),
        (E5M2, 57343.0, 57344.0),
        (E5M2, 61440.0, 57344.0),
        (E5M2, 1e30, 57344.0),
        (E5M2, math.inf, 57344.0),
    ],
)
def test_golden_roundings(fmt: Format, value: float, expected: float) -> None:
    assert round_to_format(value, fmt) == expected


@pytest.mark.parametrize(("amax", "power_of_two"), [(1.0, 256.0), (3.0, 128.0), (449.0, 0.5)])
def test_golden_scales(amax: float, power_of_two: float) -> None:
    scale = scale_from_amax(amax, E4M3FN)
    assert scale == np.float32(448) / np.float32(amax)
    assert scale_from_amax(amax, E4M3FN, power_of_two=True) == power_of_two


def test_golden_decimal_scales() -> None:
    assert scale_from_amax(1, E4M3FN) == 448
    assert scale_from_amax(3, E4M3FN) == pytest.approx(149.33333, abs=1e-5)
    assert scale_from_amax(449, E4M3FN) == pytest.approx(0.99777281, abs=1e-8)


@pytest.mark.parametrize("amax", [0.0, math.nan, math.inf])
def test_an_amax_that_says_nothing_keeps_the_previous_scale(amax: float) -> None:
    assert scale_from_amax(amax, E4M3FN, previous=3.5) == 3.5
    assert scale_from_amax(amax, E4M3FN) == 1


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_overflow_limit_and_its_neighbour_decide_saturation(fmt: Format) -> None:
    beyond = float(np.nextafter(np.float32(fmt.overflow_limit), np.float32(np.inf)))
    for sign in (1, -1):
        assert not is_saturated(sign * fmt.overflow_limit, fmt)
        assert is_saturated(sign * beyond, fmt)


def test_neither_infinity_nor_nan_counts_as_saturated() -> None:
    assert not is_saturated(math.inf, E4M3FN)
    assert not is_saturated(math.nan, E4M3FN)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_every_finite_value_of_a_format_rounds_to_itself(fmt: Format) -> None:
    for code in range(256):
        value = fmt.decode(code)
        if math.isfinite(value):
            assert round_to_format(value, fmt) == value
            assert not is_saturated(value, fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_tie_goes_to_the_even_code(fmt: Format) -> None:
    for code in range(fmt.max_code):
        tie = (fmt.decode(code) + fmt.decode(code + 1)) / 2
        assert round_to_format(tie, fmt) == fmt.decode(code + code % 2)


def test_zero_keeps_its_sign_only_where_the_format_has_one() -> None:
    assert math.copysign(1, round_to_format(-0.0, E4M3FN)) == -1
    assert math.copysign(1, round_to_format(-1e-30, E4M3FN)) == -1
    assert math.copysign(1, round_to_format(-0.0, E4M3FNUZ)) == 1
    assert math.copysign(1, round_to_format(-1e-30, E4M3FNUZ)) == 1


def test_nan_stays_nan() -> None:
    assert math.isnan(round_to_format(math.nan, E5M2))
    assert math.isnan(round_unbounded(math.nan, E5M2))


@given(value=st.floats(allow_nan=False, allow_infinity=False), fmt=formats)
def test_unbounded_rounding_is_within_half_an_ulp(value: float, fmt: Format) -> None:
    rounded = round_unbounded(value, fmt)
    exponent = max(math.frexp(value)[1] - 1, fmt.min_exponent)
    if math.isfinite(rounded):
        assert abs(rounded - value) <= math.ldexp(0.5, exponent - fmt.mantissa_bits)


@given(value=any_float32, fmt=formats)
def test_rounding_is_idempotent_and_odd(value: float, fmt: Format) -> None:
    rounded = round_to_format(value, fmt)
    assert round_to_format(rounded, fmt) == rounded
    assert round_to_format(-value, fmt) == -rounded


@given(a=any_float32, b=any_float32, fmt=formats)
def test_rounding_is_monotone(a: float, b: float, fmt: Format) -> None:
    low, high = sorted((a, b))
    assert round_to_format(low, fmt) <= round_to_format(high, fmt)


@given(value=st.floats(allow_nan=False))
def test_float32_is_that_of_numpy(value: float) -> None:
    with np.errstate(over="ignore"):
        assert float32(value) == np.float32(value)


@given(amax=st.floats(min_value=0, allow_infinity=False), margin=st.integers(0, 64), fmt=formats)
def test_a_scale_and_its_inverse_are_normal(amax: float, margin: int, fmt: Format) -> None:
    scale = scale_from_amax(amax, fmt, margin=margin)
    assert SCALE_MIN <= scale <= SCALE_MAX
    assert float32(1 / scale) >= 2.0**-126


@given(amax=any_float32.map(abs).filter(bool), margin=st.integers(0, 64), fmt=formats)
def test_a_power_of_two_is_the_quotient_rounded_down(amax: float, margin: int, fmt: Format) -> None:
    scale = scale_from_amax(amax, fmt, margin=margin, power_of_two=True)
    quotient = Fraction(fmt.max) / Fraction(amax) / 2**margin
    expected = min((n for n in range(-126, 127) if 2 * Fraction(2) ** n > quotient), default=126)
    assert scale == 2.0**expected
    assert Fraction(amax) * Fraction(scale) <= Fraction(fmt.max)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_quotient_that_is_a_power_of_two_is_kept_and_the_next_amax_halves_it(fmt: Format) -> None:
    for exponent in range(-30, 30):
        amax = fmt.max * 2.0**exponent
        above = float(np.nextafter(np.float32(amax), np.float32(np.inf)))
        below = float(np.nextafter(np.float32(amax), np.float32(0)))
        scales = [scale_from_amax(a, fmt, power_of_two=True) for a in (below, amax, above)]
        assert scales == [2.0**-exponent, 2.0**-exponent, 2.0 ** -(exponent + 1)]


def test_a_power_of_two_does_not_overflow_where_the_logarithm_of_a_quotient_is_rounded_up() -> None:
    # torchao: exp2(floor(log2(scale))) in float32 (torchao.float8.float8_utils).
    amax = np.nextafter(np.float32(3.5), np.float32(np.inf))
    by_logarithm = np.exp2(np.floor(np.log2(np.float32(448) / amax)))
    assert Fraction(float(by_logarithm)) * Fraction(float(amax)) > 448
    assert scale_from_amax(float(amax), E4M3FN, power_of_two=True) == by_logarithm / 2


@pytest.mark.parametrize("margin", [0, 64])
@pytest.mark.parametrize("amax", [5e-324, 1e-320, 2.0**-149, 1.0, 3.4e38, 1e300])
def test_any_float_has_a_power_of_two(amax: float, margin: int) -> None:
    scale = scale_from_amax(amax, E4M3FN, margin=margin, power_of_two=True)
    assert SCALE_MIN <= scale <= SCALE_MAX
    assert math.frexp(scale)[0] == 0.5


@pytest.mark.parametrize("amax", [0.0, math.nan, math.inf])
def test_a_previous_scale_is_kept_whether_or_not_it_is_a_power_of_two(amax: float) -> None:
    assert scale_from_amax(amax, E4M3FN, power_of_two=True, previous=3.5) == 3.5
    assert scale_from_amax(amax, E4M3FN, power_of_two=True) == 1
