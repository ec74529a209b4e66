import math

import numpy as np
import pytest
import torch

from unclamp.formats import E4M3FN, FORMATS
from unclamp.numerics import scale_from_amax
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
