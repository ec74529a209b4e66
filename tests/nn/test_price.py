"""The price of a cast, against autograd in float64 on what the casts gave.

The truth shares no code with the measurement: the model is written out once more in float64, with
x_hat in place of x as a leaf, each cast one made by `unclamp.quantize`, and autograd says how the
loss changes with it.
"""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import (
    E4M3FN,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    PerRow,
    PerTensor,
    Recipe,
    Static,
)
from unclamp.nn import find_ledgers
from unclamp.nn.product import multiply
from unclamp.nn.update import Inspection, Update
from unclamp.numerics import dequantize, quantize
from unclamp.numerics.inspection import CLAMP_PRICE, PRICES, ROUNDING_PRICE, ROUNDINGS

TOKENS, IN, WIDTH, OUT = 48, 16, 12, 5
SCALE = 128.0
"""448 over it is 3.5: a few of the elements of a normal distribution lie beyond."""
WEIGHT_SCALE = 2048.0
"""The weights of a linear layer with 16 inputs lie within 0.25; 448 over this is 0.22."""
STATIC = Recipe(
    input=Static(scale=SCALE), weight=Static(scale=WEIGHT_SCALE), grad_output=HighPrecision()
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, WIDTH), nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(TOKENS, IN, generator=generator)


def slopes() -> Tensor:
    """Return a gradient of a layer's output."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))


def heard_by(model: nn.Module, inspection: Inspection) -> list[Update]:
    heard: list[Update] = []
    for ledger in find_ledgers(model):
        ledger.inspect(inspection)
        ledger.subscribe(heard.append)
    return heard


Prices = dict[tuple[str, str], tuple[float, float, float]]


def prices(model: nn.Module, update: Update) -> Prices:
    """Return how many casts of each site were priced, and both parts of the price."""
    (ledger,) = find_ledgers(model)
    assert update.details is not None
    fields = [PRICES, CLAMP_PRICE, ROUNDINGS, ROUNDING_PRICE]
    rows = update.details[:, fields].tolist()
    return {
        (site.fqn, site.role): (count, clamp, rounding if both == count else math.nan)
        for site, (count, clamp, both, rounding) in zip(ledger.sites, rows, strict=True)
    }


def parts(x: Tensor, scale: float, slope: Tensor | None) -> tuple[float, float]:
    """Return both parts of a price by a loop over elements."""
    assert slope is not None
    hats = dequantize(quantize(x, E4M3FN, torch.tensor(scale))).double()
    clamp = rounding = 0.0
    for value, hat, g in zip(x.reshape(-1), hats.reshape(-1), slope.reshape(-1), strict=True):
        part = float(g) * (float(hat) - float(value))
        # Halfway from 448 to what would be the next value, 480.
        if abs(float(value)) * scale > 464:
            clamp += part
        else:
            rounding += part
    return clamp, rounding


def truth(model: Net, x: Tensor) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the prices of both layers' casts, from autograd in float64."""

    def hat(t: Tensor, scale: float) -> Tensor:
        made = dequantize(quantize(t.detach().float(), E4M3FN, torch.tensor(scale)))
        return made.double().requires_grad_()

    x_hat, up_hat = hat(x, SCALE), hat(model.up.weight, WEIGHT_SCALE)
    hidden = F.gelu(x_hat @ up_hat.t() + model.up.bias.detach().double())
    h_hat, down_hat = hat(hidden, SCALE), hat(model.down.weight, WEIGHT_SCALE)
    # The loss sees h_hat, and passes its gradient on to h as if the cast were not there.
    seen = hidden + (h_hat - hidden).detach()
    seen.retain_grad()
    loss = (seen @ down_hat.t() + model.down.bias.detach().double()).square().mean()
    loss.backward()
    found = {
        ("up", "input"): (x, SCALE, x_hat),
        ("up", "weight"): (model.up.weight.detach(), WEIGHT_SCALE, up_hat),
        ("down", "input"): (hidden.detach().float(), SCALE, seen),
        ("down", "weight"): (model.down.weight.detach(), WEIGHT_SCALE, down_hat),
    }
    return {site: parts(t, scale, leaf.grad) for site, (t, scale, leaf) in found.items()}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def stepped(model: nn.Module, *losses: Tensor) -> None:
    optimizer = SGD(model.parameters(), lr=0.0)
    for loss in losses:
        loss.backward()
    optimizer.step()


def close(price: float, true: float, size: float = 1e-5):
    return price == pytest.approx(true, rel=1e-3, abs=size)


