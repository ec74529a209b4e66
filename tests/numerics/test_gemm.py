"""The GEMM of quantised operands, and the operators that `torch.compile` sees."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclamp import E4M3FN, E5M2, FORMATS, Format
from unclamp.numerics import (
    CastPlan,
    GemmOperand,
    Quantized,
    dequantize,
    empty_stats,
    matmul,
    merge_stats,
    plain_operand,
    quantize,
)
from unclamp.numerics.blocks import orient
from unclamp.numerics.fused import HUGE, large
from unclamp.numerics.gemm import values_of
from unclamp.numerics.operators import LIBRARY
from unclamp.scaling import MX, Granularity, PerBlock, PerRow, PerTensor

GRANULARITIES = (PerTensor(), PerRow(), PerBlock(1, 128), PerBlock(128, 128), PerBlock(3, 5), MX())
PAIRS = list(itertools.product(GRANULARITIES, repeat=2))
HOPPER = ("hopper", "hopper_fast")
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
each_hopper = pytest.mark.parametrize("accumulate", HOPPER)


def spelt(x: GemmOperand) -> tuple[Any, ...]:
    """Return an operand as an operator takes it."""
    return x.tensor, x.scale_inv, str(x.granularity), x.axis


def operand(q: Quantized, axis: int) -> GemmOperand:
    return GemmOperand(q.codes, q.scale_inv, q.granularity, axis)


def made(
    rows: int,
    contracted: int,
    axis: int,
    granularity: Granularity,
    fmt: Format = E4M3FN,
    seed: int = 0,
) -> tuple[GemmOperand, Tensor]:
    """Return an operand whose rows and columns differ in size, and its values, dequantised."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, contracted, generator=generator)
    x *= 2.0 ** torch.randint(-4, 5, (rows, 1), generator=generator)
    x *= 2.0 ** torch.randint(-2, 3, (contracted,), generator=generator)
    x = x if axis == 1 else x.t()
    q = quantize(x, fmt, granularity=granularity, axis=axis)
    return operand(q, axis), orient(dequantize(q), axis)


