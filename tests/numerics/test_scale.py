import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unclamp.formats import E4M3FN, E5M2, FORMATS, Format
from unclamp.numerics import channel_scale, dequantize, quantize, scale_from_amax
from unclamp.reference import SCALE_MAX, SCALE_MIN, float32
from unclamp.reference import scale_from_amax as reference

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
TINY = torch.finfo(torch.float32).tiny
HUGE = torch.finfo(torch.float32).max


def wild_amaxes(count: int) -> torch.Tensor:
    bits = np.random.default_rng(0).integers(0, 0x7F800000, count, dtype=np.uint32)
    ends = [2.0**-149, 2.0**-148, TINY / 2, TINY, 2.0**-120, 2.0**-118, 448 * 2.0**-126, 1, HUGE]
    return torch.cat([torch.from_numpy(bits.view(np.float32)), torch.tensor(ends)])


@pytest.mark.parametrize("margin", [0, 1, 7, 33, 64])
@every_format
def test_scale_equals_the_reference_bit_for_bit(fmt, margin):
    amax = wild_amaxes(20_000)
    expected = [reference(a, fmt, margin=margin) for a in amax.to(torch.float64).tolist()]
    got = scale_from_amax(amax, fmt.max, margin=margin)
    assert got.dtype == torch.float32
    assert got.to(torch.float64).tolist() == expected
    columns = scale_from_amax(
        amax, torch.full_like(amax, fmt.max), margin=torch.full_like(amax, margin)
    )
    assert torch.equal(got, columns)


@pytest.mark.parametrize("margin", [0, 64])
@every_format
def test_scale_and_its_inverse_are_normal(fmt, margin):
    scale = scale_from_amax(wild_amaxes(50_000), fmt.max, margin=margin)
    for values in (scale, scale.reciprocal()):
        assert bool((values >= TINY).all())
        assert bool((values <= HUGE).all())
    assert bool((scale >= SCALE_MIN).all())
    assert bool((scale <= SCALE_MAX).all())


@pytest.mark.parametrize("margin", [0, 1, 10, 64])
@every_format
def test_the_largest_element_lands_at_or_below_the_margin(fmt, margin):
    amax = wild_amaxes(50_000)
    landed = amax.to(torch.float64) * scale_from_amax(amax, fmt.max, margin=margin)
    at_least = amax.to(torch.float64) * SCALE_MIN
    target = torch.clamp(at_least, min=fmt.max * 2.0**-margin)
    assert bool((landed <= target * (1 + 2.0**-23)).all())


@pytest.mark.parametrize("amax", [0.0, -0.0, math.nan, math.inf])
def test_an_amax_that_says_nothing_keeps_the_previous_scale(amax):
    assert scale_from_amax(torch.tensor(amax), 448.0) == reference(amax, E4M3FN) == 1
    kept = scale_from_amax(torch.tensor(amax), 448.0, previous=torch.tensor(3.5))
    assert kept == reference(amax, E4M3FN, previous=3.5) == 3.5


@pytest.mark.parametrize(
    ("amax", "expected"), [(1, 448), (3, 149.33333), (449, 0.99777281), (2, 224), (0.25, 1792)]
)
def test_the_golden_scales(amax, expected):
    got = float(scale_from_amax(torch.tensor(float(amax)), 448.0))
    assert got == reference(float(amax), E4M3FN) == float32(448 / amax)
    assert got == pytest.approx(expected, rel=1e-7)


