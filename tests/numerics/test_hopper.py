import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from unclamp.formats import E4M3FN, E4M3FNUZ, E5M2, Format
from unclamp.numerics import torch_dtype
from unclamp.numerics.hopper import hopper_matmul

every_pair = pytest.mark.parametrize(
    ("a_format", "b_format"),
    [(E4M3FN, E4M3FN), (E5M2, E4M3FN), (E4M3FN, E5M2), (E5M2, E5M2)],
    ids=lambda fmt: fmt.name,
)
both_modes = pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])


# Operands that bring out one part of the rule each: `[rows, k]`, values of the format.


def any_code(rows: int, k: int, fmt: Format) -> Tensor:
    finite = [v for v in map(fmt.decode, range(256)) if math.isfinite(v)]
    return torch.tensor(finite)[torch.randint(len(finite), (rows, k))]


def normal(rows: int, k: int, fmt: Format) -> Tensor:
    return to_format(torch.randn(rows, k), fmt)


def positive(rows: int, k: int, fmt: Format) -> Tensor:
    return to_format(torch.rand(rows, k), fmt)


def subnormal(rows: int, k: int, fmt: Format) -> Tensor:
    """Subnormals and values just above, one in eight scaled up to meet the others' subnormals."""
    top = 2 << fmt.mantissa_bits
    small = torch.randint(-top, top + 1, (rows, k)) * fmt.min_subnormal
    return torch.where(torch.rand(rows, k) < 1 / 8, small * 2.0 ** (4 - fmt.min_exponent), small)