def assert_near(got: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """Within K float32 roundings of the float64 product, element by element."""
    wide = [t.to(torch.float64) for t in (a, b)]
    exact = wide[0] @ wide[1].t()
    size = wide[0].abs() @ wide[1].abs().t()
    if bias is not None:
        exact, size = exact + bias, size + bias.abs()
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert bool(((got - exact).abs() <= (a.shape[1] + 2) * 2.0**-24 * size).all())


def decibels(want: Tensor, got: Tensor) -> float:
    noise = (got.to(torch.float64) - want).square().sum()
    return float(10 * torch.log10(want.to(torch.float64).square().sum() / noise))


# ---- float32 -------------------------------------------------------------------------------


@each_pair
@pytest.mark.parametrize("a_axis", [0, 1])
@pytest.mark.parametrize("b_axis", [0, 1])
def test_a_product_is_that_of_the_dequantised_operands(pair, a_axis, b_axis):
    a, a_hat = made(37, 261, a_axis, pair[0])
    b, b_hat = made(29, 261, b_axis, pair[1], E5M2, seed=1)
    for bias in (None, torch.randn(29)):
        got = matmul(a, b, bias)
        assert torch.equal(got, F.linear(a_hat, b_hat, bias))
        assert_near(got, a_hat, b_hat, bias)


@pytest.mark.parametrize("names", list(itertools.product(FORMATS, repeat=2)), ids="-".join)
def test_any_two_formats_multiply(names):
    fmts = [FORMATS[name] for name in names]
    a, a_hat = made(9, 70, 1, PerRow(), fmts[0])
    b, b_hat = made(11, 70, 0, PerBlock(3, 5), fmts[1], seed=1)
    assert torch.equal(matmul(a, b), F.linear(a_hat, b_hat))


@pytest.mark.parametrize("axis", [0, 1])
@each_granularity
def test_the_values_of_an_operand_are_those_of_dequantize(granularity, axis):
    a, a_hat = made(40, 70, axis, granularity)
    assert torch.equal(values_of(a), a_hat)
    assert values_of(a).shape == (40, 70)
    before = a.tensor.to(torch.float32)
    values_of(a).add_(1)
    assert torch.equal(a.tensor.to(torch.float32), before)


def test_codes_with_leading_axes_dequantise_whatever_their_strides():
    q = quantize(torch.randn(2, 3, 8) * 100, E4M3FN, granularity=PerRow())
    strided = q._replace(codes=q.codes.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(dequantize(strided), dequantize(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", ["float32", *HOPPER])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_operand_in_high_precision_enters_as_it_is_and_adds_in_float32(axis, accumulate, dtype):
    x = (torch.randn(13, 33) * 100).to(dtype)
    plain = plain_operand(x if axis == 1 else x.t(), axis)
    b, b_hat = made(7, 33, 1, MX())
    bias = torch.randn(7).to(dtype)
    got = matmul(plain, b, bias, accumulate=accumulate)
    wide = orient(plain.tensor.to(torch.float32), axis)
    assert torch.equal(got, F.linear(wide, b_hat, bias.to(torch.float32)))
    swapped = matmul(b, plain, accumulate=accumulate)
    assert torch.equal(swapped, F.linear(b_hat, wide))
    both = matmul(plain, plain_operand(x), accumulate=accumulate)
    assert torch.equal(both, F.linear(wide, x.to(torch.float32)))


@pytest.mark.parametrize("accumulate", ["float32", *HOPPER])
@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0), (0, 5, 0)])
@pytest.mark.parametrize("axis", [0, 1])
@each_granularity
def test_empty_operands(granularity, axis, sizes, accumulate):
    rows, columns, contracted = sizes
    a, _ = made(rows, contracted, axis, granularity)
    b, _ = made(columns, contracted, 1 - axis, granularity)
    bias = torch.randn(columns)
    assert torch.equal(matmul(a, b, accumulate=accumulate), torch.zeros(rows, columns))
    if contracted == 0:
        got = matmul(a, b, bias, accumulate=accumulate)
        assert torch.equal(got, bias.expand(rows, columns))


@pytest.mark.parametrize("accumulate", ["float32", *HOPPER])
def test_nan_spreads_over_its_row_and_no_further(accumulate):
    x = torch.randn(6, 70)
    x[2, 3] = torch.nan
    a = operand(quantize(x, E4M3FN, granularity=MX()), 1)
    b, _ = made(5, 70, 1, PerRow())
    got = matmul(a, b, accumulate=accumulate)
    rows = torch.arange(6) == 2
    assert bool(got[rows].isnan().all())
    assert bool(got[~rows].isfinite().all())


def test_autocast_does_not_reach_the_product():
    a, a_hat = made(9, 70, 1, PerRow())
    b, b_hat = made(11, 70, 1, PerRow())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = matmul(a, b, torch.ones(11, dtype=torch.bfloat16))
    assert torch.equal(got, F.linear(a_hat, b_hat, torch.ones(11)))


# ---- Hopper --------------------------------------------------------------------------------


@each_pair
@each_hopper
def test_hopper_accumulation_is_near_the_float32_product(pair, accumulate):
    for axes, fmts in (((1, 1), (E4M3FN, E4M3FN)), ((1, 0), (E5M2, E4M3FN))):
        a, a_hat = made(17, 300, axes[0], pair[0], fmts[0])
        b, b_hat = made(13, 300, axes[1], pair[1], fmts[1], seed=1)
        bias = torch.randn(13)
        want = F.linear(a_hat, b_hat, bias)
        got = matmul(a, b, bias, accumulate=accumulate)
        assert got.dtype == torch.float32
        assert decibels(want, got) > 30
        assert not torch.equal(want, got)


@each_hopper
def test_block_scales_of_deepseek_stay_near_float32(accumulate):
    a, a_hat = made(33, 512, 1, PerBlock(1, 128))
    b, b_hat = made(140, 512, 0, PerBlock(128, 128), E5M2, seed=1)
    assert decibels(F.linear(a_hat, b_hat), matmul(a, b, accumulate=accumulate)) > 30


@each_hopper
@each_granularity
def test_scales_that_are_powers_of_two_factor_out_of_the_sum(granularity, accumulate):
    # The tensor core adds codes: a block's scale cannot change what it cuts off.
    x, y = torch.randn(9, 128), torch.randn(7, 128)
    settings = {"granularity": granularity, "power_of_two": True}
    a, bigger = (quantize(t, E4M3FN, **settings) for t in (x, x * 2.0**20))
    b = quantize(y, E4M3FN, **settings)
    one = matmul(operand(a, 1), operand(b, 1), accumulate=accumulate)
    other = matmul(operand(bigger, 1), operand(b, 1), accumulate=accumulate)
    assert torch.equal(one * 2.0**20, other)


@pytest.mark.parametrize("accumulate", ["float32", *HOPPER])
def test_operands_of_different_depth_are_refused(accumulate):
    a, _ = made(4, 64, 1, PerTensor())
    b, _ = made(5, 128, 1, PerTensor())
    for pair in ((a, b), (b, a)):
        with pytest.raises((ValueError, RuntimeError)):
            matmul(*pair, accumulate=accumulate)


def test_an_unknown_way_to_add_is_refused():
    a, _ = made(4, 64, 1, PerTensor())
    with pytest.raises(ValueError, match="accumulate"):
        matmul(a, a, accumulate="hoper")


# ---- operators -----------------------------------------------------------------------------


ON_FLOAT8 = ("test_autograd_registration", "test_faketensor")
"""torch's other checks compare their inputs by arithmetic that float8 does not have."""


def opcheck(name: str, *args: object, **settings) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops, LIBRARY.ns), name).default, args, **settings)