def test_settings_broadcast_row_by_row():
    got = scale_from_amax(
        torch.tensor([1.0, 2.0, 0.0]),
        torch.tensor([448.0, 57344.0, 240.0]),
        margin=torch.tensor([0.0, 2.0, 1.0]),
        previous=torch.tensor([9.0, 9.0, 9.0]),
    )
    assert got.tolist() == [448.0, 7168.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_amax_of_any_dtype_gives_a_float32_scale(dtype):
    scale = scale_from_amax(torch.tensor(3.0, dtype=dtype), 448.0)
    assert scale.dtype == torch.float32
    assert scale == float32(448 / 3)


def test_empty_in_empty_out():
    assert scale_from_amax(torch.zeros(0), 448.0).shape == (0,)


# ---- tiny tensors -----------------------------------------------------------------------------


def transformer_engines(amax: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the scales of Transformer Engine: the largest float32 where the quotient is Inf."""
    with np.errstate(over="ignore"):
        scale = np.float32(fmt.max) / amax
    return np.where(np.isinf(scale), np.finfo(np.float32).max, scale)


@pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda fmt: fmt.name)
def test_scales_are_transformer_engines_but_for_tiny_tensors_whose_inverse_it_lets_be_subnormal(
    fmt: Format,
) -> None:
    amax = wild_amaxes(50_000)
    theirs = torch.from_numpy(transformer_engines(amax.numpy(), fmt))
    ours = scale_from_amax(amax, fmt.max)
    tiny = amax.to(torch.float64) < fmt.max * 2.0**-126
    assert 0 < int(tiny.sum()) < len(amax)
    usual = ~tiny & (theirs >= TINY)  # at the other end their scale itself is subnormal
    assert torch.equal(ours[usual], theirs[usual])
    assert bool((theirs[tiny] > 2.0**126).all())
    assert bool((1 / theirs[tiny].to(torch.float64) < TINY).all())
    assert bool((ours[tiny] == 2.0**126).all())


@pytest.mark.parametrize(
    ("fmt", "half_step", "zero_from"),
    [(E4M3FN, 2.0**-4, 2.0**-136), (E5M2, 2.0**-3, 2.0**-143)],
    ids=["e4m3fn", "e5m2"],
)
def test_what_remains_of_a_tiny_tensor(fmt: Format, half_step: float, zero_from: float) -> None:
    for amax in (TINY, 1.1 * TINY, 1e-37, fmt.max * 2.0**-127):  # normal: all digits of the largest
        x = torch.tensor([amax, -amax])
        error = (dequantize(quantize(x, fmt)) - x).to(torch.float64).abs() / amax
        assert bool((error <= half_step).all())
    for amax, is_zero in ((zero_from, True), (2 * zero_from, False)):
        x = torch.tensor([amax, -amax])
        assert bool((dequantize(quantize(x, fmt)) == 0).all()) == is_zero


# ---- powers of two -------------------------------------------------------------------------


def positive(dtype: torch.dtype) -> Tensor:
    """Every positive finite value of a 16-bit dtype, subnormals too."""
    values = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[(values > 0) & values.isfinite()]


def tie_amaxes() -> Tensor:
    """Amaxes whose quotient is a power of two, and their float32 neighbours."""
    exponents = np.arange(-140, 119)
    exact = np.concatenate([[np.ldexp(f.max, exponents)] for f in FORMATS.values()]).ravel()
    exact = exact[exact < float(HUGE)].astype(np.float32)
    below, above = (np.nextafter(exact, np.float32(end)) for end in (0, 3e38))
    return torch.from_numpy(np.concatenate([below, exact, above]))


POOLS = {
    "float16": positive(torch.float16),
    "bfloat16": positive(torch.bfloat16),
    "float32": wild_amaxes(5_000),
    "ties": tie_amaxes(),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("margin", [0, 1, 64])
@every_format
def test_a_power_of_two_equals_the_reference_bit_for_bit(fmt, margin, pool):
    amax = POOLS[pool]
    values = amax.to(torch.float64).tolist()
    expected = [reference(a, fmt, margin=margin, power_of_two=True) for a in values]
    got = scale_from_amax(amax, fmt.max, margin=margin, power_of_two=True)
    assert got.dtype == torch.float32
    assert got.tolist() == expected


@pytest.mark.parametrize("margin", range(65))
@every_format
def test_every_margin_divides_the_power_of_two_exactly(fmt, margin):
    amax = torch.cat([wild_amaxes(200), tie_amaxes()[::37]])
    whole = scale_from_amax(amax, fmt.max, power_of_two=True).to(torch.float64)
    got = scale_from_amax(amax, fmt.max, margin=margin, power_of_two=True)
    expected = (whole * 2.0**-margin).clamp(SCALE_MIN, SCALE_MAX)
    free = whole < SCALE_MAX
    assert torch.equal(got[free].to(torch.float64), expected[free])
    values = amax.to(torch.float64).tolist()
    assert got.tolist() == [reference(a, fmt, margin=margin, power_of_two=True) for a in values]


@given(
    bits=st.integers(1, 0x7F7FFFFF),
    fmt=st.sampled_from(list(FORMATS.values())),
    margin=st.integers(0, 64),
)
def test_a_power_of_two_is_the_largest_that_does_not_overflow(bits, fmt, margin):
    amax = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    scale = float(scale_from_amax(amax, fmt.max, margin=margin, power_of_two=True))
    assert scale == reference(float(amax), fmt, margin=margin, power_of_two=True)
    assert math.frexp(scale)[0] == 0.5
    landed = Fraction(float(amax)) * Fraction(scale)
    assert landed <= Fraction(fmt.max)
    if SCALE_MIN < scale < SCALE_MAX:
        assert landed <= Fraction(fmt.max) / 2**margin < 2 * landed


@pytest.mark.parametrize("pool", ["bfloat16", "ties"])
@every_format
def test_a_power_of_two_never_overflows_by_a_fraction(fmt, pool):
    amax = POOLS[pool]
    scale = scale_from_amax(amax, fmt.max, power_of_two=True)
    # float64 holds a product of two float32 exactly, and Fractions would take a minute.
    landed = amax.to(torch.float64) * scale.to(torch.float64)
    assert bool((landed <= fmt.max).all())
    limited = scale == SCALE_MAX
    assert bool((landed[~limited] * 2 > fmt.max).all())


@pytest.mark.parametrize("margin", [0, 64])
@every_format
def test_an_inverse_power_of_two_is_an_e8m0_number(fmt, margin):
    amax = torch.cat([wild_amaxes(5_000), tie_amaxes()])
    inverse = scale_from_amax(amax, fmt.max, margin=margin, power_of_two=True).reciprocal()
    stored = inverse.to(torch.float8_e8m0fnu)
    assert torch.equal(stored.to(torch.float32), inverse)
    biased = stored.view(torch.uint8).to(torch.float64)
    assert torch.equal(torch.exp2(biased - 127), inverse.to(torch.float64))


@pytest.mark.parametrize(("amax", "expected"), [(1.0, 256.0), (3.0, 128.0), (449.0, 0.5)])
def test_the_golden_powers_of_two(amax, expected):
    assert scale_from_amax(torch.tensor(amax), 448.0, power_of_two=True) == expected


@pytest.mark.parametrize("amax", [0.0, -0.0, math.nan, math.inf])
def test_an_amax_that_says_nothing_keeps_any_previous_scale(amax):
    kept = torch.tensor(3.5)
    assert scale_from_amax(torch.tensor(amax), 448.0, power_of_two=True, previous=kept) == 3.5
    assert scale_from_amax(torch.tensor(amax), 448.0, power_of_two=True) == 1
    assert reference(amax, E4M3FN, power_of_two=True, previous=3.5) == 3.5


def test_each_row_can_choose_powers_of_two_for_itself():
    amax = wild_amaxes(2_000)
    chosen = torch.arange(len(amax)) % 3 == 0
    margin = torch.arange(len(amax)) % 5
    maximum = torch.where(torch.arange(len(amax)) % 2 == 0, E4M3FN.max, E5M2.max)
    got = scale_from_amax(amax, maximum, margin=margin, power_of_two=chosen)
    both = [
        scale_from_amax(amax, maximum, margin=margin, power_of_two=each) for each in (True, False)
    ]
    assert torch.equal(got, torch.where(chosen, *both))
    assert bool((got != both[1])[chosen].any())


# ---- channels ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_channels_amax_comes_into_the_last_octave_and_products_are_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    low, high = (-12, 14) if dtype == torch.float16 else (-100, 100)
    exponents = torch.arange(low, high).to(torch.float32)
    x = (torch.randn(33, len(exponents), generator=generator) * torch.exp2(exponents)).to(dtype)
    scale = channel_scale(x)
    assert (scale.dtype, scale.shape) == (torch.float32, (len(exponents),))
    amax = x.to(torch.float64).abs().amax(0) * scale
    assert bool(((amax > 0.5) & (amax <= 1)).all())
    wide = x.to(torch.float32)
    assert torch.equal((wide * scale).to(torch.float64), wide.to(torch.float64) * scale)
    assert torch.equal(wide * scale / scale, wide)
    assert torch.equal(scale.reciprocal().reciprocal(), scale)


def test_an_amax_of_a_power_of_two_comes_to_one_exactly():
    x = torch.exp2(torch.arange(-120.0, 126.0)).unsqueeze(0)
    assert torch.equal(x * channel_scale(x), torch.ones_like(x))
    above = torch.nextafter(x, torch.tensor(torch.inf))
    assert bool((above * channel_scale(above) <= 0.5 + 2.0**-23).all())


def test_the_smallest_and_largest_channels_get_a_scale_that_is_normal():
    scale = channel_scale(torch.tensor([[2.0**-149, HUGE, TINY, 2.0**-126 / 3]]))
    assert scale.tolist() == [SCALE_MAX, SCALE_MIN, SCALE_MAX, SCALE_MAX]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_has_no_say_in_a_channel(dtype):
    columns = [[3.0, math.nan], [math.inf, 0.3], [-math.inf, math.nan], [0.0, -0.0], [-5.0, 1.0]]
    x = torch.tensor(columns).t().to(dtype)
    assert channel_scale(x).tolist() == [0.25, 2, 1, 1, 0.125]


def test_without_tokens_or_channels_there_is_nothing_to_scale():
    assert channel_scale(torch.zeros(0, 3)).tolist() == [1, 1, 1]
    assert channel_scale(torch.zeros(3, 0)).shape == (0,)
    assert channel_scale(torch.zeros(0, 0, dtype=torch.bfloat16)).shape == (0,)
