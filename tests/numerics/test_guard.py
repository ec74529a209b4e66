"""The guarded cast: the given scale where it loses nothing to saturation, else the true one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unclamp import E4M3FN, FORMATS
from unclamp.numerics import Quantized, Stat, block_grid, quantize, scale_from_amax
from unclamp.numerics.blocks import orient
from unclamp.reference import SCALE_MAX, SCALE_MIN
from unclamp.scaling import MX, Granularity, PerBlock, PerRow, PerTensor

GRANULARITIES = (PerTensor(), PerRow(), PerBlock(1, 16), PerBlock(16, 16), PerBlock(3, 5), MX())
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
each_block = pytest.mark.parametrize("granularity", GRANULARITIES[1:], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
each_axis = pytest.mark.parametrize("axis", [0, 1])
formats = st.sampled_from(list(FORMATS.values()))


def same(a: Quantized, b: Quantized, *, but: tuple[Stat, ...] = ()) -> bool:
    """Whether casts are equal bit for bit, some statistics aside."""
    kept = [stat for stat in Stat if stat not in but]
    return (
        torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
        and torch.equal(a.scale_inv, b.scale_inv)
        and torch.equal(a.amax, b.amax)
        and torch.equal(a.stats[kept], b.stats[kept])
    )


def scales_for(x: Tensor, granularity: Granularity, axis: int, value: float) -> Tensor:
    if isinstance(granularity, PerTensor):
        return torch.tensor(value)
    return torch.full(grid_of(x, granularity, axis), value)


def grid_of(x: Tensor, granularity: Granularity, axis: int) -> tuple[int, int]:
    rows, columns = orient(x, axis).shape
    return block_grid(rows, columns, granularity.block)


def up(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


# ---- one scale -----------------------------------------------------------------------------


@each_dtype
@each_axis
@each_granularity
@each_format
def test_where_nothing_would_saturate_it_is_the_plain_cast(fmt, granularity, axis, dtype):
    x = torch.randn(17, 37).to(dtype)
    scale = scales_for(x, granularity, axis, fmt.max / 8)
    plain = quantize(x, fmt, scale, granularity=granularity, axis=axis)
    guarded = quantize(x, fmt, scale, granularity=granularity, axis=axis, guard=True)
    assert plain.stats[Stat.SATURATED] == 0
    assert same(plain, guarded)
    assert guarded.stats[Stat.RECAST] == 0


@pytest.mark.parametrize("margin", [0, 5])
@pytest.mark.parametrize("p2", [True, False])
@each_dtype
@each_format
def test_where_something_would_saturate_it_is_the_dynamic_cast_without_margin(
    fmt, dtype, p2, margin
):
    x = torch.randn(17, 37).to(dtype)
    scale = torch.tensor(fmt.max * 3)
    guarded = quantize(x, fmt, scale, margin=margin, power_of_two=p2, guard=True)
    assert quantize(x, fmt, scale).stats[Stat.SATURATED] > 0
    assert same(guarded, quantize(x, fmt, power_of_two=p2), but=(Stat.RECAST,))
    assert guarded.stats[Stat.RECAST] == 1
    assert guarded.stats[Stat.SATURATED] == guarded.stats[Stat.SATURATED_SQUARE] == 0


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**20])
@pytest.mark.parametrize("sign", [1, -1])
@each_format
def test_the_overflow_limit_itself_is_not_cast_again_and_the_next_float32_is(fmt, sign, scale):
    for value, recast in ((fmt.overflow_limit, 0), (up(fmt.overflow_limit), 1)):
        x = torch.tensor([sign * value, 1.0, 0.0]) / scale
        plain = quantize(x, fmt, torch.tensor(scale))
        guarded = quantize(x, fmt, torch.tensor(scale), guard=True)
        assert plain.stats[Stat.SATURATED] == guarded.stats[Stat.RECAST] == recast
        assert same(guarded, quantize(x, fmt) if recast else plain, but=(Stat.RECAST,))


def test_464_is_kept_and_the_next_float32_is_cast_again():
    kept = quantize(torch.tensor([464.0]), E4M3FN, torch.tensor(1.0), guard=True)
    again = quantize(torch.tensor([up(464.0)]), E4M3FN, torch.tensor(1.0), guard=True)
    assert (kept.scale_inv, kept.stats[Stat.RECAST]) == (1, 0)
    assert again.scale_inv == pytest.approx(464 / 448)
    assert (again.stats[Stat.RECAST], again.stats[Stat.SATURATED]) == (1, 0)


def test_a_product_that_float32_rounds_to_the_limit_is_judged_after_rounding():
    # 3 * fl(464/3) is not 464 exactly; what the cast multiplies decides, and nothing else.
    for value in (464.0 / 3, up(464.0 / 3), 464.0 / 7):
        for scale in (3.0, 7.0, up(3.0)):
            x = torch.tensor([value])
            plain = quantize(x, E4M3FN, torch.tensor(scale))
            guarded = quantize(x, E4M3FN, torch.tensor(scale), guard=True)
            assert plain.stats[Stat.SATURATED] == guarded.stats[Stat.RECAST]


def test_a_product_beyond_float32_is_cast_again():
    x = torch.tensor([3e38, -1.0])
    guarded = quantize(x, E4M3FN, torch.tensor(1e30), guard=True)
    assert same(guarded, quantize(x, E4M3FN), but=(Stat.RECAST,))
    assert guarded.stats[Stat.RECAST] == 1


@pytest.mark.parametrize("values", [[1e30, 2.0], [0.0], [], [math.nan]])
def test_nothing_measured_yet_seeds_and_is_not_cast_again(values):
    x = torch.tensor(values)
    seeded = quantize(x, E4M3FN, torch.tensor(0.0), guard=True)
    assert same(seeded, quantize(x, E4M3FN))
    assert seeded.stats[Stat.RECAST] == 0


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@each_granularity
def test_what_is_not_finite_never_has_a_tensor_cast_again(granularity, special):
    x = torch.randn(17, 37)
    x[3, 5] = special
    scale = scales_for(x, granularity, 1, 50.0)
    plain = quantize(x, E4M3FN, scale, granularity=granularity)
    guarded = quantize(x, E4M3FN, scale, granularity=granularity, guard=True)
    assert same(plain, guarded)
    assert guarded.stats[Stat.RECAST] == 0
    assert guarded.stats[Stat.NONFINITE] == 1


@pytest.mark.parametrize("values", [[], [0.0, -0.0], [math.nan], [math.inf, -math.inf]])
def test_without_a_nonzero_finite_element_the_given_scale_stays(values):
    guarded = quantize(torch.tensor(values), E4M3FN, torch.tensor(8.0), guard=True)
    assert guarded.scale_inv == 0.125
    assert guarded.stats[Stat.RECAST] == guarded.stats[Stat.SATURATED] == 0


# ---- a scale a block -----------------------------------------------------------------------


@each_axis
@each_block
@each_format
def test_only_blocks_that_overflow_change_their_scale(fmt, granularity, axis):
    rng = np.random.default_rng(0)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    grid = grid_of(x, granularity, axis)
    scale = torch.from_numpy((fmt.max / 4 * 2 ** rng.uniform(-3, 3, grid)).astype(np.float32))
    scale[0, 0] = 0
    settings = {"granularity": granularity, "axis": axis}
    own = quantize(x, fmt, **settings)
    over = own.amax * scale > fmt.overflow_limit
    assert 0 < over.sum() < over.numel() - 1
    own_scale = scale_from_amax(own.amax, fmt.max, power_of_two=isinstance(granularity, MX))
    chosen = torch.where(over | (scale == 0), own_scale, scale)
    guarded = quantize(x, fmt, scale, guard=True, **settings)
    assert same(guarded, quantize(x, fmt, chosen, **settings), but=(Stat.RECAST,))
    assert guarded.stats[Stat.RECAST] == 1
    assert guarded.stats[Stat.SATURATED] == 0


@each_axis
def test_each_row_is_guarded_as_a_tensor_of_its_own(axis):
    x = torch.randn(9, 9) * 2.0 ** torch.arange(9)
    scale = torch.full((9, 1), 40.0)
    whole = quantize(x, E4M3FN, scale, granularity=PerRow(), axis=axis, guard=True)
    each = [quantize(row, E4M3FN, scale[0, 0], guard=True) for row in orient(x, axis)]
    codes = orient(whole.codes.view(torch.uint8), axis)
    assert torch.equal(codes, torch.stack([q.codes.view(torch.uint8) for q in each]))
    assert torch.equal(whole.scale_inv[:, 0], torch.stack([q.scale_inv for q in each]))
    assert whole.stats[Stat.RECAST] == max(int(q.stats[Stat.RECAST]) for q in each) == 1


def test_a_block_that_is_cast_again_under_mx_gets_a_power_of_two():
    x = torch.randn(4, 64) * 100
    scale = torch.tensor([[1.0, 64], [64, 1], [1, 1], [64, 64]])
    guarded = quantize(x, E4M3FN, scale, granularity=MX(), guard=True)
    own = quantize(x, E4M3FN, granularity=MX())
    assert torch.equal(guarded.scale_inv, torch.where(scale == 64, own.scale_inv, 1))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)])
@each_granularity
def test_empty_and_single_elements(granularity, shape):
    x = torch.full(shape, 500.0)
    scale = scales_for(x, granularity, 1, 1.0)
    guarded = quantize(x, E4M3FN, scale, granularity=granularity, guard=True)
    assert guarded.stats[Stat.RECAST] == (x.numel() == 1)
    assert guarded.codes.shape == shape


# ---- properties ----------------------------------------------------------------------------

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
positive = st.floats(SCALE_MIN, SCALE_MAX, width=32)


@settings(max_examples=300)
@given(
    xs=st.lists(numbers | st.floats(-1000, 1000, width=32), max_size=30),
    scale=positive | st.floats(0.125, 64, width=32),
    fmt=formats,
    margin=st.integers(0, 64),
    p2=st.booleans(),
)
def test_no_finite_element_is_ever_saturated(xs, scale, fmt, margin, p2):
    x, given_scale = torch.tensor(xs), torch.tensor(scale)
    guarded = quantize(x, fmt, given_scale, margin=margin, power_of_two=p2, guard=True)
    plain = quantize(x, fmt, given_scale)
    assert guarded.stats[Stat.SATURATED] == guarded.stats[Stat.SATURATED_SQUARE] == 0
    assert guarded.stats[Stat.RECAST] == (plain.stats[Stat.SATURATED] > 0)
    own = quantize(x, fmt, power_of_two=p2)
    assert same(guarded, own if guarded.stats[Stat.RECAST] else plain, but=(Stat.RECAST,))


@settings(max_examples=150)
@given(
    size=st.tuples(st.integers(0, 9), st.integers(0, 40)),
    granularity=st.sampled_from(GRANULARITIES),
    exponent=st.integers(-30, 30),
    fmt=formats,
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 10**6),
)
def test_no_finite_element_of_any_block_is_ever_saturated(
    size, granularity, exponent, fmt, axis, seed
):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal(size) * 2 ** rng.uniform(-20, 20, size))
    x = x.to(torch.float32)
    scale = scales_for(x, granularity, axis, 2.0**exponent)
    scale = scale * torch.as_tensor(2 ** rng.uniform(-9, 9, scale.shape)).to(torch.float32)
    settings = {"granularity": granularity, "axis": axis}
    first, again = (quantize(x, fmt, scale, guard=True, **settings) for _ in range(2))
    assert first.stats[Stat.SATURATED] == 0
    assert same(first, again)
    lost = quantize(x, fmt, scale, **settings).stats[Stat.SATURATED]
    assert first.stats[Stat.RECAST] == (lost > 0)


@pytest.mark.parametrize("scale", [50.0, 1e4])
@each_granularity
def test_layout_and_repetition_change_nothing(granularity, scale):
    base = torch.randn(64, 34)
    settings = {"granularity": granularity, "guard": True}
    for view in (base, base.t(), base[::2, 1::3], base[:1].expand(5, 34)):
        scales = scales_for(view, granularity, 1, scale)
        before = view.clone(), scales.clone()
        first = quantize(view, E4M3FN, scales, **settings)
        assert same(first, quantize(view.clone(), E4M3FN, scales, **settings))
        assert same(first, quantize(view, E4M3FN, scales, **settings))
        assert torch.equal(view, before[0])
        assert torch.equal(scales, before[1])
        assert first.stats[Stat.RECAST] == (scale == 1e4)


def test_the_guard_changes_nothing_without_a_given_scale():
    x = torch.randn(30) * 1e6
    assert same(quantize(x, E4M3FN, guard=True), quantize(x, E4M3FN))