@pytest.mark.parametrize("inspection", ["gradients", "clamped", "always", "priced"])
def test_prices_are_those_of_autograd_in_float64(inspection: Inspection):
    model, x = net(), batch().requires_grad_()
    true = truth(model, x.detach())
    unclamp.convert(model, STATIC)
    (update,) = stepped_and_heard(model, inspection, x)
    found = prices(model, update)
    clamped = {site for site, (clamp, _) in true.items() if clamp}
    assert {("up", "input"), ("up", "weight"), ("down", "weight")} <= clamped
    for site, (clamp, rounding) in true.items():
        count, one, other = found[site]
        is_known = site in clamped or inspection in ("always", "priced")
        assert count == is_known
        assert close(one, clamp)
        if inspection == "priced":
            assert close(other, rounding)
        elif is_known:
            assert other != other
    assert found["up", "grad_output"] == (0, 0, 0)


def stepped_and_heard(model: nn.Module, inspection: Inspection, *inputs: Tensor) -> list[Update]:
    heard = heard_by(model, inspection)
    stepped(model, *(loss_of(model, x) for x in inputs))
    return heard


@pytest.mark.parametrize("inspection", ["gradients", "always", "priced"])
def test_microsteps_add_up(inspection: Inspection):
    model, inputs = net(), [batch(seed).requires_grad_() for seed in (0, 1)]
    true = [truth(model, x.detach()) for x in inputs]
    unclamp.convert(model, STATIC)
    (update,) = stepped_and_heard(model, inspection, *inputs)
    site = ("up", "input")
    count, clamp, _ = prices(model, update)[site]
    assert count == 2
    assert close(clamp, true[0][site][0] + true[1][site][0])


def test_two_losses_of_one_graph_are_priced_as_their_sum():
    model, x = net(), batch().requires_grad_()
    true = truth(model, x.detach())
    unclamp.convert(model, STATIC)
    heard = heard_by(model, "gradients")
    loss = loss_of(model, x)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    SGD(model.parameters(), lr=0.0).step()
    assert close(prices(model, heard[0])["up", "input"][1], 3 * true["up", "input"][0])


@pytest.mark.parametrize("inspection", ["never", "gradients", "always", "priced"])
@pytest.mark.parametrize("observes", [False, True])
def test_no_bit_of_the_training_changes(inspection: Inspection, observes: bool):
    states = []
    for asked in ("never", inspection):
        model = net()
        unclamp.observe(model, STATIC) if observes else unclamp.convert(model, STATIC)
        heard_by(model, asked)
        optimizer = SGD(model.parameters(), lr=0.1)
        inputs = [batch(seed).requires_grad_() for seed in range(3)]
        for x in inputs:
            loss_of(model, x).backward()
            optimizer.step()
        states.append([*(p.detach().clone() for p in model.parameters()), inputs[-1].grad])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inspection", ["gradients", "always", "priced"])
def test_a_checkpointed_net_has_the_same_prices(inspection: Inspection, use_reentrant: bool):
    found = []
    for is_checkpointed in (False, True):
        model, x = net(), batch().requires_grad_()
        unclamp.convert(model, STATIC)
        heard = heard_by(model, inspection)
        if is_checkpointed:
            loss = checkpoint(loss_of, model, x, use_reentrant=use_reentrant)
        else:
            loss = loss_of(model, x)
        stepped(model, loss)
        found.append(prices(model, heard[0]))
    assert repr(found[0]) == repr(found[1])


@pytest.mark.parametrize("observes", [False, True])
@pytest.mark.parametrize("inspection", ["gradients", "always", "priced"])
def test_data_that_want_no_gradient_have_a_price(inspection: Inspection, observes: bool):
    model, x = net(), batch()
    true = (plain_truth if observes else truth)(model, x)["up", "input"]
    unclamp.observe(model, STATIC) if observes else unclamp.convert(model, STATIC)
    (update,) = stepped_and_heard(model, inspection, x)
    count, clamp, rounding = prices(model, update)["up", "input"]
    assert count == 1
    assert close(clamp, true[0]) or (observes and inspection == "gradients" and clamp != clamp)
    if inspection == "priced":
        assert close(rounding, true[1])


def test_a_weight_that_is_not_trained_has_no_price_if_it_clamped():
    model = net()
    model.up.weight.requires_grad_(False)
    unclamp.convert(model, STATIC)
    (update,) = stepped_and_heard(model, "gradients", batch().requires_grad_())
    found = prices(model, update)
    assert found["up", "weight"][0] == 1
    assert found["up", "weight"][1] != found["up", "weight"][1]
    assert found["down", "weight"][1] == found["down", "weight"][1]


