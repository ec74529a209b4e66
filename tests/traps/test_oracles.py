"""The facts of the experiments by other libraries, by brute force, or on paper."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from oracles import ML_DTYPES, by_gfloat
from unclamp.formats import E4M3FN, FORMATS
from unclamp.traps import casts, gemms, ranks, scales, sums, training
from unclamp.traps.trap import agrees


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def as_e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_plain_casts_overflow_as_in_ml_dtypes_but_for_e4m3fn() -> None:
    facts = casts.plain_cast("cpu")
    bits = np.arange(0x10000, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    large = bits[np.isfinite(bits) & (np.abs(bits) > 61440)]
    for name in FORMATS:
        with np.errstate(all="ignore"):
            got = large.astype(ML_DTYPES[name]).astype(np.float32)
        ours = [facts[f"{name}: {fate}"] for fate in ("saturate", "Inf", "NaN")]
        if name == "e4m3fn" and torch.__version__ >= "2.13":
            assert ours == [len(large), 0, 0]
        else:
            assert ours == [0, np.isinf(got).sum(), np.isnan(got).sum()]


def test_gradients_are_rounded_as_gfloat_rounds() -> None:
    facts = casts.gradient_cast("cpu")
    small, middle, large = by_gfloat(np.array([4e-4, 300.0, 1e6]), E4M3FN)
    assert (facts["0.0004"], facts["300"]) == (small, middle) == (0, 288)
    if torch.__version__ >= "2.13":
        assert facts["1e6"] == large == 448


def test_rounding_twice_changes_what_it_changes_in_ml_dtypes() -> None:
    facts = casts.double_rounding("cpu")
    x = torch.empty(1 << 18)
    x = x.uniform_(-400, 400, generator=torch.Generator().manual_seed(0)).numpy()
    changed = as_e4m3(x) != as_e4m3(x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert facts["codes changed by way of bfloat16"] == pytest.approx(changed.mean())
    assert by_gfloat(np.array([1.0625 + 2**-40]), E4M3FN) == 1.125
    assert facts["1.0625 + 2**-40, right: 1.125"] == 1


def test_bfloat16_times_a_scale_changes_what_it_changes_in_ml_dtypes() -> None:
    x = seeded(1 << 16).numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    shares = []
    for amax in torch.linspace(4.5, 6, 16).numpy():
        scaled = x * (np.float32(448) / amax)
        twice = as_e4m3(scaled.astype(ml_dtypes.bfloat16).astype(np.float32))
        shares.append((as_e4m3(scaled) != twice).mean())
    found = scales.bfloat16_times_scale("cpu")["codes that differ"]
    assert found == pytest.approx(np.mean(shares), abs=1e-3)


def test_exponents_are_wrong_where_log2_rounds_up() -> None:
    """log2(2**k (1 - 2**-24)) is k - 8.6e-8, and float32 has no number in between for |k| > 2."""
    below = [math.ldexp(1 - 2**-24, k) for k in range(-100, 100)]
    wrong = sum(np.floor(np.float32(math.log2(x))) != math.frexp(x)[1] - 1 for x in below)
    assert scales.floor_of_log2("cpu")["wrong exponents"] == pytest.approx(wrong, abs=4)
    assert wrong == 196


def test_what_a_jump_loses_is_what_paper_says() -> None:
    facts = scales.delayed_history("cpu")
    by_hand = (9**3 / 3) / (10**3 / 3)  # of x uniform in [0, 10], what lies above 1
    assert facts["squares lost there"] == pytest.approx(by_hand, abs=0.002)
    assert facts["later steps scaled for the jump"] == 4


def test_a_tiny_amax_has_a_subnormal_inverse_and_one_smaller_an_inf_scale() -> None:
    tiny = np.finfo(np.float32).tiny
    assert 0 < np.float32(2e-36) / np.float32(448) < tiny
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(448) / np.float32(1e-37))
        assert np.isinf(np.float16(448) / np.float16(5e-4))
    facts = scales.subnormal_scale("cpu")
    assert (facts["scale_inv is normal"], facts["back / amax, flushing"]) == ("False", 0)
    assert facts["scale of amax 1e-37"] == math.inf
    assert float(torch.tensor(2e-36) / 448) > 0  # flushing was switched off again


def test_addmm_rounds_once_and_the_sum_twice() -> None:
    """In float64: rounded once after the bias, or before and after it."""
    x, w, bias = seeded(3, 256, 256).bfloat16().double()
    product = x @ w
    twice = (product.bfloat16().double() + bias).bfloat16()
    share = ((product + bias).bfloat16() != twice).double().mean().item()
    found = sums.addmm_rounds_once("cpu")["elements that differ"]
    assert found == pytest.approx(share, abs=0.02)


def test_sums_in_another_order_agree_to_rounding() -> None:
    """The bits differ; the values do not, so it is no fault of a kernel."""
    for experiment in (sums.first_row, sums.four_micro_batches):
        assert 0 < experiment("cpu")["elements that differ"] <= 1
    a = sums.normal(256, 1024, seed=0, device="cpu")
    b = sums.normal(1024, 256, seed=1, device="cpu")
    right = a[:1].double() @ b.double()
    for got in (a[:1] @ b, (a @ b)[:1]):
        assert (got - right).abs().max() < 1e-3  # of sums of 1,024 products of size 1


def test_hopper_like_sums_lose_what_mmaemu_says() -> None:
    mmaemu = pytest.importorskip("mmaemu")
    facts = gemms.hopper_like_accumulation("cpu")
    x = torch.rand(2, 16, 512, generator=torch.Generator().manual_seed(0))
    a, b = x.to(torch.float8_e4m3fn).float()
    codes = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    right = a.double() @ b.double().t()
    for name, fast in {"fast": True, "promoted every 128": False}.items():
        added = mmaemu.accumulate(
            *codes, use_fast_accum=fast, profile="hopper", splitk=1, backend="reference"
        )
        error = ((added.double() - right).abs() / right).mean().item()
        assert facts[f"K = 512, {name}"] == pytest.approx(error, rel=1e-6)


def test_half_of_one_and_a_bit_is_lost_in_bfloat16() -> None:
    assert float(np.float32(1 + 2**-8).astype(ml_dtypes.bfloat16)) / 2 == 0.5
    assert np.float32(1 + 2**-8) / 2 == 0.501953125
    (documented,) = next(t for t in ranks.TRAPS if t.name == "fsdp-reduce-dtype").documented
    assert set(documented.expected.values()) == {0.5, 0.501953125}


def test_one_bad_element_of_300_spoils_all_by_ieee_arithmetic() -> None:
    facts = training.clip_one_nan("cpu")
    for bad in (math.nan, math.inf):
        with np.errstate(all="ignore"):
            gradient = np.ones(300)
            gradient[0] = bad
            gradient *= min(1.0 / (np.sqrt((gradient**2).sum()) + 1e-6), 1.0) if bad == bad else bad
        assert facts[f"one {bad}: elements NaN"] == np.isnan(gradient).sum()
        assert facts[f"one {bad}: elements 0"] == (gradient == 0).sum()


@pytest.mark.parametrize(
    ("got", "wanted", "agree"),
    [
        (448.0, 448.0, True),
        (448.0, 448, True),
        (449.0, 448.0, False),
        ("nan", "nan", True),
        ("nan", 448.0, False),
        (448.0, "nan", False),
        (0.0, 0.0, True),
        (1e-30, 0.0, False),
    ],
)
def test_facts_agree_only_with_themselves(got, wanted, agree) -> None:
    assert agrees(got, wanted) is agree