def cancelling(rows: int, k: int, fmt: Format) -> Tensor:
    """Pairs of opposite numbers, shuffled along K, and a small rest."""
    half = any_code(rows, k // 2, fmt)
    rest = normal(rows, k - 2 * (k // 2) + 3, fmt)
    return torch.cat([half, -half, rest], dim=1)[:, torch.randperm(k + 3)][:, :k]


def sparse(rows: int, k: int, fmt: Format) -> Tensor:
    return any_code(rows, k, fmt) * (torch.rand(rows, k) < 0.03)


every_kind = pytest.mark.parametrize(
    "kind", [any_code, normal, positive, subnormal, cancelling, sparse], ids=lambda k: k.__name__
)


def to_format(x: Tensor, fmt: Format) -> Tensor:
    return x.to(torch_dtype(fmt)).to(torch.float32)


def bits(x: Tensor) -> list[list[int]]:
    return x.view(torch.int32).tolist()


# The rule again, one output at a time in exact fractions.


def exponent(x: Fraction) -> int:
    """Return floor(log2 |x|)."""
    guess = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return guess if abs(x) >= Fraction(2) ** guess else guess - 1


def stored_exponent(x: Fraction, fmt: Format) -> int:
    return max(exponent(x), fmt.min_exponent)


def truncate(x: Fraction, unit: Fraction) -> Fraction:
    return int(x / unit) * unit


def reference_dot(
    a: list[float], b: list[float], *, fast: bool, a_format: Format, b_format: Format
) -> float:
    promoted, c = np.float32(0), Fraction(0)
    pairs = [(Fraction(x), Fraction(y)) for x, y in zip(a, b, strict=True)]
    for start in range(0, len(pairs), 32):
        if start % 128 == 0 and not fast:
            promoted, c = promoted + np.float32(float(c)), Fraction(0)
        terms = [
            (stored_exponent(x, a_format) + stored_exponent(y, b_format), x * y)
            for x, y in pairs[start : start + 32]
            if x and y
        ]
        terms += [(exponent(c), c)] if c else []
        if terms:
            unit = Fraction(2) ** (max(e for e, _ in terms) - 13)
            c = sum((truncate(term, unit) for _, term in terms), Fraction(0))
            c = truncate(c, Fraction(2) ** (exponent(c) - 13)) if c else c
    return float(promoted + np.float32(float(c)))


def by_reference(a: Tensor, b: Tensor, **settings) -> Tensor:
    rows = [[reference_dot(x, y, **settings) for y in b.tolist()] for x in a.tolist()]
    return torch.tensor(rows, dtype=torch.float32)


@both_modes
@every_kind
@every_pair
def test_bits_are_the_reference_s(a_format, b_format, kind, fast):
    a, b = kind(4, 300, a_format), kind(5, 300, b_format)
    settings = {"fast": fast, "a_format": a_format, "b_format": b_format}
    assert bits(hopper_matmul(a, b, **settings)) == bits(by_reference(a, b, **settings))


@both_modes
@every_kind
@every_pair
def test_bits_are_mmaemu_s(a_format, b_format, kind, fast):
    mmaemu = pytest.importorskip("mmaemu")
    for k in (1, 32, 100, 128, 257, 640):
        a, b = kind(16, k, a_format), kind(270, k, b_format)
        codes = a.to(torch_dtype(a_format)), b.to(torch_dtype(b_format))
        expected = mmaemu.accumulate(
            *codes, use_fast_accum=fast, profile="hopper", splitk=1, backend="reference"
        )
        got = hopper_matmul(a, b, fast=fast, a_format=a_format, b_format=b_format)
        assert bits(got) == bits(expected)


def test_every_product_of_two_codes_is_exact():
    a = torch.tensor([v for v in map(E4M3FN.decode, range(256)) if math.isfinite(v)])[:, None]
    b = torch.tensor([v for v in map(E5M2.decode, range(256)) if math.isfinite(v)])[:, None]
    got = hopper_matmul(a, b, fast=True, b_format=E5M2)
    assert torch.equal(got, a @ b.t())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # 13 bits below the largest exponent are kept, the 14th is not.
        ([1, 2**-6], [1, 2**-7], 1 + 2**-13),
        ([1, 2**-6], [1, 2**-8], 1),
        ([1, -(2**-6)], [1, 2**-8], 1),  # towards zero, and not towards -inf
        # 2.25 counts as 2**0: its grid still holds 2**-13.
        ([1.5, 2**-6], [1.5, 2**-7], 2.25),  # the sum is cut: 2.25 has a grid of 2**-12
        ([1.5, -1.5, 2**-6], [1.5, 1.5, 2**-7], 2**-13),
        # 2**-9 counts as 2**-6, so that 2**-9 * 2**8 has a grid of 2**-11.
        ([2**-9, -(2**-9), 2**-6], [2**8, 2**8, 2**-5], 2**-11),
        ([2**-9, -(2**-9), 2**-6], [2**8, 2**8, 2**-6], 0),
        # A zero has no exponent, whatever it meets.
        ([0, 2**-9], [448, 2**-9], 2**-18),
    ],
)
@both_modes
def test_the_rule_by_hand(a, b, expected, fast):
    got = hopper_matmul(torch.tensor([a]).float(), torch.tensor([b]).float(), fast=fast)
    assert got.tolist() == [[expected]]


def test_only_the_slow_mode_keeps_what_is_small_against_the_sum_so_far():
    a = torch.zeros(1, 129)
    a[0, 0], a[0, 128] = 256, 2**-6
    b = torch.ones(1, 129)
    assert hopper_matmul(a, b, fast=True).item() == 256
    assert hopper_matmul(a, b, fast=False).item() == 256 + 2**-6
    # Within 128 both cut.
    a[0, 32], a[0, 128] = a[0, 128].item(), 0
    assert hopper_matmul(a, b, fast=False).item() == 256


def test_the_same_value_counts_differently_as_subnormal_and_as_normal():
    a = torch.tensor([[2**-9, -(2**-9), 2**-6]])
    b = torch.tensor([[2**8, 2**8, 2**-6]])
    assert hopper_matmul(a, b, fast=True).item() == 0
    assert hopper_matmul(a, b, fast=True, a_format=E5M2).item() == 2**-12


@pytest.mark.parametrize(
    ("k", "low", "high"), [(512, 0.004, 0.006), (2048, 0.027, 0.036), (8192, 0.12, 0.15)]
)
def test_fast_accumulation_loses_ever_more_of_a_growing_sum(k, low, high):
    a, b = positive(24, k, E4M3FN), positive(24, k, E4M3FN)
    exact = a.double() @ b.double().t()
    lost = 1 - hopper_matmul(a, b, fast=True) / exact
    assert low < lost.mean() < high
    assert bool((lost > 0).all())
    lost = 1 - hopper_matmul(a, b, fast=False) / exact
    assert 0.0003 < lost.mean() < 0.0008


@both_modes
def test_nan_and_inf_stay_in_their_row_and_column(fast):
    a, b = normal(300, 70, E5M2), normal(9, 70, E5M2)
    clean = hopper_matmul(a, b, fast=fast, a_format=E5M2, b_format=E5M2)
    a[3, 64], a[299, 0], b[5, 1] = math.nan, math.inf, math.nan
    got = hopper_matmul(a, b, fast=fast, a_format=E5M2, b_format=E5M2)
    assert bool(got[3].isnan().all())
    assert bool(got[:, 5].isnan().all())
    others = [0, 1, 2, 3, 4, 6, 7, 8]
    assert torch.equal(got[299, others], b[others, 0].sign() * math.inf)
    clean[3], clean[299], clean[:, 5] = 0, 0, 0
    got[3], got[299], got[:, 5] = 0, 0, 0
    assert bits(got) == bits(clean)


def test_inf_times_zero_is_nan():
    a, b = torch.tensor([[math.inf, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert hopper_matmul(a, b, fast=True, a_format=E5M2).isnan().item()


@pytest.mark.parametrize("k", [1, 31, 33, 100, 127, 129, 200])
@both_modes
def test_zeros_at_the_end_of_k_change_nothing(k, fast):
    a, b = any_code(7, k, E4M3FN), any_code(8, k, E4M3FN)
    padded = [torch.nn.functional.pad(x, (0, 300 - k)) for x in (a, b)]
    assert bits(hopper_matmul(a, b, fast=fast)) == bits(hopper_matmul(*padded, fast=fast))


@both_modes
def test_bits_do_not_depend_on_threads(fast):
    a, b = normal(600, 64, E4M3FN), normal(520, 64, E4M3FN)
    alone = hopper_matmul(a, b, fast=fast)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(hopper_matmul(a, b, fast=fast), alone)
    finally:
        torch.set_num_threads(before)


@both_modes
def test_rows_do_not_depend_on_each_other(fast):
    a, b = any_code(300, 96, E4M3FN), any_code(270, 96, E4M3FN)
    whole = hopper_matmul(a, b, fast=fast)
    p, q = torch.randperm(300), torch.randperm(270)[:33]
    assert torch.equal(hopper_matmul(a[p], b[q], fast=fast), whole[p][:, q])
    assert torch.equal(hopper_matmul(b, a, fast=fast), whole.t())
    assert torch.equal(hopper_matmul(-a, b, fast=fast), -whole)


def test_strides_and_gradients_do_not_matter():
    a, b = any_code(40, 66, E4M3FN), any_code(30, 66, E4M3FN)
    expected = hopper_matmul(a[:, ::2].contiguous(), b[:, ::2].contiguous(), fast=True)
    assert torch.equal(hopper_matmul(a[:, ::2], b[:, ::2], fast=True), expected)
    a_columns = a[:, ::2].t().contiguous().t().requires_grad_()
    got = hopper_matmul(a_columns, b[:, ::2], fast=True)
    assert torch.equal(got, expected)
    assert not got.requires_grad


def test_operands_are_left_alone():
    a, b = any_code(4, 64, E4M3FN), any_code(5, 64, E4M3FN)
    a[0, 0] = math.nan
    before = bits(a), bits(b)
    hopper_matmul(a, b, fast=False)
    assert (bits(a), bits(b)) == before


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 5), (3, 0, 5), (3, 2, 0), (0, 0, 0)])
@both_modes
def test_empty_gives_zeros(m, n, k, fast):
    got = hopper_matmul(torch.ones(m, k), torch.ones(n, k), fast=fast)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.zeros(m, n))


