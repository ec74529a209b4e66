"""Casts in blocks, held to a slow loop over the blocks; and the arithmetic of blocks by itself."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles import by_reference, count_lost, identical
from unclamp import E4M3FN, E5M2, FORMATS, Format
from unclamp.numerics import Quantized, Stat, block_grid, dequantize, quantize, torch_dtype
from unclamp.numerics.blocks import block_amax, orient, spread
from unclamp.reference import scale_from_amax
from unclamp.scaling import MX, Block, Granularity, PerBlock, PerRow, PerTensor

GRANULARITIES = (PerTensor(), PerRow(), PerBlock(1, 128), PerBlock(128, 128), PerBlock(3, 5), MX())
BLOCKED = GRANULARITIES[1:]
LOST = [Stat.SATURATED, Stat.UNDERFLOWED, Stat.NONFINITE]
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
each_block = pytest.mark.parametrize("granularity", BLOCKED, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
each_axis = pytest.mark.parametrize("axis", [0, 1])
formats = st.sampled_from(list(FORMATS.values()))


class Slow(NamedTuple):
    """What a cast gives, by a loop: values of the codes, and one number a block for the rest."""

    values: np.ndarray
    scale_inv: np.ndarray
    amax: np.ndarray
    lost: np.ndarray
    square: float
    saturated_square: float


def pieces(size: int, block: int | None) -> list[slice]:
    """Return an axis in parts; the whole axis is one part, also if it is empty."""
    if block is None:
        return [slice(0, size)]
    return [slice(i, min(i + block, size)) for i in range(0, size, block)]


def slow_quantize(
    matrix: np.ndarray, fmt: Format, block: Block, scales: np.ndarray | None = None, **settings
) -> Slow:
    """Cast an oriented matrix block by block, one number at a time."""
    matrix = matrix.astype(np.float32)
    rows, columns = (pieces(size, b) for size, b in zip(matrix.shape, block, strict=True))
    values = np.zeros(matrix.shape)
    scale_inv, amax = np.ones((2, len(rows), len(columns)), np.float32)
    lost, square, removed = np.zeros(3), 0.0, 0.0
    for i, across in enumerate(rows):
        for j, along in enumerate(columns):
            part = matrix[across, along]
            finite = np.abs(part[np.isfinite(part)].astype(np.float64))
            amax[i, j] = finite.max(initial=0)
            scale = scale_from_amax(float(amax[i, j]), fmt, **settings)
            if scales is not None and scales[i, j] > 0:
                scale = float(scales[i, j])
            scale_inv[i, j] = np.float32(1) / np.float32(scale)
            with np.errstate(over="ignore"):
                product = (part * np.float32(scale)).astype(np.float64)
            values[across, along] = by_reference(product.ravel(), fmt).reshape(part.shape)
            lost += count_lost(torch.from_numpy(part.copy()), scale, fmt)
            square += (finite**2).sum()
            over = finite[(finite.astype(np.float32) * np.float32(scale)) > fmt.overflow_limit]
            removed += ((over - fmt.max / scale) ** 2).sum()
    if not np.isfinite(matrix).any():
        amax[:] = -1
    return Slow(values, scale_inv, amax, lost, square, removed)


def as_matrix(x: Tensor, axis: int) -> np.ndarray:
    """Return float64 with the contracted axis last and every other axis in the rows."""
    wide = x.to(torch.float64).numpy()
    if wide.ndim == 2:
        return wide if axis in (1, -1) else wide.T
    return wide.reshape(int(np.prod(wide.shape[:-1])), wide.shape[-1])


def assert_is_slow(q: Quantized, slow: Slow, x: Tensor, axis: int, granularity: Granularity):
    """Codes, scales, amaxes and counts to the bit; sums of squares within 1e-5 and 1e-4."""
    grid = () if isinstance(granularity, PerTensor) else slow.scale_inv.shape
    assert (q.codes.shape, q.codes.is_contiguous()) == (x.shape, True)
    assert identical(as_matrix(q.codes, axis), slow.values)
    for got, want in ((q.scale_inv, slow.scale_inv), (q.amax, slow.amax)):
        assert (got.dtype, got.shape) == (torch.float32, grid)
        np.testing.assert_array_equal(got.numpy(), want.reshape(grid))
    stats = q.stats
    assert (stats.dtype, stats.shape) == (torch.float64, (len(Stat),))
    np.testing.assert_array_equal(stats[LOST].numpy(), slow.lost)
    assert stats[Stat.ELEMENTS] == x.numel()
    assert stats[Stat.CASTS] == 1
    assert stats[Stat.RECAST] == 0
    assert stats[Stat.AMAX] == (slow.amax.max() if slow.amax.size else -1)
    assert stats[Stat.SCALE_INV] == slow.scale_inv.max(initial=1 if not slow.amax.size else 0)
    assert stats[Stat.SQUARE].item() == pytest.approx(slow.square, rel=1e-5)
    assert stats[Stat.SATURATED_SQUARE].item() == pytest.approx(slow.saturated_square, rel=1e-4)
    sizes = [b or max(n, 1) for n, b in zip(slow.values.shape, granularity.block, strict=True)]
    each = np.kron(slow.scale_inv, np.ones(sizes))[tuple(map(slice, slow.values.shape))]
    back = torch.from_numpy(slow.values * each).to(torch.float32)  # rounds once
    assert identical(as_matrix(dequantize(q), axis), back.to(torch.float64).numpy())


def wild(rows: int, columns: int, seed: int = 0, special: bool = True) -> Tensor:
    """Return random values whose size differs by place, with zeros and some NaN and Inf."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 2 ** rng.uniform(-9, 9, (rows, columns))
    x[rng.random(x.shape) < 0.1] = 0
    if special and x.size > 9:
        x.flat[rng.integers(x.size, size=3)] = [np.inf, np.nan, -np.inf]
    return torch.from_numpy(x.astype(np.float32))