@pytest.mark.parametrize("shape", [(33, 20), (1, 7), (0, 20), (20, 0)])
@pytest.mark.parametrize("axis", [0, 1])
@each_granularity
def test_the_operator_quantize_is_what_its_fake_says(granularity, axis, shape):
    x = torch.randn(shape)
    plan = CastPlan(format=E5M2, granularity=granularity, margin=1, power_of_two=True)
    opcheck("quantize", x, None, *plan.signature, axis)
    scale = quantize(x, E5M2, granularity=granularity, axis=axis).scale_inv.reciprocal() * 4
    guarded = replace(plan, guard=True)
    opcheck("quantize", x.to(torch.bfloat16).t().contiguous().t(), scale, *guarded.signature, axis)


def test_the_last_axis_may_be_called_minus_one_in_an_operator_too():
    x = torch.randn(4, 6)
    opcheck("quantize", x, None, *CastPlan(format=E4M3FN, granularity=PerRow()).signature, -1)
    plain = plain_operand(x, -1)
    opcheck("matmul", *spelt(plain), *spelt(plain), None, "float32", torch.float32)


@pytest.mark.parametrize("axis", [0, 1])
@each_granularity
def test_the_operator_quantize_is_quantize(granularity, axis):
    x = torch.randn(33, 20)
    plan = CastPlan(format=E4M3FN, granularity=granularity)
    codes, scale_inv, amax, stats = torch.ops.unclamp.quantize(x, None, *plan.signature, axis)
    q = quantize(x, E4M3FN, granularity=granularity, axis=axis)
    assert torch.equal(codes.view(torch.uint8), q.codes.view(torch.uint8))
    assert torch.equal(scale_inv, q.scale_inv)
    assert torch.equal(amax, q.amax)
    assert torch.equal(stats, q.stats)