def test_zeros_sum_to_plus_zero():
    got = hopper_matmul(torch.tensor([[-0.0], [0.0]]), torch.tensor([[1.0], [-1.0]]), fast=True)
    assert bits(got) == [[0, 0], [0, 0]]


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (ONES.double(), ONES, "expected a to be a float32 matrix on the CPU, got torch.float64"),
        (ONES, ONES[0], r"expected b to be a float32 matrix .* of shape \(3,\)"),
        (ONES.to("meta"), ONES, "on meta"),
        (ONES, torch.ones(2, 4), r"with the same K, got \(2, 3\) and \(2, 4\)"),
        (ONES * 1.0625, ONES, "expected a to hold values of e4m3fn, got others: pass a_format"),
        (ONES, ONES * 480, "expected b to hold values of e4m3fn"),
        (ONES * 2.0**-10, ONES, "expected a to hold values of e4m3fn"),
        (ONES * 1.5 * 2.0**-9, ONES, "expected a to hold values of e4m3fn"),
        (ONES * 2.0**-140, ONES, "expected a to hold values of e4m3fn"),
    ],
)
def test_wrong_operands_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        hopper_matmul(a, b, fast=True)


def test_formats_hopper_does_not_have_are_refused():
    with pytest.raises(ValueError, match="expected b_format e4m3fn or e5m2, as Hopper has, got"):
        hopper_matmul(ONES, ONES, fast=True, b_format=E4M3FNUZ)


@every_pair
def test_every_value_of_a_format_is_accepted(a_format, b_format):
    operands = [
        torch.tensor([[v for v in map(f.decode, range(256)) if not math.isinf(v)]])
        for f in (a_format, b_format)
    ]
    k = min(x.shape[1] for x in operands)
    got = hopper_matmul(
        operands[0][:, :k], operands[1][:, :k], fast=True, a_format=a_format, b_format=b_format
    )
    assert got.isnan().item()
