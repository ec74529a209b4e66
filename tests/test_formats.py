import math

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import decode_float

from oracles import GFLOAT
from unclamp.errors import RecipeError
from unclamp.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, Format, get_format
from unclamp.reference import float32, is_saturated

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def decoded(fmt: Format) -> np.ndarray:
    return np.array([fmt.decode(code) for code in range(256)])


def assert_same_floats(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal in value and sign of zero; any NaN equals any NaN."""
    np.testing.assert_array_equal(got, expected)
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[real]), np.signbit(expected[real]))


@pytest.mark.parametrize(
    ("fmt", "largest", "smallest_normal", "smallest", "limit", "codes"),
    [
        (E4M3FN, 448, 2.0**-6, 2.0**-9, 464.0, (0x7E, None, {0x7F, 0xFF})),
        (E5M2, 57344, 2.0**-14, 2.0**-16, 61439.99609375, (0x7B, 0x7C, None)),
        (E4M3FNUZ, 240, 2.0**-7, 2.0**-10, 247.9999847412109375, (0x7F, None, {0x80})),
        (E5M2FNUZ, 57344, 2.0**-15, 2.0**-17, 61439.99609375, (0x7F, None, {0x80})),
    ],
    ids=FORMATS,
)
def test_the_golden_table(fmt, largest, smallest_normal, smallest, limit, codes):
    max_code, infinity_code, nan_codes = codes
    assert fmt.max == largest
    assert fmt.min_normal == smallest_normal
    assert fmt.min_subnormal == smallest
    assert fmt.overflow_limit == limit
    assert fmt.max_code == max_code
    assert fmt.infinity_code == infinity_code
    if nan_codes is not None:
        assert fmt.nan_codes == nan_codes


@every_format
def test_every_code_decodes_as_in_torch(fmt):
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{fmt.name}"))
    assert_same_floats(decoded(fmt), codes.to(torch.float64).numpy())


@every_format
def test_every_code_decodes_as_in_ml_dtypes(fmt):
    codes = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f"float8_{fmt.name}"))
    assert_same_floats(decoded(fmt), codes.astype(np.float64))


@every_format
def test_every_code_decodes_as_in_gfloat(fmt):
    info = GFLOAT[fmt.name]
    assert_same_floats(decoded(fmt), np.array([decode_float(info, c).fval for c in range(256)]))


@every_format
def test_the_extremes_are_those_of_torch(fmt):
    info = torch.finfo(getattr(torch, f"float8_{fmt.name}"))
    assert (fmt.max, fmt.min_normal) == (info.max, info.smallest_normal)


@every_format
def test_positive_codes_increase_with_their_value(fmt):
    values = [fmt.decode(code) for code in range(fmt.max_code + 1)]
    assert values == sorted(set(values))
    assert values[0] == 0
    assert values[1] == fmt.min_subnormal
    assert values[-1] == fmt.max


@every_format
def test_overflow_limit_is_the_last_float32_that_is_not_saturated(fmt):
    above = float(np.nextafter(np.float32(fmt.overflow_limit), np.float32(np.inf)))
    assert float32(fmt.overflow_limit) == fmt.overflow_limit
    assert not is_saturated(fmt.overflow_limit, fmt)
    assert is_saturated(above, fmt)
    assert is_saturated(-above, fmt)


@every_format
def test_only_the_formats_with_a_negative_zero_have_one(fmt):
    value = fmt.decode(0x80)
    assert fmt.has_negative_zero == (value == 0 and math.copysign(1, value) == -1)
    assert math.isnan(value) != fmt.has_negative_zero


@pytest.mark.parametrize("code", [-1, 256])
def test_a_code_that_is_no_byte_is_refused(code):
    with pytest.raises(ValueError, match=r"0\.\.255"):
        E4M3FN.decode(code)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("e4m3", "e4m3fn"),
        ("E4M3FN", "e4m3fn"),
        ("float8_e5m2", "e5m2"),
        ("e4m3fnu", "e4m3fnuz"),
        ("e5m2uz", "e5m2fnuz"),
    ],
)
def test_an_unknown_format_names_the_nearest(name, near):
    with pytest.raises(RecipeError, match=f"unknown format '{name}'.*did you mean '{near}'"):
        get_format(name)


@pytest.mark.parametrize("name", ["zzzz", "", None, 8, ["e5m2"]])
def test_a_name_like_no_format_lists_them_without_a_guess(name):
    with pytest.raises(RecipeError, match="expected one of e4m3fn, e5m2") as error:
        get_format(name)
    assert name in (["e5m2"],) or "did you mean" not in str(error.value)
