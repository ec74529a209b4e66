import math
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import RoundMode, round_ndarray
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import GFLOAT
from unclamp.errors import UnsupportedError
from unclamp.formats import E4M3FN, E5M2, FORMATS, Format, get_format
from unclamp.numerics import Stat, cast, dequantize, empty_stats, merge_stats, quantize, torch_dtype
from unclamp.reference import float32, is_saturated, round_to_format

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
some_format = st.sampled_from(list(FORMATS.values()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def inputs(kind: str) -> Tensor:
    """All codes of a 16-bit dtype; for float32 a mix of all bit patterns and FP8's own range."""
    if kind in ("bfloat16", "float16"):
        codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        return codes.view(getattr(torch, kind))
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 40_000, dtype=np.uint32).view(np.float32)
    exponents = rng.uniform(-20, 18, 50_000)
    near = (rng.choice([-1.0, 1.0], 50_000) * np.exp2(exponents)).astype(np.float32)
    # Halfway points of each format, and their float32 neighbours.
    ties = []
    for fmt in FORMATS.values():
        grid = np.array([fmt.decode(c) for c in range(fmt.max_code + 1)])
        middle = np.append((grid[1:] + grid[:-1]) / 2, fmt.overflow_limit).astype(np.float32)
        ties += [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(1e9))]
    tied = np.concatenate(ties)
    rest = 100_000 - 90_000 - 2 * len(tied)
    more = rng.integers(0, 1 << 32, rest, dtype=np.uint32).view(np.float32)
    return torch.from_numpy(np.concatenate([anything, near, tied, -tied, more]))


