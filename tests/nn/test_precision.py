"""High precision where it matters: per role, per GEMM, per module, and at the start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from unclamp import (
    E4M3FN,
    E5M2,
    Delayed,
    Dynamic,
    Fp8Linear,
    HighPrecision,
    PerRow,
    Recipe,
    UnclampWarning,
    convert,
    dequantize,
    first_and_last,
    quantize,
)
from unclamp.names import GEMMS
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat, channel_scale

pytestmark = pytest.mark.filterwarnings("ignore:no layer is in FP8")
HIGH = HighPrecision()


def hat(x: Tensor, fmt=E4M3FN, **settings) -> Tensor:
    return dequantize(quantize(x, fmt, **settings))


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    return [t.clone() for t in found if t is not None]


def pair(recipe: Recipe, dtype=torch.float32) -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(48, 20, dtype=dtype)
    layer = copy.deepcopy(plain)
    convert(layer, recipe)
    return plain, layer, torch.randn(9, 48).to(dtype), torch.randn(9, 20).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gemm", GEMMS)
def test_a_gemm_in_high_precision_is_that_of_nn_linear(gemm, dtype):
    recipe = Recipe.uniform(Dynamic(granularity=PerRow()))
    recipe = Recipe.from_dict({**recipe.to_dict(), gemm: "high_precision"})
    plain, layer, x, dy = pair(recipe, dtype)
    got, want = gradients(layer, x, dy), gradients(plain, x, dy)
    same = [torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True)]
    assert same == [gemm == name for name in GEMMS]


def test_a_gemm_in_high_precision_needs_no_cast_of_its_own():
    row = Dynamic(granularity=PerRow())
    _, layer, x, dy = pair(Recipe(input=row, weight=row, grad_output=row, grad_weight=HIGH))
    gradients(layer, x, dy)
    assert find_ledgers(layer)[0].pending[:, Stat.CASTS].tolist() == [1, 2, 1]


def test_every_gemm_in_high_precision_is_nn_linear_and_casts_nothing():
    plain, layer, x, dy = pair(Recipe(output=HIGH, grad_input=HIGH, grad_weight=HIGH))
    for a, b in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        assert torch.equal(a, b)
    assert not find_ledgers(layer)[0].has_pending


def test_a_gemm_named_in_a_rule_is_for_its_layers_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    report = convert(model, Recipe().override("1", grad_weight=HIGH, accumulate="hopper"))
    assert report.converted["0"].gemms == dict.fromkeys(GEMMS, "float32")
    assert report.converted["1"].gemms["grad_weight"] == HIGH
    assert "grad_weight GEMM in high precision" in str(report)
    assert "output hopper" in str(report)


def test_a_rule_leaves_whole_layers_in_high_precision():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    recipe = Recipe()
    for fqn in first_and_last(model):
        recipe = recipe.override(fqn, scaling=HIGH)
    convert(model, recipe)
    model(torch.randn(3, 8)).sum().backward()
    casts = find_ledgers(model)[0].pending[:, Stat.CASTS].tolist()
    assert casts == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x), plain[0](x))


def test_skipping_first_and_last_skips_them_and_says_so():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert first_and_last(model) == ["^1", "^3"]
    report = convert(model, Recipe(), skip=first_and_last(model))
    assert list(report.converted) == ["2"]
    assert report.skipped["1"] == "matches skip '^1'"
    assert first_and_last(nn.Linear(2, 2)) == ["^"]
    assert first_and_last(nn.ReLU()) == []


# ---- warm-up -------------------------------------------------------------------------------


def train(model: nn.Module, steps: int, first: int = 0) -> list[Tensor]:
    optimizer = SGD(model.parameters(), lr=0.05)
    outputs = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        y = model(torch.randn(5, 6))
        y.square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def models(recipe: Recipe, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(7)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    model = copy.deepcopy(plain)
    convert(model, recipe)
    return plain, model


def test_warm_up_steps_are_those_of_the_plain_model_and_then_fp8_begins():
    plain, model = models(Recipe(warmup_steps=3))
    want, got = train(plain, 5), train(model, 5)
    same = [torch.equal(a, b) for a, b in zip(want, got, strict=True)]
    assert same == [True, True, True, False, False]


def test_a_warm_up_measures_so_that_the_first_cast_has_a_history():
    _, model = models(Recipe(warmup_steps=3))
    train(model, 3)
    (ledger,) = find_ledgers(model)
    assert (ledger.amax_history[:, :3] > 0).all()
    assert (ledger.scale > 0).all()
    assert ledger.updates == 3


def test_a_resumed_run_does_not_warm_up_again():
    _, model = models(Recipe(warmup_steps=3))
    train(model, 4)
    _, other = models(Recipe(warmup_steps=3))
    other.load_state_dict(model.state_dict())
    again = zip(train(model, 2, first=4), train(other, 2, first=4), strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    other.load_state_dict({"2.weight": torch.zeros(4, 8)}, strict=False)
    assert not find_ledgers(other)[0].is_warming


def test_a_copy_in_its_warm_up_goes_on_with_it():
    plain, model = models(Recipe(warmup_steps=3))
    train(plain, 2)
    train(model, 2)
    twin = copy.deepcopy(model)
    assert torch.equal(train(twin, 1, first=2)[0], train(plain, 1, first=2)[0])
    assert not find_ledgers(twin)[0].is_warming
    assert find_ledgers(model)[0].is_warming


# ---- smoothing -----------------------------------------------------------------------------


def test_smoothing_by_powers_of_two_is_exact():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 64, 96) * torch.logspace(-3, 3, 96)
    h, weight = F.silu(gate) * up, torch.randn(32, 96)
    s = channel_scale(h)
    assert torch.equal(F.silu(gate) * (up * s), h * s)  # folded into the up projection
    assert torch.equal(F.linear(h * s, weight / s), F.linear(h, weight))  # and into the down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_smoothed_layer_casts_smoothed_operands_and_gives_gradients_of_the_plain_ones(dtype):
    plain, layer, x, dy = pair(Recipe.uniform(Dynamic()).override("*", smooth=True), dtype)
    x = x * torch.logspace(-2, 2, 48).to(dtype)
    y, grad_input, grad_weight = gradients(layer, x, dy)[:3]
    s = channel_scale(x)
    x_hat, w_hat = hat(x.float() * s), hat(plain.weight.detach().float() / s)
    dy_hat = hat(dy, E5M2)
    assert torch.equal(y, F.linear(x_hat, w_hat, plain.bias.detach().float()).to(dtype))
    assert torch.equal(grad_input, ((dy_hat @ w_hat) * s).to(dtype))
    assert torch.equal(grad_weight, ((dy_hat.t() @ x_hat) / s).to(dtype))


def test_smoothing_keeps_a_channel_with_an_outlier_from_clamping_under_a_delayed_scale():
    counts = {}
    for smooth in (False, True):
        recipe = Recipe(input=Delayed(), weight=Dynamic(), grad_output=Dynamic(), smooth=smooth)
        _, layer, x, dy = pair(recipe)
        optimizer = SGD(layer.parameters(), lr=0.0)
        gradients(layer, x, dy)
        optimizer.step()
        x[:, 5] *= 100
        gradients(layer, x, dy)
        counts[smooth] = int(find_ledgers(layer)[0].pending[0, Stat.SATURATED])
    assert counts[True] == 0
    assert counts[False] > 0


def test_smoothing_without_casts_is_nn_linear():
    plain, layer, x, dy = pair(Recipe.uniform(HIGH).override("*", smooth=True))
    assert isinstance(layer, Fp8Linear)
    for a, b in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        assert torch.equal(a, b)


def test_a_second_convert_gives_the_whole_model_one_warm_up():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    convert(model, Recipe())
    with pytest.warns(UnclampWarning, match="2 layers were converted already"):
        convert(model, Recipe(warmup_steps=2))  # nothing left to convert: nothing changes
    assert not find_ledgers(model)[0].is_warming
    model.append(nn.Linear(8, 8))
    convert(model, Recipe(warmup_steps=2))
    assert [layer.sites.counts_only for layer in model] == [True] * 3  # pyright: ignore


def test_first_and_last_match_themselves_and_nothing_below():
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8))
    report = convert(model, Recipe(), skip=first_and_last(model))
    assert list(report.converted) == ["1.0", "1.1"]


def test_a_frozen_high_precision_weight_needs_no_cast_of_the_gradient():
    recipe = Recipe(weight=HighPrecision(), grad_output=HighPrecision())
    model = nn.Linear(8, 8)
    convert(model, recipe)
    model.requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    assert find_ledgers(model)[0].pending[:, Stat.CASTS].tolist() == [1, 0, 0]
