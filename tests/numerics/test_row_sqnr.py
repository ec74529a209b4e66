"""Signal over error by row: the median by brute force, and what it sees that the whole does not."""

import math

import numpy as np
import pytest
import torch

from unclamp import E4M3FN, E5M2, MX, PerRow, PerTensor, quantize
from unclamp.numerics import dequantize, inspect
from unclamp.numerics.inspection import (
    ERROR_SQUARE,
    INSPECTED_SQUARE,
    ROW_BINS,
    ROW_SQNR,
    inspect_plain,
    row_median_db,
)

HALF_A_BIN = 0.25


def brute_force(x: torch.Tensor, q) -> list[float]:
    """Return each row's ratio in decibel, sorted; NaN and Inf left out, rows of zeros too."""
    wide = x.double().numpy().reshape(-1, x.shape[-1] if x.ndim else 1)
    back = dequantize(q).double().numpy().reshape(wide.shape)
    found = []
    for row, kept in zip(wide, back, strict=True):
        there = np.isfinite(row)
        signal = sum(float(v) ** 2 for v in row[there])
        noise = sum(
            (float(v) - float(w)) ** 2 for v, w in zip(row[there], kept[there], strict=True)
        )
        if signal > 0:
            found.append(10 * math.log10(signal / noise) if noise > 0 else math.inf)
    return sorted(found)


def look(x: torch.Tensor, fmt=E4M3FN, scale=None, granularity=PerTensor(), axis=-1):
    q = quantize(x, fmt, scale, granularity=granularity, axis=axis)
    fused = inspect(x, q.codes, q.scale_inv, granularity=granularity, axis=axis)
    plain = inspect_plain(x, q.codes, dequantize(q))
    assert torch.equal(fused[ROW_SQNR], plain[ROW_SQNR])
    return fused, q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 41), (3, 5, 7), (9,), (1, 4000), (301, 1)])
@pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda f: f.name)
def test_the_median_is_that_of_brute_force(dtype, shape, fmt) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.logspace(-4, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(shape, generator=generator) * spread).to(dtype)
    got, q = look(x, fmt, torch.tensor(8.0))
    rows = brute_force(x, q)
    median = row_median_db(got[ROW_SQNR].numpy())
    assert int(got[ROW_SQNR].sum()) == len(rows)
    want = rows[(len(rows) - 1) // 2]
    assert median == (math.inf if math.isinf(want) else pytest.approx(want, abs=HALF_A_BIN))


@pytest.mark.parametrize("granularity", [PerRow(), MX()], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_those_of_the_tensor_whatever_shares_a_scale(granularity, axis) -> None:
    torch.manual_seed(0)
    x = (torch.randn(70, 64) * torch.logspace(-6, 3, 64)).t()
    got, q = look(x, granularity=granularity, axis=axis)
    rows = brute_force(x, q)
    assert row_median_db(got[ROW_SQNR].numpy()) == pytest.approx(rows[31], abs=HALF_A_BIN)


def test_one_massive_token_hides_underflow_from_the_whole_and_not_from_the_rows() -> None:
    """As of a pretrained transformer's first token: 3,000 in one channel, beside noise of 0.01."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    x[0] = 0
    x[0, 3] = 3072.0
    got, q = look(x)
    underflowed = float(((dequantize(q) == 0) & (x != 0)).double().mean())
    assert underflowed > 0.09
    whole = 10 * math.log10(got[INSPECTED_SQUARE] / got[ERROR_SQUARE])
    median = row_median_db(got[ROW_SQNR].numpy())
    assert whole > 60
    assert median is not None
    assert median < 25
    assert median == pytest.approx(brute_force(x, q)[127], abs=HALF_A_BIN)


def test_rows_of_zeros_and_what_is_not_finite_are_left_out() -> None:
    x = torch.tensor([[0.0, 0.0], [math.nan, math.inf], [1.1, math.nan], [0.0, -0.0]])
    got, q = look(x, scale=torch.tensor(1.0))
    (want,) = brute_force(x, q)
    assert row_median_db(got[ROW_SQNR].numpy()) == pytest.approx(want, abs=HALF_A_BIN)
    nothing, _ = look(torch.zeros(3, 2))
    empty, _ = look(torch.empty(0, 4))
    none, _ = look(torch.empty(4, 0))
    for details in (nothing, empty, none):
        assert row_median_db(details[ROW_SQNR].numpy()) is None


def test_exact_rows_are_infinite_and_lost_ones_zero_decibel() -> None:
    exact, _ = look(torch.tensor([[1.0, 2.0], [0.5, 4.0], [1.1, 1.0]]), scale=torch.tensor(1.0))
    assert row_median_db(exact[ROW_SQNR].numpy()) == math.inf
    lost, _ = look(torch.full((3, 2), 1e-9), scale=torch.tensor(1.0))
    assert row_median_db(lost[ROW_SQNR].numpy()) == 0


def test_beyond_the_bins_the_outermost_count() -> None:
    """A clamped row may have any ratio above 0 dB; -20 dB takes an error ten times the signal."""
    counts = np.zeros(ROW_BINS)
    counts[0] = 1
    assert row_median_db(counts) == -20
    counts[ROW_BINS - 2] = 2
    assert row_median_db(counts) == 80


def test_casts_add_up_to_the_median_over_all_their_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [
        torch.randn(n, 32, generator=generator) * s for n, s in ((5, 1.0), (8, 1e-3), (4, 1e-2))
    ]
    looks = [look(x, scale=torch.tensor(1.0)) for x in parts]
    rows = sorted(db for x, (_, q) in zip(parts, looks, strict=True) for db in brute_force(x, q))
    total = torch.stack([got[ROW_SQNR] for got, _ in looks]).sum(0)
    assert row_median_db(total.numpy()) == pytest.approx(rows[8], abs=HALF_A_BIN)
