"""What clamping a gradient did to the weight's, against loops over elements, for every scale."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from unclamp import E4M3FN, E5M2, PerBlock, PerRow, PerTensor
from unclamp.numerics import CastPlan, GemmOperand, dequantize, plain_operand, quantize
from unclamp.numerics.gradient import change_of, look_at_gradient
from unclamp.numerics.inspection import (
    CHANGE_PRODUCT,
    CHANGE_SQUARE,
    GRADIENT_SQUARE,
    GRADIENTS,
)
from unclamp.numerics.quantize import quantize_by
from unclamp.numerics.stats import Stat
from unclamp.totals import GradientChange

GRANULARITIES = [PerTensor(), PerRow(), PerBlock(1, 4), PerBlock(3, 4), PerBlock(4, 4)]


def scale_at(scales: np.ndarray, block, axis: int, token: int, feature: int) -> float:
    """Return the scale of an element, by the block that it lies in."""
    if scales.ndim == 0:
        return float(scales)
    place = (token, feature) if axis == 1 else (feature, token)
    index = [0 if size is None else p // size for p, size in zip(place, block, strict=True)]
    return float(scales[index[0], index[1]])


def taken_away(dy: np.ndarray, scales: np.ndarray, block, axis: int, fmt) -> np.ndarray:
    """Return what clamping took of each element, one by one."""
    taken = np.zeros(dy.shape)
    for token in range(dy.shape[0]):
        for feature in range(dy.shape[1]):
            value, scale = float(dy[token, feature]), scale_at(scales, block, axis, token, feature)
            scaled = abs(float(np.float32(value) * np.float32(scale)))
            if math.isfinite(value) and scaled > fmt.overflow_limit:
                taken[token, feature] = value - math.copysign(fmt.max / scale, value)
    return taken


@given(
    tokens=st.integers(1, 9),
    features=st.integers(1, 7),
    width=st.integers(1, 6),
    granularity=st.sampled_from(GRANULARITIES),
    axis=st.sampled_from([0, 1]),
    fmt=st.sampled_from([E4M3FN, E5M2]),
    x_granularity=st.sampled_from(GRANULARITIES),
    excess=st.floats(0.01, 30),
    seed=st.integers(0, 2**20),
)
def test_the_sums_are_those_of_loops_over_elements(
    tokens, features, width, granularity, axis, fmt, x_granularity, excess, seed
):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, features, generator=generator)
    x = torch.randn(tokens, width, generator=generator)
    grid = quantize(dy, fmt, granularity=granularity, axis=axis).scale_inv.shape
    # Powers of two: the inverse of an inverse is the scale, and no element lies at a border.
    scale = torch.exp2(torch.randint(-2, 3, grid, generator=generator)) * 2.0 ** math.floor(
        math.log2(fmt.max * excess)
    )
    plan = CastPlan(format=fmt, granularity=granularity)
    q = quantize_by(dy, plan, scale, axis)
    x_q = quantize(x, E4M3FN, granularity=x_granularity, axis=0)
    computed = torch.randn(features, width, generator=generator)
    operand = x_q.along(0)
    looked = look_at_gradient(dy, q.scale_inv, q.stats, plan, axis, operand, computed, None)

    taken = taken_away(dy.numpy(), scale.numpy(), granularity.block, axis, fmt)
    assert int(q.stats[Stat.SATURATED]) == np.count_nonzero(taken)
    change = taken.T @ dequantize(x_q).double().numpy()
    wide = computed.double().numpy()
    sums = (np.sum(wide**2), np.sum(change**2), np.sum(wide * change))
    sums = sums if taken.any() else (0, 0, 0)
    size = math.sqrt(sums[0] * sums[1])
    assert looked[GRADIENTS] == 1
    assert float(looked[GRADIENT_SQUARE]) == pytest.approx(sums[0], rel=1e-9)
    assert float(looked[CHANGE_SQUARE]) == pytest.approx(sums[1], rel=1e-4)
    assert float(looked[CHANGE_PRODUCT]) == pytest.approx(sums[2], rel=1e-4, abs=1e-5 * size)


def test_an_input_in_high_precision_is_multiplied_as_it_is():
    dy = torch.tensor([[1.0, 3.0], [0.5, -6.0]])
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    plan = CastPlan(format=E4M3FN)
    q = quantize_by(dy, plan, torch.tensor(448.0 / 2), 1)
    grad = dy.clamp(-2, 2).t() @ x
    looked = look_at_gradient(dy, q.scale_inv, q.stats, plan, 1, plain_operand(x, 0), grad, None)
    change = dy.t() @ x - grad  # of the second feature: 1 * x[0] - 4 * x[1]
    assert change.tolist() == [[0, 0, 0], [-15, -18, -21]]
    assert float(looked[CHANGE_SQUARE]) == 15**2 + 18**2 + 21**2
    assert float(looked[CHANGE_PRODUCT]) == float((grad * change).sum())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_give_what_those_with_a_clamped_element_give(granularity, dtype):
    """A device whose elements the host does not see gets all of them."""
    torch.manual_seed(0)
    dy, x = torch.randn(12, 8).to(dtype), torch.randn(12, 5)
    plan = CastPlan(format=E5M2, granularity=granularity)
    grid = quantize(dy, E5M2, granularity=granularity, axis=0).scale_inv.shape
    q = quantize_by(dy, plan, torch.full(grid, 2.0**15), 0)
    operand = quantize(x, E4M3FN, axis=0).along(0)
    assert q.stats[Stat.SATURATED] > 5
    clamped = (dy.float().abs() * 2.0**15 > E5M2.overflow_limit).any(1).nonzero().squeeze(1)
    assert len(clamped) < 12
    some, every = (
        change_of(dy, q.scale_inv, plan, 0, operand, tokens=tokens) for tokens in (clamped, None)
    )
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    assert (some - every).norm() <= rounding * some.norm()


def test_where_all_tokens_are_multiplied_the_host_asks_for_no_element():
    """A tensor without data refuses whoever would wait for them."""
    plan = CastPlan(format=E5M2)
    with FakeTensorMode():
        dy, x, scale_inv = torch.empty(6, 4), torch.empty(6, 3), torch.empty(())
        operand = GemmOperand(x.to(torch.float8_e4m3fn), scale_inv, PerTensor(), 0)
        assert change_of(dy, scale_inv, plan, 1, operand).shape == (4, 3)
        with pytest.raises(DynamicOutputShapeException):  # as who asks which tokens clamped
            change_of(dy, scale_inv, plan, 1, operand, tokens=(dy > 1).any(1).nonzero().squeeze(1))


# ---- what the sums mean ---------------------------------------------------------------------
vectors = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


@given(vectors, vectors)
def test_error_cosine_and_ratio_are_those_of_the_vectors(first, second):
    size = min(len(first), len(second))
    computed, change = np.array(first[:size]), np.array(second[:size])
    unclamped = computed + change
    found = GradientChange.of(
        computed=float(computed @ computed),
        change=float(change @ change),
        product=float(computed @ change),
    )
    norm = float(np.linalg.norm(unclamped))
    largest = max(np.abs(computed).max(), np.abs(change).max())
    if norm < 1e-3 * largest or not change.any() or not computed.any():
        return  # next to nothing is left: a difference of equal numbers
    assert found.norm == pytest.approx(norm, rel=1e-6)
    assert found.error == pytest.approx(np.linalg.norm(change) / norm, rel=1e-6)
    assert found.ratio == pytest.approx(np.linalg.norm(computed) / norm, rel=1e-6)
    cosine = computed @ unclamped / (np.linalg.norm(computed) * norm)
    assert found.cosine == pytest.approx(cosine, rel=1e-6, abs=1e-6)


def test_without_a_change_error_is_0_and_cosine_and_ratio_1():
    for nothing in (GradientChange(), GradientChange.of(computed=2.0, change=0.0, product=0.0)):
        assert (nothing.error, nothing.cosine, nothing.ratio) == (0.0, 1.0, 1.0)
        assert nothing.is_known


def test_what_is_not_finite_or_is_over_nothing_is_not_known():
    for sums in ((math.nan, 1, 0), (math.inf, 1, 0), (1, math.nan, 0), (1, 1, -1), (0, 1, 0)):
        computed, change, product = map(float, sums)
        assert not GradientChange.of(computed=computed, change=change, product=product).is_known


def test_two_changes_add_up_as_the_gradients_side_by_side():
    parts = [(np.array([3.0, 0]), np.array([1.0, 1])), (np.array([0.0, 2]), np.array([5.0, -1]))]
    both = [np.concatenate(each) for each in zip(*parts, strict=True)]
    found = [
        GradientChange.of(computed=c @ c, change=d @ d, product=c @ d) for c, d in [*parts, both]
    ]
    added = found[0] + found[1]
    for name in ("computed", "unclamped", "change", "product"):
        assert getattr(added, name) == pytest.approx(getattr(found[2], name))
