"""The Triton kernels under Triton's interpreter; `test_gpu.py` runs this in a process of its own.

TRITON_INTERPRET must be set before triton is imported, and would change other tests.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import (
    E4M3FN,
    E5M2,
    FORMATS,
    MX,
    Delayed,
    Dynamic,
    Format,
    Guarded,
    PerBlock,
    PerRow,
    Recipe,
)
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat, quantize
from unclamp.numerics.cast import Quantized, quantize_plain
from unclamp.numerics.gpu import DEVICE_PATH
from unclamp.numerics.gpu.cast import quantize_tensor
from unclamp.numerics.gpu.cast_blocks import quantize_blocks

# The interpreter computes with numpy, which warns of what FP8 is about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SUMS = [Stat.SQUARE, Stat.SATURATED_SQUARE]
COUNTS = [field for field in Stat if field not in SUMS]
EVERY_HALF = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
SPECIAL = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 448.0, 464.0, 464.1, -480.0,
           61440.0, 3e38, -3e38, 1e-45, -1e-38, 2.0**-9, 2.0**-10, 2.0**-17]  # fmt: skip


def codes_of(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def check(got: Quantized | None, want: Quantized) -> None:
    """Assert the same codes, scales and counts, bit for bit, and close sums of squares."""
    assert got is not None
    assert torch.equal(codes_of(got.codes), codes_of(want.codes))
    assert torch.equal(got.scale_inv, want.scale_inv)
    assert torch.equal(got.amax, want.amax)
    assert torch.equal(got.stats[COUNTS], want.stats[COUNTS])
    torch.testing.assert_close(got.stats[SUMS], want.stats[SUMS], rtol=1e-5, atol=0)


def check_tensor(x: Tensor, fmt: Format, scale: Tensor | None, **settings: Any) -> Quantized:
    got = quantize_tensor(x, fmt, scale, **settings)
    check(got, quantize_plain(x, fmt, scale, **settings))
    return got


def special(dtype: torch.dtype, size: int = 6000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator) * torch.logspace(-6, 3, size)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype)


@pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_every_half_precision_input(dtype, fmt):
    check_tensor(EVERY_HALF.view(dtype), fmt, torch.tensor(37.7))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 37.7, 2.0**-20])
@pytest.mark.parametrize("guard", [False, True])
def test_tensor_exhaustively(dtype, fmt, scale, guard):
    x = EVERY_HALF.view(dtype) if dtype != torch.float32 else random_bits()
    given = None if scale is None else torch.tensor(scale)
    check_tensor(x, fmt, given, guard=guard, margin=2, power_of_two=scale == 0.0)


def random_bits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (65536,), generator=generator)
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_tensor_special_values_of_float32(fmt):
    x = special(torch.float32)
    for scale in (None, torch.tensor(0.0), torch.tensor(1.0)):
        check_tensor(x, fmt, scale, margin=1)


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 3.0, 449.0, 3e38])
def test_tensor_scales_of_its_own_are_the_cpus(amax):
    x = torch.tensor([amax, amax / 3, 0.0])
    for power_of_two in (False, True):
        check_tensor(x, E4M3FN, None, power_of_two=power_of_two, margin=3)


def test_tensor_without_a_finite_element_has_no_amax():
    got = check_tensor(torch.tensor([torch.nan, torch.inf, -torch.inf]), E4M3FN, None)
    assert got.amax == -1
    assert got.stats[Stat.NONFINITE] == 3


def test_tensor_guard_casts_again_only_where_something_saturates():
    x = special(torch.float32)[20:]
    scale = torch.tensor(448.0) / x.abs().max()
    for factor, recast in ((1.0, 0), (2.0, 1), (0.25, 0)):
        got = check_tensor(x, E4M3FN, scale * factor, guard=True, margin=1)
        assert got.stats[Stat.RECAST] == recast
        assert got.stats[Stat.SATURATED] == 0
    assert check_tensor(x, E4M3FN, scale * 2).stats[Stat.SATURATED] > 0


def test_tensor_turned_codes_come_out_of_many_tiles():
    x = special(torch.bfloat16, 130 * 70).view(130, 70)
    got = quantize_tensor(x, E4M3FN, torch.tensor(3.0), turned=True)
    check(got, quantize_plain(x, E4M3FN, torch.tensor(3.0)))
    assert got.turned is not None
    assert got.turned.t().is_contiguous()
    assert torch.equal(codes_of(got.turned), codes_of(got.codes))


def test_tensor_without_counts_has_the_same_codes_and_amax():
    x = special(torch.bfloat16)
    scale = torch.tensor(3.0)
    got, want = (quantize_tensor(x, E4M3FN, scale, counts=counts) for counts in (False, True))
    assert torch.equal(codes_of(got.codes), codes_of(want.codes))
    assert torch.equal(got.amax, want.amax)
    assert got.stats[Stat.SATURATED] == 0 < want.stats[Stat.SATURATED]


def check_blocks(x: Tensor, granularity, axis: int, factor: float | None, **settings: Any) -> None:
    own = quantize_plain(x, E4M3FN, granularity=granularity, axis=axis)
    scale = None if factor is None else own.scale_inv.reciprocal() * factor
    settings |= {"granularity": granularity, "axis": axis}
    got = quantize_blocks(x, E4M3FN, scale, **settings)
    # Not against plain torch, whose conversion of a few float16 drops the sign of NaN.
    check(got, quantize(x, E4M3FN, scale, **settings))


GRANULARITIES = [PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_an_odd_matrix(granularity, axis):
    x = special(torch.bfloat16, 130 * 150).view(130, 150)
    check_blocks(x, granularity, axis, None, margin=1)
    check_blocks(x, granularity, axis, 4.0, guard=True)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (257, 300), (3, 20000)])
def test_blocks_of_any_matrix(granularity, axis, dtype, shape):
    x = special(torch.float32, max(shape[0] * shape[1], 20))[: shape[0] * shape[1]]
    x = x.view(shape).to(dtype)
    for factor in (None, 0.0, 4.0):
        check_blocks(x, granularity, axis, factor)


def test_blocks_turned_are_the_same_codes():
    x = special(torch.bfloat16, 130 * 140).view(130, 140)
    settings: dict[str, Any] = {"granularity": PerBlock(128, 128), "turned": True}
    got = quantize_blocks(x, E4M3FN, **settings)
    assert got is not None
    assert got.turned is not None
    assert torch.equal(codes_of(got.turned), codes_of(got.codes))
    assert got.turned.t().is_contiguous()


def test_blocks_that_no_tile_has_are_left_to_plain_torch(monkeypatch):
    monkeypatch.setenv(DEVICE_PATH, "interpreter")
    x = torch.randn(9, 10)
    assert quantize_blocks(x, E4M3FN, granularity=PerBlock(3, 5)) is None
    got = quantize(x, E4M3FN, granularity=PerBlock(3, 5), axis=0, turned=True)
    check(got, quantize_plain(x, E4M3FN, granularity=PerBlock(3, 5), axis=0))
    assert got.codes.t().is_contiguous()


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (2, 3, 5)])
def test_layer_way_takes_any_shape(shape, monkeypatch):
    monkeypatch.setenv(DEVICE_PATH, "interpreter")
    x = torch.randn(shape)
    got = quantize(x, E4M3FN)
    check(got, quantize_plain(x, E4M3FN))
    assert got.codes.shape == shape


RECIPES = {
    "delayed": Recipe.uniform(Delayed()),
    "guarded": Recipe.uniform(Guarded()),
    "row": Recipe.uniform(Dynamic(granularity=PerRow())),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("guarded", torch.bfloat16), ("delayed", torch.float32), ("row", torch.float32)],
)
def test_layer_trains_as_on_a_cpu(name, dtype, monkeypatch):
    """Sizes are no multiples of 16; torch's scaled matmul on a CPU adds in float32 too."""
    torch.manual_seed(0)
    base, x = nn.Linear(40, 24).to(dtype), torch.randn(3, 10, 40, dtype=dtype)
    results = []
    for way in ("", "interpreter"):
        monkeypatch.setenv(DEVICE_PATH, way)
        model = nn.Sequential(copy.deepcopy(base))
        unclamp.convert(model, RECIPES[name])
        results.append(trained(model, x))
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-5 if dtype == torch.float32 else 0, atol=1e-6)


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return output, gradients, and the ledger's state after two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = x.clone().requires_grad_()
    out = x
    for _ in range(2):
        optimizer.zero_grad()
        x.grad = None
        out = model(x)
        out.float().square().mean().backward()
        optimizer.step()
    (ledger,) = find_ledgers(model)
    gradients = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
    assert len(gradients) == 3
    return [out.detach(), *gradients, ledger.amax_history]


