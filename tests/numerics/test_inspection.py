"""The closer look: both paths alike, and equal to a recount element by element."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclamp import E4M3FN, E5M2, FORMATS, MX, PerBlock, PerRow, PerTensor, quantize
from unclamp.numerics import dequantize, inspect
from unclamp.numerics.inspection import (
    DETAILS,
    ERROR_SQUARE,
    EXPONENTS,
    INSPECTED,
    INSPECTED_SQUARE,
    LOWEST_EXPONENT,
    MAGNITUDES,
    QUARTERS,
    RESTS,
    inspect_plain,
    range_used,
)

EVERY_HALF = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
GRANULARITIES = [PerTensor(), PerRow(), PerBlock(3, 5), MX()]
SQUARES = [INSPECTED_SQUARE, ERROR_SQUARE]


def look(x, fmt=E4M3FN, scale=None, granularity=PerTensor(), axis=-1):
    """Return the vector of a cast by the usual path, having checked it against plain torch."""
    q = quantize(x, fmt, scale, granularity=granularity, axis=axis)
    got = inspect(x, q.codes, q.scale_inv, granularity=granularity, axis=axis)
    want = inspect_plain(x, q.codes, dequantize(q))
    counts = [i for i in range(DETAILS) if i not in SQUARES]
    assert torch.equal(got[counts], want[counts])
    # Sums in another order: n float64 roundings of at most 2**-53 each.
    torch.testing.assert_close(got[SQUARES], want[SQUARES], rtol=max(x.numel(), 8) * 2**-53, atol=0)
    return got, q


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 37.7, 2.0**-20])
def test_both_paths_agree_on_every_half_precision_input(dtype, fmt, scale):
    look(EVERY_HALF.view(dtype), fmt, torch.tensor(scale))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_both_paths_agree_on_blocks_and_strides(granularity, axis):
    torch.manual_seed(0)
    x = (torch.randn(70, 41) * torch.logspace(-30, 10, 41)).t()
    look(x, granularity=granularity, axis=axis)


@given(st.lists(st.floats(width=32), max_size=40), st.sampled_from(list(FORMATS.values())))
def test_a_recount_element_by_element_gives_the_same(values, fmt):
    x = torch.tensor(values, dtype=torch.float32)
    got, q = look(x, fmt)
    finite = [(v, w) for v, w in zip(values, dequantize(q).tolist(), strict=True)
              if math.isfinite(v)]  # fmt: skip
    exponents = Counter(math.frexp(v)[1] - 1 for v, _ in finite if v != 0)
    counts = got[EXPONENTS].to(torch.int64).tolist()
    assert {i + LOWEST_EXPONENT: n for i, n in enumerate(counts) if n} == exponents
    quarters = Counter()
    rests = Counter()
    for value, _ in finite:
        mantissa, exponent = math.frexp(abs(value))
        if value != 0 and -64 <= exponent - 1 <= 63:
            key = 4 * (exponent - 1) + int(8 * mantissa) - 4
            quarters[key] += 1
            rests[key] += int(mantissa * 2**24) % 2**21
    for bins, want in ((QUARTERS, quarters), (RESTS, rests)):
        counts = got[bins].to(torch.int64).tolist()
        assert {i - 256: n for i, n in enumerate(counts) if n} == {
            k: n for k, n in want.items() if n
        }
    assert got[INSPECTED] == 1
    assert got[MAGNITUDES].sum() == len(finite)
    assert float(got[ERROR_SQUARE]) == pytest.approx(sum((v - w) ** 2 for v, w in finite))
    assert float(got[INSPECTED_SQUARE]) == pytest.approx(sum(v * v for v, _ in finite))


def test_sqnr_of_a_uniform_tensor_is_that_of_three_mantissa_bits():
    # Uniform within a binade: error power is step**2 / 12, mean square 7/3 of the binade's
    # start squared; step is 1/8 of it.
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 1
    got, _ = look(x, E4M3FN, torch.tensor(1.0))
    sqnr_db = 10 * math.log10(got[INSPECTED_SQUARE] / got[ERROR_SQUARE])
    assert sqnr_db == pytest.approx(10 * math.log10((7 / 3) * 12 * 64), abs=0.05)


def test_an_exact_cast_has_no_error_and_an_empty_one_nothing():
    got, _ = look(torch.tensor([1.0, -2.0, 0.5]), E5M2, torch.tensor(1.0))
    assert got[ERROR_SQUARE] == 0
    empty, _ = look(torch.empty(0))
    assert empty.sum() == empty[INSPECTED] == 1


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_code_uses_all_of_the_range_and_one_code_one_binade(fmt):
    binades = math.log2(fmt.max) // 1 - math.log2(fmt.min_subnormal) + 1
    everything = np.ones(128)
    assert range_used(everything, fmt) == 1
    one = np.zeros(128)
    one[_code_of(1.0, fmt)] = 7
    assert range_used(one, fmt) == pytest.approx(1 / binades)
    zeros = np.zeros(128)
    zeros[0] = 3
    assert range_used(zeros, fmt) == 0


def _code_of(value, fmt):
    return next(code for code in range(128) if fmt.decode(code) == value)