def as_numpy(x: Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy()


@cache
def reference_of(kind: str, name: str) -> np.ndarray:
    fmt = get_format(name)
    return np.array([round_to_format(v, fmt) for v in as_numpy(inputs(kind)).tolist()])


def assert_same_floats(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal in value and sign of zero; any NaN equals any NaN."""
    np.testing.assert_array_equal(got, expected)
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[real]), np.signbit(expected[real]))


def same_codes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def one(value: float, fmt: Format) -> float:
    return float(cast(torch.tensor([float(value)]), 1.0, fmt).to(torch.float32))


# ---- against oracles -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@every_format
def test_cast_equals_the_scalar_reference(kind, fmt):
    x = inputs(kind)
    assert len(x) == (100_000 if kind == "float32" else 65_536)
    assert_same_floats(as_numpy(cast(x, 1.0, fmt)), reference_of(kind, fmt.name))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@every_format
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_cast_equals_ml_dtypes_where_nothing_saturates(kind, fmt):
    x = inputs(kind)
    values = x.to(torch.float32).numpy()
    oracle = values.astype(getattr(ml_dtypes, f"float8_{fmt.name}")).astype(np.float64)
    kept = ~(np.abs(values) > fmt.overflow_limit)
    assert_same_floats(as_numpy(cast(x, 1.0, fmt))[kept], oracle[kept])
    assert not np.isfinite(oracle[~kept]).any()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@every_format
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_cast_equals_gfloat_with_saturation(kind, fmt):
    x = inputs(kind)
    values = as_numpy(x)
    oracle = round_ndarray(GFLOAT[fmt.name], np.clip(values, -1e6, 1e6), RoundMode.TiesToEven, True)
    assert_same_floats(as_numpy(cast(x, 1.0, fmt)), oracle)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2.0**20])
@every_format
def test_counts_equal_a_recount_with_the_scalar_reference(kind, scale, fmt):
    x = inputs(kind)
    scale = float32(scale)
    saturated = underflowed = nonfinite = 0
    amax = -1.0
    for value in as_numpy(x).tolist():
        if not math.isfinite(value):
            nonfinite += 1
            continue
        amax = max(amax, abs(value))
        product = float32(value * scale)
        saturated += math.isinf(product) or is_saturated(product, fmt)
        underflowed += (
            value != 0 and abs(product) < fmt.min_normal and (round_to_format(product, fmt) == 0)
        )
    stats = quantize(x, fmt, torch.tensor(scale)).stats
    assert stats[Stat.ELEMENTS] == x.numel()
    assert stats[Stat.SATURATED] == saturated
    assert stats[Stat.UNDERFLOWED] == underflowed
    assert stats[Stat.NONFINITE] == nonfinite
    assert stats[Stat.AMAX] == amax
    assert stats[Stat.SCALE_INV] == float32(1 / scale)
    assert stats[Stat.CASTS] == 1
    assert stats[Stat.RECAST] == 0


@pytest.mark.parametrize(
    ("fmt", "value", "expected"),
    [
        (E4M3FN, 2.0**-10, 0),
        (E4M3FN, 0.0009766, 2.0**-9),
        (E4M3FN, 0.0029296875, 0.00390625),
        (E4M3FN, 17, 16),
        (E4M3FN, 19, 20),
        (E4M3FN, 432, 448),
        (E4M3FN, 447, 448),
        (E4M3FN, 464, 448),
        (E4M3FN, 1e30, 448),
        (E4M3FN, math.inf, 448),
        (E5M2, 7.6293945e-6, 0),
        (E5M2, 9, 8),
        (E5M2, 11, 12),
        (E5M2, 53248, 49152),
        (E5M2, 57343, 57344),
        (E5M2, 61440, 57344),
        (E5M2, 1e30, 57344),
        (E5M2, math.inf, 57344),
    ],
)
def test_the_golden_roundings(fmt, value, expected):
    assert one(value, fmt) == round_to_format(value, fmt) == expected
    assert one(-value, fmt) == round_to_format(-value, fmt) == -expected


@every_format
def test_nan_stays_nan(fmt):
    assert math.isnan(one(math.nan, fmt))
    assert math.isnan(round_to_format(math.nan, fmt))


@every_format
def test_what_this_torch_does_with_native_overflow(fmt):
    # Not our behaviour but torch's: if this fails, update the table and `unclamp probe`'s words.
    major, minor = map(int, torch.__version__.split(".")[:2])
    e4m3 = 0 if (major, minor) >= (2, 13) else 30_510
    beliefs = {"e4m3fn": (e4m3, 0), "e5m2": (0, 28_704), "e4m3fnuz": (30_736, 0)}
    beliefs["e5m2fnuz"] = (28_704, 0)
    x = inputs("bfloat16")
    native = x[x.isfinite()].to(torch_dtype(fmt)).to(torch.float32)
    assert len(native) == 65_280
    assert (int(native.isnan().sum()), int(native.isinf().sum())) == beliefs[fmt.name]


# ---- properties ----------------------------------------------------------------------------

finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(2.0**-40, 2.0**40, width=32) | st.floats(-(2.0**40), -(2.0**-40), width=32)


@every_format
def test_cast_keeps_every_value_of_the_format(fmt):
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(fmt))
    finite = codes.to(torch.float32).isfinite()
    again = cast(codes.to(torch.float32), 1.0, fmt)
    assert same_codes(again[finite], codes[finite])


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@every_format
def test_cast_is_idempotent_monotone_and_odd(kind, fmt):
    x = inputs(kind).to(torch.float32)
    x = x[~x.isnan()].sort().values
    y = cast(x, 1.0, fmt).to(torch.float32)
    assert torch.equal(cast(y, 1.0, fmt).to(torch.float32), y)
    assert bool((y.diff() >= 0).all())
    assert torch.equal(cast(-x, 1.0, fmt).to(torch.float32), -y)


@given(value=st.floats(-448, 448, width=32) | finite32, fmt=some_format)
def test_cast_gives_a_nearest_value(value, fmt):
    clipped = min(max(value, -fmt.max), fmt.max)
    grid = [fmt.decode(c) for c in range(fmt.max_code + 1)]
    nearest = min(abs(abs(clipped) - v) for v in grid)
    assert abs(one(value, fmt) - clipped) == nearest
    if fmt.min_normal <= abs(clipped):
        ulp = math.ldexp(1, math.frexp(clipped)[1] - 1 - fmt.mantissa_bits)
        assert nearest <= ulp / 2


@given(xs=st.lists(moderate, min_size=1, max_size=20), k=st.integers(-20, 20), fmt=some_format)
def test_scaling_by_a_power_of_two_commutes(xs, k, fmt):
    x, factor = torch.tensor(xs), 2.0**k
    assert same_codes(cast(x * factor, 1.0, fmt), cast(x, factor, fmt))
    one_way, other = quantize(x, fmt), quantize(x * factor, fmt)
    assert same_codes(one_way.codes, other.codes)
    assert torch.equal(one_way.scale_inv * factor, other.scale_inv)


@given(
    parts=st.lists(st.lists(st.floats(width=32), max_size=12), min_size=1, max_size=4),
    scale=st.floats(2.0**-30, 2.0**30, width=32),
    fmt=some_format,
)
def test_statistics_of_a_concatenation_are_the_merged_ones(parts, scale, fmt):
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    fixed = torch.tensor(scale)
    merged = empty_stats(1)[0]
    for tensor in tensors:
        merge_stats(merged, quantize(tensor, fmt, fixed).stats)
    whole = quantize(torch.cat(tensors), fmt, fixed).stats
    sums = [Stat.SQUARE, Stat.SATURATED_SQUARE]
    exact = [s for s in Stat if s not in (*sums, Stat.CASTS)]
    assert torch.equal(merged[exact], whole[exact])
    assert merged[Stat.CASTS] == len(parts)
    torch.testing.assert_close(merged[sums], whole[sums], rtol=1e-5, atol=0)


@pytest.mark.parametrize("margin", [0, 1, 64])
@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_scaling_never_saturates_a_finite_element(dtype, fmt, margin):
    rng = np.random.default_rng(1)
    bits = torch.from_numpy(rng.integers(-(1 << 31), 1 << 31, 20_000, dtype=np.int32))
    anything = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16)
    anything = anything.view(dtype)
    wide = torch.from_numpy(rng.standard_normal((64, 32)).astype(np.float32))
    info = torch.finfo(dtype)
    for row in [
        *wide * torch.exp2(torch.linspace(-40, 15, 64)).unsqueeze(1),
        *anything.reshape(-1, 8)[:200],
        anything,
        torch.tensor([info.max, info.tiny, -info.max, 0.0]),
        torch.tensor([info.tiny * info.eps]),
        torch.tensor([math.inf, 3.0, math.nan]),
    ]:
        quantized = quantize(row.to(dtype), fmt, margin=margin)
        finite = row.to(dtype).isfinite()
        assert quantized.stats[Stat.SATURATED] == 0
        assert quantized.stats[Stat.SATURATED_SQUARE] == 0
        if margin < 64:  # there the scale is clipped, and 3.4e38 rounds up to 2**128
            assert bool(dequantize(quantized)[finite].isfinite().all())


# ---- dtypes and shapes ---------------------------------------------------------------------


def shaped(shape: str, dtype: torch.dtype) -> Tensor:
    base = torch.randn(7, 13, generator=torch.Generator().manual_seed(2)).mul_(600).to(dtype)
    return {
        "0-d": base[0, 0],
        "empty": base[:0],
        "no columns": base[:, :0],
        "one row": base[:1],
        "odd": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(5, 13),
        "expanded scalar": base[0, 0].expand(3, 5),
    }[shape]


@pytest.mark.parametrize(
    "shape",
    [
        "0-d",
        "empty",
        "no columns",
        "one row",
        "odd",
        "transposed",
        "strided",
        "expanded",
        "expanded scalar",
    ],
)
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_layout_change_nothing(dtype, scale, shape):
    x = shaped(shape, dtype)
    before = x.clone()
    fixed = None if scale is None else torch.tensor(scale)
    quantized = quantize(x, E4M3FN, fixed)
    assert torch.equal(x, before)
    assert quantized.codes.shape == x.shape
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert quantized.scale_inv.shape == ()
    assert quantized.scale_inv.dtype == torch.float32
    used = 1 / quantized.scale_inv if not scale else torch.tensor(scale)
    flat = quantize(before.to(torch.float32).contiguous().flatten(), E4M3FN, fixed)
    assert same_codes(quantized.codes.contiguous().flatten(), flat.codes)
    torch.testing.assert_close(quantized.stats, flat.stats, rtol=1e-5, atol=0)
    expected = [round_to_format(float32(v * float(used)), E4M3FN) for v in flat_list(before)]
    if scale:
        assert flat_list(quantized.codes.to(torch.float32)) == expected
        assert same_codes(cast(x, used, E4M3FN), quantized.codes)
    assert quantized.stats[Stat.ELEMENTS] == x.numel()
    assert (quantized.stats[Stat.AMAX] == -1) == (x.numel() == 0)


def flat_list(x: Tensor) -> list[float]:
    return x.to(torch.float64).flatten().tolist()


@pytest.mark.parametrize("values", [[], [0.0, -0.0], [math.nan, math.inf]])
def test_without_a_nonzero_finite_element_the_own_scale_is_one(values):
    stats = quantize(torch.tensor(values), E4M3FN).stats
    assert stats[Stat.SCALE_INV] == 1
    assert stats[Stat.SQUARE] == stats[Stat.UNDERFLOWED] == stats[Stat.SATURATED] == 0
    assert stats[Stat.AMAX] == (0 if 0.0 in values else -1)


def test_nonfinite_elements_do_not_decide_a_scale():
    x = torch.tensor([1.0, -2.0, math.inf, -math.inf, math.nan])
    quantized = quantize(x, E4M3FN)
    assert quantized.scale_inv == 1 / torch.tensor(224.0)
    values = dequantize(quantized)
    assert values[:4].tolist() == [1.0, -2.0, 2.0, -2.0]
    assert math.isnan(values[4])
    assert quantized.stats[Stat.NONFINITE] == 3
    assert quantized.stats[Stat.SATURATED] == 0
    assert quantized.stats[Stat.SQUARE] == pytest.approx(5)


def test_a_bf16_tensor_times_a_float32_scale_is_taken_in_float32():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    scale = torch.tensor(37.3)
    got = cast(x, scale, E4M3FN)
    assert same_codes(got, cast(x.to(torch.float32), scale, E4M3FN))
    assert same_codes(got, quantize(x, E4M3FN, scale).codes)
    naive = (x * scale).to(torch.float8_e4m3fn)
    changed = (naive.view(torch.uint8) != got.view(torch.uint8)).float().mean()
    assert 0.02 < changed < 0.10


def test_a_scale_can_differ_by_row():
    x, scale = torch.randn(3, 5), torch.tensor([[1.0], [10.0], [100.0]])
    rows = [cast(x[i], float(scale[i]), E5M2) for i in range(3)]
    assert same_codes(cast(x, scale, E5M2), torch.stack(rows))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@every_format
def test_square_sums_equal_a_float64_recount(size, fmt):
    x = torch.randn(5_000, generator=torch.Generator().manual_seed(4)) * size
    scale = torch.tensor(fmt.max / size)
    stats = quantize(x, fmt, scale).stats
    wide = x.to(torch.float64)
    scaled = x * scale
    lost = wide.abs() - fmt.max / scale.to(torch.float64)
    expected = lost[scaled.abs() > fmt.overflow_limit].square().sum()
    assert stats[Stat.SATURATED] > 500
    torch.testing.assert_close(stats[Stat.SATURATED_SQUARE], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(stats[Stat.SQUARE], wide.square().sum(), rtol=1e-5, atol=0)


def test_a_product_beyond_float32_counts_as_saturated():
    quantized = quantize(torch.tensor([3e38, -3e38, 1.0]), E4M3FN, torch.tensor(1e30))
    assert quantized.codes.to(torch.float32).tolist() == [448, -448, 448]
    assert quantized.stats[Stat.SATURATED] == 3
    assert quantized.stats[Stat.SATURATED_SQUARE] == pytest.approx(2 * float32(3e38) ** 2)


def test_a_zero_scale_stands_for_the_tensors_own():
    x = torch.randn(50)
    own, zero = quantize(x, E4M3FN, margin=3), quantize(x, E4M3FN, torch.zeros(()), margin=3)
    assert same_codes(own.codes, zero.codes)
    assert torch.equal(own.stats, zero.stats)


def test_a_cast_carries_no_gradient():
    x = torch.randn(4, requires_grad=True)
    assert not quantize(x, E4M3FN).scale_inv.requires_grad
    assert not cast(x, 1.0, E4M3FN).requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_no_float_is_refused(dtype):
    with pytest.raises(UnsupportedError, match="floating-point"):
        quantize(torch.zeros(2, dtype=dtype), E4M3FN)


def test_merging_the_neutral_element_changes_nothing():
    stats = quantize(torch.tensor([1.0, math.nan, 500.0]), E4M3FN, torch.tensor(1.0)).stats
    merged = stats.clone()
    merge_stats(merged, empty_stats(1)[0])
    assert torch.equal(merged, stats)
    other = empty_stats(1)[0]
    merge_stats(other, stats)
    assert torch.equal(other, stats)