LAYOUTS = {
    "odd": lambda: wild(7, 131),
    "tall": lambda: wild(131, 5),
    "transposed": lambda: wild(33, 11).t(),
    "strided": lambda: wild(15, 70)[::2, 1::2],
    "expanded": lambda: wild(1, 37).expand(6, 37),
    "expanded columns": lambda: wild(37, 1).expand(37, 6),
    "one row": lambda: wild(1, 40),
    "one element": lambda: wild(1, 1),
    "no rows": lambda: wild(0, 9),
    "no columns": lambda: wild(9, 0),
    "nothing": lambda: wild(0, 0),
    "nothing finite": lambda: torch.full((4, 6), torch.nan),
    "zeros": lambda: torch.zeros(4, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_axis
@each_dtype
@each_granularity
def test_a_dynamic_cast_is_that_of_a_loop_over_blocks(granularity, dtype, axis, layout):
    x = LAYOUTS[layout]()
    x, fmt = x.to(dtype), E4M3FN if axis else E5M2
    before = x.clone()
    q = quantize(x, fmt, granularity=granularity, axis=axis)
    p2 = isinstance(granularity, MX)
    slow = slow_quantize(as_matrix(x, axis), fmt, granularity.block, power_of_two=p2)
    assert_is_slow(q, slow, x, axis, granularity)
    assert (q.granularity, q.axis, q.codes.dtype) == (granularity, axis, torch_dtype(fmt))
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))


@each_axis
@each_granularity
def test_a_block_of_128_by_128_and_its_short_neighbours(granularity, axis):
    x = wild(130, 140)
    q = quantize(x, E4M3FN, granularity=granularity, axis=axis, margin=1, power_of_two=True)
    slow = slow_quantize(as_matrix(x, axis), E4M3FN, granularity.block, margin=1, power_of_two=True)
    assert_is_slow(q, slow, x, axis, granularity)