@pytest.mark.parametrize("accumulate", ["float32", *HOPPER])
@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_the_operator_matmul_is_what_its_fake_says(axes, accumulate):
    a, _ = made(9, 40, axes[0], PerRow())
    b, _ = made(6, 40, axes[1], PerBlock(3, 5))
    plain = plain_operand(torch.randn(6, 40))
    opcheck(
        "matmul",
        *spelt(a),
        *spelt(b),
        torch.randn(6),
        accumulate,
        torch.float32,
        test_utils=ON_FLOAT8,
    )
    opcheck(
        "matmul", *spelt(a), *spelt(plain), None, accumulate, torch.float32, test_utils=ON_FLOAT8
    )
    turned = plain_operand(torch.randn(40, 3), 0)
    opcheck("matmul", *spelt(plain), *spelt(turned), None, accumulate, torch.float32)
    got = torch.ops.unclamp.matmul(*spelt(a), *spelt(b), None, accumulate, torch.float32)
    assert torch.equal(got, matmul(a, b, accumulate=accumulate))


def test_the_operators_that_write_say_so():
    stats = torch.stack([quantize(torch.randn(9), E4M3FN).stats for _ in range(3)])
    opcheck("commit", empty_stats(3), stats)
    opcheck("commit", empty_stats(5)[1:4], stats)
    opcheck("raise_amax", torch.zeros(3, 2), torch.rand(3, 2))
    opcheck("raise_amax", torch.zeros(9)[2:8].view(3, 2), torch.rand(3, 2))
    opcheck("raise_amax", torch.zeros(3, 2), torch.rand(3, 2), torch.rand(4))


def test_the_operator_commit_merges_and_bumps_the_version():
    stats = torch.stack([quantize(torch.randn(9) * k, E4M3FN).stats for k in (1, 2)])
    pending, expected = empty_stats(2), empty_stats(2)
    version = pending._version
    torch.ops.unclamp.commit(pending, stats)
    merge_stats(expected, stats)
    assert torch.equal(pending, expected)
    assert pending._version > version
    amax = torch.tensor([1.0, 5.0])
    torch.ops.unclamp.raise_amax(amax, torch.tensor([3.0, 2.0]))
    assert amax.tolist() == [3, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 5), (0, 5), (9, 0), (4,)])
def test_the_operator_sum_tokens_adds_in_float32(shape, dtype):
    x = torch.randn(shape).to(dtype)
    opcheck("sum_tokens", x)
    got = torch.ops.unclamp.sum_tokens(x)
    assert got.dtype == torch.float32
    exact = x.to(torch.float64).sum(0)
    bound = math.prod(shape) * 2.0**-24 * x.to(torch.float64).abs().sum(0)
    assert bool(((got - exact).abs() <= bound).all())


@pytest.mark.parametrize("accumulate", ["float32", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_a_product_is_put_where_it_is_wanted(
    has_bias: bool, dtype: torch.dtype, accumulate: str
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 16), torch.randn(8, 16)
    bias = torch.randn(8) if has_bias else None
    a, b = (quantize(t, E4M3FN) for t in (x, weight))
    room = torch.full((3, 6, 8), torch.nan, dtype=dtype)
    made = matmul(a.along(1), b.along(1), bias, accumulate=accumulate, out_dtype=dtype, out=room[1])
    assert made.data_ptr() == room[1].data_ptr()
    exact = dequantize(a).double() @ dequantize(b).double().t() + (0 if bias is None else bias)
    torch.testing.assert_close(room[1].double(), exact, rtol=2e-2, atol=2e-2)
    plain = matmul(a.along(1), b.along(1), bias, accumulate=accumulate, out_dtype=dtype)
    assert torch.equal(room[1], plain)
    assert room[[0, 2]].isnan().all()


def test_large_memory_is_that_of_its_like() -> None:
    made = large(torch.empty(0, dtype=torch.bfloat16), (HUGE // 2 + 5, 1))
    assert made.shape == (HUGE // 2 + 5, 1)
    assert made.dtype == torch.bfloat16
    assert float(made.fill_(1).sum(dtype=torch.float64)) == HUGE // 2 + 5
