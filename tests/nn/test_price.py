"""The price of a cast, against autograd in float64 on what the casts gave.

The truth shares no code with the measurement: the model is written out once more in float64, with
x_hat in place of x as a leaf, each cast one made by `unclamp.quantize`, and autograd says how the
loss changes with it.
"""

import copy

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
from unclamp.nn.update import Inspection, Update
from unclamp.numerics import dequantize, quantize
from unclamp.numerics.inspection import CLAMP_PRICE, PRICES, ROUNDING_PRICE

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
    fields = [PRICES, CLAMP_PRICE, ROUNDING_PRICE]
    rows = update.details[:, fields].tolist()
    return {(s.fqn, s.role): tuple(row) for s, row in zip(ledger.sites, rows, strict=True)}


def parts(x: Tensor, scale: float, slope: Tensor) -> tuple[float, float]:
    """Return both parts of a price by a loop over elements."""
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
        for seed in range(3):
            x = batch(seed).requires_grad_()
            loss_of(model, x).backward()
            optimizer.step()
        states.append([*(p.detach().clone() for p in model.parameters()), x.grad])
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


def test_an_input_without_a_gradient_has_no_price_if_it_clamped():
    model = net()
    unclamp.convert(model, STATIC)
    (update,) = stepped_and_heard(model, "gradients", batch())
    count, clamp, _ = prices(model, update)["up", "input"]
    assert count == 1
    assert clamp != clamp


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
    return {
        site: parts(t.detach().float(), scale, t.grad) for site, (t, scale) in found.items()
    }


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