@pytest.mark.parametrize("layout", ["odd", "transposed", "strided", "expanded", "no rows"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@each_axis
@each_granularity
def test_given_scales_are_used_block_by_block_and_zero_means_the_blocks_own(
    granularity, axis, fmt, layout
):
    x = LAYOUTS[layout]()
    matrix, block = as_matrix(x, axis), granularity.block
    rng = np.random.default_rng(1)
    grid = block_grid(matrix.shape[0], matrix.shape[1], block)
    scales = (fmt.max * 2 ** rng.uniform(-36, 4, grid)).astype(np.float32)
    scales[rng.random(grid) < 0.2] = 0
    given = torch.from_numpy(scales)
    q = quantize(
        x,
        fmt,
        given.reshape(()) if isinstance(granularity, PerTensor) else given,
        granularity=granularity,
        axis=axis,
    )
    p2 = isinstance(granularity, MX)
    slow = slow_quantize(matrix, fmt, block, scales, power_of_two=p2)
    assert_is_slow(q, slow, x, axis, granularity)
    if layout == "odd":
        assert slow.lost[:2].sum() > 0


@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("shape", [(3, 4, 37), (2, 1, 5), (0, 3, 7), (1, 2, 0)])
@each_granularity
def test_leading_axes_are_rows(granularity, shape, axis):
    x = wild(int(np.prod(shape[:-1])), shape[-1]).reshape(shape)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    q = quantize(x, E4M3FN, granularity=granularity, axis=axis)
    p2 = isinstance(granularity, MX)
    slow = slow_quantize(as_matrix(x, axis), E4M3FN, granularity.block, power_of_two=p2)
    assert_is_slow(q, slow, x, axis, granularity)


@pytest.mark.parametrize("size", [0, 1, 40])
@each_granularity
def test_a_vector_is_one_row(granularity, size):
    x = wild(1, size)[0]
    q = quantize(x, E4M3FN, granularity=granularity)
    p2 = isinstance(granularity, MX)
    slow = slow_quantize(x.numpy()[None], E4M3FN, granularity.block, power_of_two=p2)
    assert_is_slow(q, slow, x, -1, granularity)


# ---- properties ----------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    block=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    axis=st.sampled_from([-1, 0, 1]),
    fmt=formats,
    margin=st.integers(0, 64),
    p2=st.booleans(),
    exponent=st.integers(-145, 110),
    seed=st.integers(0, 999),
)
@settings(max_examples=150)
def test_any_block_of_any_matrix(size, block, axis, fmt, margin, p2, exponent, seed):
    x = torch.ldexp(wild(size[0], size[1], seed), torch.tensor(exponent))
    granularity = PerBlock(*block)
    settings = {"margin": margin, "power_of_two": p2}
    q = quantize(x, fmt, granularity=granularity, axis=axis, **settings)
    slow = slow_quantize(as_matrix(x, axis), fmt, block, **settings)
    assert_is_slow(q, slow, x, axis, granularity)


def same_codes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), fmt=formats, seed=st.integers(0, 999))
def test_a_cast_per_row_is_a_cast_per_tensor_of_each_row(rows, columns, fmt, seed):
    x = wild(rows, columns, seed)
    whole = quantize(x, fmt, granularity=PerRow())
    each = [quantize(row, fmt) for row in x]
    assert same_codes(whole.codes, torch.stack([q.codes for q in each]))
    assert torch.equal(whole.scale_inv[:, 0], torch.stack([q.scale_inv for q in each]))
    assert torch.equal(whole.amax[:, 0].clamp(0), torch.stack([q.amax for q in each]).clamp(0))