def plain_truth(model: Net, x: Tensor) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the prices of would-be casts in a model that computes plainly."""
    wide = copy.deepcopy(model).double()
    x = x.double().requires_grad_()
    hidden = F.gelu(wide.up(x))
    hidden.retain_grad()
    loss = wide.down(hidden).square().mean()
    loss.backward()
    found = {
        ("up", "input"): (x, SCALE),
        ("up", "weight"): (wide.up.weight, WEIGHT_SCALE),
        ("down", "input"): (hidden, SCALE),
        ("down", "weight"): (wide.down.weight, WEIGHT_SCALE),
    }
    return {site: parts(t.detach().float(), scale, t.grad) for site, (t, scale) in found.items()}


@pytest.mark.parametrize("inspection", ["gradients", "always", "priced"])
def test_an_observed_net_has_the_prices_of_its_plain_gradients(inspection: Inspection):
    model, x = net(), batch().requires_grad_()
    true = plain_truth(model, x.detach())
    unclamp.observe(model, STATIC)
    (update,) = stepped_and_heard(model, inspection, x)
    found = prices(model, update)
    for site, (clamp, rounding) in true.items():
        count, one, other = found[site]
        # Of 12 features more than few clamp, and more than few of 48 tokens may.
        if count and one == one:
            assert close(one, clamp)
        else:
            assert inspection == "gradients"
        if inspection == "priced":
            assert close(other, rounding)


# ---- one layer, whose gradients are known ------------------------------------------------------

GRAINS = {
    "tensor": PerTensor(),
    "row": PerRow(),
    "block": PerBlock(2, 4),
}


def layer_truth(
    x: Tensor, weight: Tensor, dy: Tensor, x_hat: Tensor, w_hat: Tensor
) -> dict[str, float]:
    """Return the whole prices of a loss that is linear in the output, with this gradient by it."""
    x, weight, dy, x_hat, w_hat = (t.detach().double() for t in (x, weight, dy, x_hat, w_hat))
    return {
        "input": float(((dy @ w_hat) * (x_hat - x)).sum()),
        "weight": float(((dy.t() @ x_hat) * (w_hat - weight)).sum()),
    }


def layer_prices(plan: Recipe, x: Tensor, dy: Tensor, inspection: Inspection, **settings):
    torch.manual_seed(0)
    layer = nn.Linear(IN, WIDTH, **settings)
    unclamp.convert(layer, plan)
    heard = heard_by(layer, inspection)
    layer(x).backward(dy)
    SGD(layer.parameters(), lr=0.0).step()
    return layer, {role: row for (_, role), row in prices(layer, heard[0]).items()}


@pytest.mark.parametrize("grain", list(GRAINS))
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_it_is_the_cast_that_the_output_is_made_of(grain: str, wants_gradient: bool):
    """Along the other axis blocks are cast once more, which no loss depends on.

    These are what backward's GEMMs multiply, and so part of the gradients that it has.
    """
    scaling = Dynamic(granularity=GRAINS[grain])
    plan = Recipe(input=scaling, weight=scaling, grad_output=HighPrecision())
    x, dy = batch().requires_grad_(wants_gradient), slopes()
    layer, found = layer_prices(plan, x, dy, "priced")
    x_hat, w_hat, x_other, w_other = (
        dequantize(quantize(t.detach(), E4M3FN, granularity=GRAINS[grain], axis=axis))
        for axis in (1, 0)
        for t in (x, layer.weight)
    )
    seen = dy @ (w_other if wants_gradient else w_hat)
    true = {
        "input": (seen.double() * (x_hat - x).double()).sum(),
        "weight": ((dy.t() @ x_other).double() * (w_hat - layer.weight).double()).sum(),
    }
    for role, price in true.items():
        count, clamp, rounding = found[role]
        assert (count, clamp) == (1, 0)
        assert close(rounding, price.item(), 1e-4)


@pytest.mark.parametrize("inspection", ["gradients", "priced"])
def test_a_smoothed_product_is_priced_in_the_units_of_its_loss(inspection: Inspection):
    plan = Recipe(
        input=Static(scale=600.0), weight=Dynamic(), grad_output=HighPrecision(), smooth=True
    )
    x = (batch() * torch.tensor([1.0, 2, 40, 1, 8, 1, 16, 1] * 2)).requires_grad_()
    dy = slopes()
    layer, found = layer_prices(plan, x, dy, inspection)
    amax = x.detach().abs().amax(0)
    smooth = torch.exp2(-torch.ceil(torch.log2(amax)))
    assert torch.all((amax * smooth > 0.5) & (amax * smooth <= 1))
    scaled = x.detach() * smooth
    x_hat = dequantize(quantize(scaled, E4M3FN, torch.tensor(600.0))) / smooth
    w_hat = dequantize(quantize(layer.weight.detach() / smooth, E4M3FN)) * smooth
    is_clamped = scaled.abs() * 600 > 464
    assert 0 < is_clamped.sum() < 40
    only_clamped = torch.where(is_clamped, x_hat, x.detach())
    true = layer_truth(x, layer.weight, dy, only_clamped, w_hat)["input"]
    count, clamp, rounding = found["input"]
    assert count == 1
    assert close(clamp, true, 1e-4)
    if inspection == "priced":
        whole = layer_truth(x, layer.weight, dy, x_hat, w_hat)
        assert close(clamp + rounding, whole["input"], 1e-4)
        assert close(found["weight"][2], whole["weight"], 1e-4)


def test_where_the_output_is_made_in_high_precision_no_cast_has_a_price():
    plan = Recipe(
        input=Static(scale=SCALE), weight=Static(scale=WEIGHT_SCALE), output=HighPrecision()
    )
    _, found = layer_prices(plan, batch().requires_grad_(), slopes(), "priced")
    assert all(count == 0 for count, *_ in found.values())


def test_a_guarded_cast_has_no_price_of_clamping():
    model = net()
    unclamp.convert(model, Recipe.uniform(Guarded()))
    heard = heard_by(model, "always")
    for size in (1.0, 100.0):
        stepped(model, loss_of(model, batch() * size))
    clamps = [prices(model, update)["up", "input"] for update in heard]
    assert [row[:2] for row in clamps] == [(1, 0), (1, 0)]


def test_what_is_inf_or_nan_is_not_priced_and_a_gradient_that_is_makes_it_unknown():
    plan = Recipe(
        input=Static(scale=SCALE), weight=Static(scale=WEIGHT_SCALE), grad_output=HighPrecision()
    )
    x, dy = batch(), slopes()
    x[1, 1], dy[1] = torch.inf, 0
    _, with_inf = layer_prices(plan, x.clone().requires_grad_(), dy, "priced")
    x[1, 1] = 0
    _, without = layer_prices(plan, x.clone().requires_grad_(), dy, "priced")
    assert with_inf["input"] == pytest.approx(without["input"])
    dy[2, 2] = torch.inf
    _, unknown = layer_prices(plan, x.clone().requires_grad_(), dy, "priced")
    assert not abs(unknown["input"][1]) < 1e300


def test_between_inspected_steps_only_few_clamped_elements_are_set_aside():
    plan = Recipe(input=Static(scale=1e6), weight=Dynamic(), grad_output=HighPrecision())
    torch.manual_seed(1)
    x, dy = torch.randn(256, IN).requires_grad_(), torch.randn(256, WIDTH)
    _, few = layer_prices(plan, x, dy, "gradients")
    _, every = layer_prices(plan, x, dy, "clamped")
    _, whole = layer_prices(plan, x, dy, "priced")
    assert few["input"][0] == 1
    assert few["input"][1] != few["input"][1]
    assert every["input"][1] == pytest.approx(whole["input"][1])


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_layer_has_no_price():
    torch._dynamo.reset()
    layer = nn.Linear(IN, WIDTH)
    unclamp.convert(layer, STATIC)
    heard = heard_by(layer, "priced")
    torch.compile(layer, backend="aot_eager")(batch()).sum().backward()
    SGD(layer.parameters(), lr=0.0).step()
    assert all(count == 0 for count, *_ in prices(layer, heard[0]).values())
    torch._dynamo.reset()


def test_experts_of_a_bank_are_priced_as_layers_are():
    torch.manual_seed(0)
    experts, sizes = 3, (20, 0, 28)
    bank = nn.Parameter(torch.randn(experts, WIDTH, IN) / 8)
    x, dy = batch().requires_grad_(), slopes()

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = bank

        def forward(self, x: Tensor) -> Tensor:
            offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
            return unclamp.grouped_mm(x, self.up.mT, offs)

    model = Bank()
    unclamp.convert(model, STATIC)
    heard = heard_by(model, "priced")
    model(x).backward(dy)
    SGD(model.parameters(), lr=0.0).step()
    found = prices(model, heard[0])
    for number, rows in ((0, slice(0, 20)), (2, slice(20, 48))):
        part, weight = x.detach()[rows], bank.detach()[number]
        x_hat = dequantize(quantize(part, E4M3FN, torch.tensor(SCALE)))
        w_hat = dequantize(quantize(weight, E4M3FN, torch.tensor(WEIGHT_SCALE)))
        for role, price in layer_truth(part, weight, dy[rows], x_hat, w_hat).items():
            count, clamp, rounding = found[f"up.{number}", role]
            assert count == 1
            assert clamp
            assert close(clamp + rounding, price, 1e-3)
    assert found["up.1", "input"][0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_priced_by_the_rounded_gradient(dtype: torch.dtype):
    x, dy = batch().to(dtype).requires_grad_(), slopes().to(dtype)
    layer, found = layer_prices(STATIC, x, dy, "priced", dtype=dtype)
    x_hat = dequantize(quantize(x.detach(), E4M3FN, torch.tensor(SCALE)))
    w_hat = dequantize(quantize(layer.weight.detach(), E4M3FN, torch.tensor(WEIGHT_SCALE)))
    for role, price in layer_truth(x, layer.weight, dy, x_hat, w_hat).items():
        assert sum(found[role][1:]) == pytest.approx(price, rel=3e-2, abs=0.2)


def test_autocast_prices_the_tensor_that_is_cast():
    model, x = net(), batch().requires_grad_()
    unclamp.observe(model, STATIC)
    heard = heard_by(model, "priced")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x)
    stepped(model, loss)
    true = plain_truth(net(), x.detach().bfloat16().float())
    found = prices(model, heard[0])["up", "input"]
    assert found[1] == pytest.approx(true["up", "input"][0], rel=0.05)
    assert found[2] == pytest.approx(true["up", "input"][1], rel=0.05, abs=1e-3)


def test_an_observation_adds_up_what_was_priced():
    model, inputs = net(), [batch(seed).requires_grad_() for seed in (0, 1)]
    true = [plain_truth(model, x.detach())["up", "input"][0] for x in inputs]
    with unclamp.observe(model, STATIC) as observation:
        assert all(site.price is None for site in observation.sites())
        (ledger,) = find_ledgers(model)
        modes: tuple[Inspection, ...] = ("always", "never", "always")
        for x, inspection in zip((inputs[0], inputs[1], inputs[1]), modes, strict=True):
            ledger.inspect(inspection)
            stepped(model, loss_of(model, x))
    sites = {(site.fqn, site.role): site for site in observation.sites()}
    price = sites["up", "input"].price
    assert price is not None
    assert close(price, sum(true))
    assert f"price {price:.3g}" in str(observation)


@pytest.mark.parametrize("inspection", ["always", "priced"])
def test_a_backward_for_one_gradient_at_a_time_prices_each_once(inspection: Inspection):
    """As a zero-bubble schedule runs it."""
    x, dy = batch().requires_grad_(), slopes()
    _, whole = layer_prices(STATIC, x, dy, inspection)
    torch.manual_seed(0)
    layer = nn.Linear(IN, WIDTH)
    unclamp.convert(layer, STATIC)
    heard = heard_by(layer, inspection)
    output = layer(x)
    torch.autograd.grad(output, x, dy, retain_graph=True)
    (layer.weight.grad,) = torch.autograd.grad(output, layer.weight, dy)
    SGD(layer.parameters(), lr=0.0).step()
    apart = {role: row for (_, role), row in prices(layer, heard[0]).items()}
    assert repr(apart) == repr(whole)


def test_of_parts_that_ranks_have_no_price_is_told():
    """Their gradients may be partial sums."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, WIDTH)
    unclamp.convert(layer, STATIC)
    heard = heard_by(layer, "always")
    operands: Any = layer.sites
    x = batch().requires_grad_()
    output = multiply(operands, x, layer.weight, layer.bias, training=True, is_part=True)
    output.backward(slopes())
    SGD(layer.parameters(), lr=0.0).step()
    found = prices(layer, heard[0])
    for role in ("input", "weight"):
        count, clamp, _ = found["", role]
        assert count == 1
        assert clamp != clamp


def saved_bytes(inspection: Inspection) -> int:
    """Return what a layer keeps for backward."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, WIDTH)
    unclamp.convert(layer, STATIC)
    heard_by(layer, inspection)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(batch().requires_grad_())
    return sum(kept)


def test_only_who_asks_for_rounding_has_operands_kept():
    least = saved_bytes("never")
    assert saved_bytes("gradients") == saved_bytes("clamped") == saved_bytes("always") == least
    whole = 4 * (TOKENS * IN + WIDTH * IN)
    assert saved_bytes("priced") >= least + whole