def test_layer_makes_codes_of_a_large_weight_again_and_counts_them_once(monkeypatch):
    monkeypatch.setenv(DEVICE_PATH, "interpreter")
    results = []
    for tokens_an_output in (10, 0):
        monkeypatch.setattr("unclamp.nn.operands.TOKENS_AN_OUTPUT", tokens_an_output)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 32))
        unclamp.convert(model, RECIPES["guarded"])
        (ledger,) = find_ledgers(model)
        seen: list[Tensor] = []
        ledger.subscribe(lambda update, seen=seen: seen.append(update.stats))
        kept = kept_by(model, torch.randn(20, 48))
        results.append((kept, *trained(model, torch.randn(20, 48)), *seen))
    (remade, *first), (kept, *second) = results
    assert remade == 20 * 48 < kept == 20 * 48 + 32 * 48
    for a, b in zip(first[:5], second[:5], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[5:], second[5:], strict=True):
        assert torch.equal(a[:, COUNTS], b[:, COUNTS])  # squares add up by other tiles


def kept_by(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of codes that a forward keeps for backward."""
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x.clone().requires_grad_())
    return sum(t.numel() for t in kept if t.element_size() == 1)


def test_layer_keeps_one_byte_an_element_of_its_input(monkeypatch):
    monkeypatch.setenv(DEVICE_PATH, "interpreter")
    model = nn.Linear(32, 16, dtype=torch.bfloat16)
    unclamp.convert(model, Recipe.uniform(Delayed()))
    assert kept_by(model, torch.randn(64, 32, dtype=torch.bfloat16)) == 64 * 32