@each_dtype
@each_axis
@each_granularity
def test_the_transpose_along_the_other_axis_has_the_transposed_codes(granularity, axis, dtype):
    x = wild(67, 43).to(dtype)
    one = quantize(x, E5M2, granularity=granularity, axis=axis)
    other = quantize(x.t(), E5M2, granularity=granularity, axis=1 - axis)
    assert same_codes(one.codes, other.codes.t())
    assert torch.equal(one.scale_inv, other.scale_inv)
    assert torch.equal(one.amax, other.amax)
    torch.testing.assert_close(one.stats, other.stats, rtol=1e-5, atol=0)


@pytest.mark.parametrize("granularity", [PerTensor(), PerBlock(3, 3), PerBlock(128, 128)], ids=str)
def test_square_blocks_are_the_same_along_both_axes(granularity):
    x = wild(140, 133)
    one, other = (quantize(x, E4M3FN, granularity=granularity, axis=a) for a in (0, 1))
    assert same_codes(one.codes, other.codes)
    assert torch.equal(one.scale_inv.t(), other.scale_inv)


@given(rows=st.integers(1, 5), columns=st.integers(1, 100), fmt=formats, seed=st.integers(0, 10**6))
def test_mx_fills_the_last_octave_of_the_format_and_never_saturates(rows, columns, fmt, seed):
    x = wild(rows, columns, seed) * 2.0 ** (seed % 101 - 50)
    q = quantize(x, fmt, granularity=MX())
    assert q.stats[Stat.SATURATED] == 0
    assert torch.equal(q.scale_inv.to(torch.float8_e8m0fnu).to(torch.float32), q.scale_inv)
    landed = (q.amax.to(torch.float64) / q.scale_inv)[q.amax > 0]
    assert bool(((landed > fmt.max / 2) & (landed <= fmt.max)).all())


@each_axis
@each_granularity
def test_nonfinite_elements_change_nothing_around_them(granularity, axis):
    clean = wild(40, 70, special=False)
    x, places = clean.clone(), ([0, 0, 17, 39], [0, 1, 33, 69])
    clean[places], x[places] = 0, torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    got, want = (quantize(v, E4M3FN, granularity=granularity, axis=axis) for v in (x, clean))
    assert torch.equal(got.scale_inv, want.scale_inv)
    assert torch.equal(got.amax, want.amax)
    values = got.codes.to(torch.float32)
    assert values[places][1:3].tolist() == [448, -448]
    assert values[places].isnan().tolist() == [True, False, False, True]
    same = torch.ones_like(x, dtype=torch.bool)
    same[places] = False
    assert torch.equal(values[same], want.codes.to(torch.float32)[same])
    sums = [Stat.SQUARE, Stat.SATURATED_SQUARE]
    counted = [s for s in Stat if s not in (Stat.NONFINITE, *sums)]
    assert torch.equal(got.stats[counted], want.stats[counted])
    torch.testing.assert_close(got.stats[sums], want.stats[sums], rtol=1e-6, atol=0)
    assert got.stats[Stat.NONFINITE] == 4


@each_block
def test_a_block_of_zeros_has_scale_one_and_loses_nothing(granularity):
    x = wild(256, 256, special=False)
    x[:128, :128] = 0
    x[0] = 0
    q = quantize(x, E4M3FN, granularity=granularity)
    empty = q.amax == 0
    assert bool(empty.any())
    assert bool((q.scale_inv[empty] == 1).all())
    assert not q.codes[:128, :128].to(torch.float32).any()
    assert q.stats[Stat.NONFINITE] == q.stats[Stat.SATURATED] == 0


