import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles import by_reference, count_lost, identical
from unclamp import (
    E4M3FN,
    E5M2,
    FORMATS,
    Format,
    PerRow,
    UnsupportedError,
    cast,
    dequantize,
    quantize,
)
from unclamp.numerics import Stat, empty_stats, merge_stats, torch_dtype
from unclamp.numerics.cast import quantize_plain
from unclamp.reference import scale_from_amax

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
formats = st.sampled_from(list(FORMATS.values()))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
scales = st.floats(2.0**-40, 2.0**40, width=32)


@st.composite
def wild_tensors(draw: st.DrawFn, finite: bool = False) -> Tensor:
    """Random tensors over wild ranges: outliers, subnormals, zeros and, unless finite, Inf, NaN."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 400))
    low, width = draw(st.floats(-150, 120)), draw(st.floats(0, 60))
    values = rng.choice([-1, 1], size) * 2 ** np.minimum(low + width * rng.random(size), 127.9)
    values[rng.random(size) < draw(st.sampled_from([0, 0.2]))] = 0
    x = torch.from_numpy(values.astype(np.float32))
    if not finite:
        for special in draw(st.lists(st.sampled_from([np.inf, -np.inf, np.nan, 3.4e38, 1e-45]))):
            x[int(rng.integers(size))] = special
    x = x.to(draw(dtypes))
    return x[x.isfinite()] if finite else x


def lost(stats: Tensor) -> tuple[int, int, int]:
    kinds = (Stat.SATURATED, Stat.UNDERFLOWED, Stat.NONFINITE)
    saturated, underflowed, nonfinite = (int(stats[kind]) for kind in kinds)
    return saturated, underflowed, nonfinite


@given(x=wild_tensors(), fmt=formats, scale=scales)
@settings(max_examples=300)
def test_counts_are_those_of_a_recount(x: Tensor, fmt: Format, scale: float) -> None:
    quantized = quantize(x, fmt, torch.tensor(scale))
    assert lost(quantized.stats) == count_lost(x, scale, fmt)


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_over_every_16_bit_input(dtype: torch.dtype, fmt: Format) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for scale in (1.0, 0.3):
        quantized = quantize(x, fmt, torch.tensor(scale))
        assert lost(quantized.stats) == count_lost(x, scale, fmt)


@each_format
def test_counts_on_either_side_of_each_limit(fmt: Format) -> None:
    limit, half = np.float32(fmt.overflow_limit), np.float32(fmt.min_subnormal / 2)
    up, down = np.float32(np.inf), np.float32(0)
    marks = [limit, np.nextafter(limit, up), half, np.nextafter(half, up), np.nextafter(half, down)]
    for mark in marks:
        x = torch.tensor([float(mark), -float(mark)])
        assert lost(quantize(x, fmt, torch.tensor(1.0)).stats) == count_lost(x, 1.0, fmt)


@given(x=wild_tensors(), fmt=formats, margin=st.integers(0, 64))
@settings(max_examples=300)
def test_dynamic_scaling_never_saturates_a_finite_element(
    x: Tensor, fmt: Format, margin: int
) -> None:
    quantized = quantize(x, fmt, margin=margin)
    assert quantized.stats[Stat.SATURATED] == 0
    assert quantized.stats[Stat.SATURATED_SQUARE] == 0
    assert quantized.stats.isfinite().all()


@given(x=wild_tensors(), fmt=formats, margin=st.integers(0, 64))
def test_an_own_scale_is_the_reference_of_the_finite_amax(
    x: Tensor, fmt: Format, margin: int
) -> None:
    finite = x.float()[x.float().isfinite()].abs()
    amax = finite.max().item() if len(finite) else -1.0
    quantized = quantize(x, fmt, margin=margin)
    scale = torch.tensor(scale_from_amax(max(amax, 0), fmt, margin=margin))
    assert quantized.stats[Stat.AMAX] == amax
    assert torch.equal(quantized.scale_inv, scale.reciprocal())
    assert quantized.scale_inv >= 2.0**-126
    assert quantized.stats[Stat.SCALE_INV] == quantized.scale_inv


def square_sums(x: Tensor, fmt: Format, scale: float) -> tuple[float, float]:
    values = x.double().numpy()
    values = np.abs(values[np.isfinite(values)])
    saturated = values * float(np.float32(scale)) > fmt.overflow_limit
    removed = values[saturated] - fmt.max / float(np.float32(scale))
    return float((values**2).sum()), float((removed**2).sum())


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1.0, 1e19, 3e37])
@pytest.mark.parametrize("margin", [0, 8, 64])
@each_format
def test_square_sums_are_those_of_float64(fmt: Format, magnitude: float, margin: int) -> None:
    x = torch.randn(4000) * magnitude
    scale = min(fmt.max / (1.1 * magnitude), 2.0**126)
    stats = quantize(x, fmt, torch.tensor(scale), margin=margin).stats
    square, removed = square_sums(x, fmt, scale)
    assert stats[Stat.SQUARE].item() == pytest.approx(square, rel=1e-5)
    assert stats[Stat.SATURATED_SQUARE].item() == pytest.approx(removed, rel=1e-3)
    assert (removed > 0) == (magnitude > 1e-39)


@given(a=wild_tensors(finite=True), b=wild_tensors(finite=True), fmt=formats, scale=scales)
def test_statistics_of_a_concatenation_are_the_merge(
    a: Tensor, b: Tensor, fmt: Format, scale: float
) -> None:
    whole = quantize(torch.cat([a.float(), b.float()]), fmt, torch.tensor(scale)).stats
    merged = empty_stats(1)[0]
    for part in (a, b):
        merge_stats(merged, quantize(part, fmt, torch.tensor(scale)).stats)
    assert merged[Stat.CASTS] == 2
    counts = [Stat.AMAX, Stat.SCALE_INV, Stat.ELEMENTS, Stat.SATURATED, Stat.UNDERFLOWED]
    assert torch.equal(whole[counts], merged[counts])
    for total in (Stat.SQUARE, Stat.SATURATED_SQUARE):
        assert merged[total].item() == pytest.approx(whole[total].item(), rel=1e-4)


def test_merging_with_the_empty_vector_changes_nothing() -> None:
    stats = quantize(torch.randn(50), E4M3FN).stats
    total = empty_stats(1)[0]
    merge_stats(total, stats)
    assert torch.equal(total, stats)


def test_merging_rows_merges_each_with_its_own() -> None:
    rows = torch.stack([quantize(torch.randn(9), E4M3FN).stats for _ in range(3)])
    total = empty_stats(3)
    merge_stats(total[1], rows[1])
    assert torch.equal(total[1], rows[1])
    assert torch.equal(total[[0, 2]], empty_stats(2))


def _special(dtype: torch.dtype) -> Tensor:
    return torch.tensor([[1.0, math.inf], [-math.inf, math.nan]]).to(dtype)


SHAPES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "0-d": lambda d: torch.tensor(-3.0).to(d),
    "0-d NaN": lambda d: torch.tensor(math.nan).to(d),
    "empty": lambda d: torch.zeros(0, 5, dtype=d),
    "one row": lambda d: torch.randn(1, 7).to(d),
    "odd": lambda d: torch.randn(3, 5, 7).to(d),
    "zeros": lambda d: torch.zeros(3, 3).to(d),
    "special": _special,
    "transposed": lambda d: torch.randn(5, 9).to(d).t(),
    "strided": lambda d: torch.randn(7, 22).to(d)[::2, 1::3],
    "expanded": lambda d: torch.randn(4, 1).to(d).expand(4, 6),
}


@each_format
@each_dtype
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("scale", [None, 3.25])
def test_shapes_dtypes_and_values(
    kind: str, dtype: torch.dtype, fmt: Format, scale: float | None
) -> None:
    x = SHAPES[kind](dtype)
    before = x.clone()
    quantized = quantize(x, fmt, None if scale is None else torch.tensor(scale))
    assert torch.equal(x.nan_to_num(99), before.nan_to_num(99))
    assert quantized.codes.shape == x.shape
    assert quantized.codes.dtype == torch_dtype(fmt)
    assert (quantized.scale_inv.shape, quantized.scale_inv.dtype) == ((), torch.float32)
    assert (quantized.stats.shape, quantized.stats.dtype) == ((len(Stat),), torch.float64)
    values = x.float()[x.float().isfinite()].abs()
    amax = values.max().item() if values.numel() else 0.0
    used = scale_from_amax(amax, fmt) if scale is None else scale
    product = (x.float() * torch.tensor(used)).double().flatten().numpy()
    assert identical(
        quantized.codes.to(torch.float64).flatten().numpy(), by_reference(product, fmt)
    )
    back = dequantize(quantized)
    assert back.dtype == torch.float32
    assert back.shape == x.shape
    assert lost(quantized.stats) == count_lost(x, used, fmt)
    assert quantized.stats[Stat.ELEMENTS] == x.numel()
    assert quantized.stats[Stat.AMAX] == (amax if values.numel() else -1)
    assert quantized.stats[Stat.CASTS] == 1


def test_a_scale_of_zero_means_nothing_measured_yet() -> None:
    x = torch.randn(30)
    own, seeded = quantize(x, E5M2), quantize(x, E5M2, torch.tensor(0.0))
    assert torch.equal(own.codes.view(torch.uint8), seeded.codes.view(torch.uint8))
    assert torch.equal(own.stats, seeded.stats)


def test_zeros_get_scale_one_and_lose_nothing() -> None:
    quantized = quantize(torch.zeros(4), E4M3FN)
    assert quantized.scale_inv == 1
    assert quantized.stats[Stat.AMAX] == 0
    assert lost(quantized.stats) == (0, 0, 0)


def test_without_a_finite_element_amax_is_minus_one_and_the_scale_is_one() -> None:
    quantized = quantize(torch.tensor([math.nan, math.inf]), E4M3FN)
    assert quantized.stats[Stat.AMAX] == -1
    assert quantized.scale_inv == 1
    assert lost(quantized.stats) == (0, 0, 2)


def test_infinity_counts_as_nonfinite_and_as_nothing_else() -> None:
    x = torch.tensor([1.0, math.inf, -math.inf])
    quantized = quantize(x, E4M3FN, torch.tensor(1.0))
    assert lost(quantized.stats) == (0, 0, 2)
    assert dequantize(quantized).tolist() == [1.0, 448.0, -448.0]


def test_one_outlier_in_a_bfloat16_tensor_is_counted_with_its_error() -> None:
    x = torch.ones(100, dtype=torch.bfloat16)
    x[3] = 1000
    stats = quantize(x, E4M3FN, torch.tensor(1.0)).stats
    assert stats[Stat.SATURATED] == 1
    assert stats[Stat.SATURATED_SQUARE].item() == pytest.approx((1000 - 448) ** 2, rel=1e-6)


def test_the_result_does_not_share_memory_with_the_scale() -> None:
    scale = torch.tensor([2.0])
    quantized = quantize(torch.ones(3), E4M3FN, scale[0])
    scale.fill_(4)
    assert quantized.scale_inv == 0.5


def test_codes_cannot_be_made_of_integers() -> None:
    with pytest.raises(UnsupportedError, match="floating-point"):
        quantize(torch.arange(3), E4M3FN)


def test_casting_twice_gives_the_same_bytes() -> None:
    x = torch.randn(1000)
    first, second = quantize(x, E5M2), quantize(x, E5M2)
    assert torch.equal(first.codes.view(torch.uint8), second.codes.view(torch.uint8))
    assert torch.equal(first.stats, second.stats)


def test_a_float64_scale_a_row_still_gives_a_float32_product() -> None:
    x, scale = torch.rand(64, 500), torch.rand(64, 1, dtype=torch.float64) * 100
    product = (x * scale.to(torch.float32)).double().flatten().numpy()
    got = cast(x, scale, E4M3FN).to(torch.float64).flatten().numpy()
    assert identical(got, by_reference(product, E4M3FN))


def test_native_infinity_becomes_what_we_believe() -> None:
    infinity = torch.tensor(math.inf)
    native = [infinity.to(torch_dtype(fmt)).to(torch.float32).item() for fmt in FORMATS.values()]
    assert native[:2] == [448.0, math.inf]
    assert all(map(math.isnan, native[2:]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], E4M3FN), "expected a tensor"),
        ((torch.ones(2), "e4m3fn"), "expected a Format"),
        ((torch.ones(2), E4M3FN, 2.0), "scale as a float32 tensor"),
    ],
)
def test_arguments_of_another_type_are_named(arguments, words):
    with pytest.raises(UnsupportedError, match=words):
        quantize(*arguments)
    if len(arguments) == 2:
        with pytest.raises(UnsupportedError, match=words):
            cast(arguments[0], 1.0, arguments[1])


def test_no_number_is_copied_to_the_device_by_a_cast():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, scale = torch.randn(8, 8), torch.tensor(3.0)
    for asked in ({}, {"power_of_two": True}, {"granularity": PerRow()}, {"guard": True}):
        with Names() as names:
            quantize_plain(x, E4M3FN, None if "granularity" in asked else scale, **asked)  # pyright: ignore[reportArgumentType]
        assert not [name for name in names.seen if "lift_fresh" in name or "item" in name]