@pytest.mark.parametrize(("fmt", "decibels"), [(E4M3FN, 30), (E5M2, 24)])
@each_axis
@each_block
def test_every_block_keeps_its_precision_whatever_the_others_hold(granularity, axis, fmt, decibels):
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    across = granularity.block[0]
    size = 2.0 ** (torch.arange(256) // across % 7 * 9 - 27)
    x *= size[:, None] if axis else size
    lost = dequantize(quantize(x, fmt, granularity=granularity, axis=axis)) - x
    ratio = x.square().sum(axis) / lost.square().sum(axis)
    assert 10 * ratio.log10().min() > decibels - 1
    assert 10 * ratio.log10().mean() > decibels


# ---- the arithmetic of blocks --------------------------------------------------------------


def test_orient_is_a_view_with_the_contracted_axis_last():
    x = torch.randn(3, 5)
    for axis, expected in ((1, x), (-1, x), (0, x.t()), (-2, x.t())):
        view = orient(x, axis)
        assert torch.equal(view, expected)
        assert view.data_ptr() == x.data_ptr()
    assert orient(torch.randn(2, 3, 5), 2).shape == orient(torch.randn(2, 3, 5), -1).shape == (6, 5)
    assert orient(torch.randn(5), 0).shape == (1, 5)


@pytest.mark.parametrize(("shape", "axis"), [((), -1), ((2, 3, 4), 0), ((2, 3, 4), 1), ((4,), 1)])
def test_blocks_along_an_axis_that_is_not_there_are_refused(shape, axis):
    with pytest.raises(ValueError, match="along its last axis"):
        quantize(torch.zeros(shape), E4M3FN, granularity=PerRow(), axis=axis)


@pytest.mark.parametrize("axis", [2, -3, 5])
def test_a_matrix_has_two_axes(axis):
    with pytest.raises(ValueError, match="axis"):
        quantize(torch.zeros(2, 3), E4M3FN, granularity=PerRow(), axis=axis)


def test_a_scale_that_is_not_one_a_block_is_refused():
    # One number a row without its axis broadcasts over the columns of a square matrix.
    with pytest.raises(ValueError, match="scale"):
        quantize(torch.ones(4, 4), E4M3FN, torch.tensor([1.0, 2, 4, 8]), granularity=PerRow())


def test_a_float64_scale_a_block_does_not_leave_float32():
    x, scale = wild(8, 40), torch.rand(8, 1, dtype=torch.float64) + 0.1
    got = quantize(x, E4M3FN, scale, granularity=PerRow())
    want = quantize(x, E4M3FN, scale.to(torch.float32), granularity=PerRow())
    assert got.scale_inv.dtype == torch.float32
    assert same_codes(got.codes, want.codes)


def test_a_block_larger_than_the_matrix_is_the_matrix_and_costs_no_memory():
    x = wild(3, 5)
    q, whole = quantize(x, E4M3FN, granularity=PerBlock(1 << 20, 1 << 20)), quantize(x, E4M3FN)
    assert same_codes(q.codes, whole.codes)
    assert q.scale_inv.tolist() == [[whole.scale_inv.item()]]


@pytest.mark.parametrize(
    ("size", "block", "grid"),
    [
        ((4, 6), (None, None), (1, 1)),
        ((4, 6), (1, None), (4, 1)),
        ((4, 6), (3, 4), (2, 2)),
        ((4, 6), (4, 6), (1, 1)),
        ((4, 6), (5, 7), (1, 1)),
        ((0, 6), (1, None), (0, 1)),
        ((4, 0), (1, None), (4, 1)),
        ((4, 0), (1, 32), (4, 0)),
        ((0, 0), (None, None), (1, 1)),
    ],
)
def test_the_grid_counts_short_blocks_and_no_empty_ones(size, block, grid):
    assert block_grid(size[0], size[1], block) == grid
    assert block_amax(torch.ones(size), block).shape == grid


@given(size=st.tuples(*[st.integers(1, 9)] * 2), block=st.tuples(*[st.integers(1, 11)] * 2))
def test_spreading_the_block_amaxes_bounds_every_element(size, block):
    x = torch.rand(size)
    amax = block_amax(x, block)
    each = spread(amax, size, block).expand(size)
    assert bool((x <= each).all())
    assert torch.equal(block_amax(each, block), amax)
    repeated = torch.kron(amax, torch.ones(block))[: size[0], : size[1]]
    assert torch.equal(each, repeated)
