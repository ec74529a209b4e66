"""When a ledger updates and what counts until then: one update an optimizer step, in order."""

import gc
import math

import torch
from torch import Tensor, nn
from torch.optim import SGD

from unclamp import Delayed, Recipe, convert
from unclamp.nn import Ledger, find_ledgers
from unclamp.numerics import Stat

INPUT, WEIGHT, GRAD_OUTPUT = 0, 1, 2


def made(scaling=None, **others) -> tuple[nn.Linear, Ledger, torch.optim.Optimizer]:
    """Return one converted layer, its ledger and an optimizer that changes nothing."""
    layer = nn.Linear(4, 3)
    convert(layer, Recipe.uniform(scaling or Delayed(**others)))
    return layer, find_ledgers(layer)[0], torch.optim.SGD(layer.parameters(), lr=0.0)


def backward(layer: nn.Module, amax: float) -> None:
    layer(torch.full((2, 4), float(amax))).sum().backward()


def mlp() -> tuple[nn.Sequential, Ledger]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    convert(model, Recipe.uniform(Delayed(history_len=4)))
    return model, find_ledgers(model)[0]


def train(model: nn.Module, x: Tensor, dy: float = 1.0) -> None:
    y = model(x)
    y.backward(torch.full_like(y, dy))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_accumulation_takes_the_maximum_over_microsteps_and_updates_once():
    layer, ledger, optimizer = made()
    for amax in (1.0, 8.0, 2.0):
        backward(layer, amax)
    assert ledger.pending[:, Stat.CASTS].tolist() == [3, 3, 3]
    optimizer.step()
    assert ledger.updates == 1
    assert ledger.history_of(INPUT)[:2].tolist() == [8, 0]
    assert ledger.pending[:, Stat.CASTS].tolist() == [0, 0, 0]


def test_two_optimizers_on_one_model_make_one_update_a_step():
    layer, ledger, _ = made()
    optimizers = [torch.optim.SGD([layer.weight], lr=0.1), torch.optim.Adam([layer.bias])]
    for step in range(3):
        backward(layer, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        assert ledger.updates == step + 1


def test_another_models_optimizer_does_not_update():
    layer, ledger, optimizer = made()
    other = nn.Linear(4, 3)
    other(torch.ones(1, 4)).sum().backward()
    backward(layer, 1.0)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert ledger.updates == 0
    assert ledger.has_pending
    optimizer.step()
    assert ledger.updates == 1


def test_a_step_with_nothing_pending_is_no_update():
    _, ledger, optimizer = made()
    optimizer.step()
    assert ledger.updates == 0


def test_eval_forwards_change_nothing():
    layer, ledger, optimizer = made()
    backward(layer, 1.0)
    optimizer.step()
    before = ledger.pending.clone(), ledger.scale.clone(), ledger.amax_history.clone()
    layer.eval()
    layer(torch.full((2, 4), 100.0))
    layer.train()
    with torch.no_grad():
        layer(torch.full((2, 4), 100.0))
    layer(torch.full((2, 4), 100.0))  # a forward without backward
    optimizer.step()
    assert ledger.updates == 1
    for got, expected in zip(
        (ledger.pending, ledger.scale, ledger.amax_history), before, strict=True
    ):
        assert torch.equal(got, expected)


def test_a_layer_used_twice_in_a_forward_counts_both():
    layer = nn.Linear(4, 4)
    convert(layer, Recipe())
    ledger = find_ledgers(layer)[0]
    layer(layer(torch.ones(2, 4)) * 50).sum().backward()
    assert ledger.pending[:, Stat.CASTS].tolist() == [2, 2, 2]
    assert ledger.pending[INPUT, Stat.ELEMENTS] == 16


def test_frozen_layers_still_follow_their_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    convert(model, Recipe())
    ledger = find_ledgers(model)[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model, 2.0)
    # The bottom layer has no backward, so its gradient is never cast.
    assert ledger.pending[:, Stat.CASTS].tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1]
    optimizer.step()
    assert ledger.scale[INPUT] == 224
    assert ledger.updates == 1


def test_an_optimizer_over_a_wider_model_updates_a_converted_part():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model[0], Recipe())
    backward(model, 1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert find_ledgers(model)[0].updates == 1


def test_converting_a_part_and_then_the_whole_follows_every_optimizer_of_the_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model[0], Recipe())
    convert(model, Recipe())
    (ledger,) = find_ledgers(model)
    backward(model, 1.0)
    torch.optim.SGD(model[1].parameters(), lr=0.1).step()
    assert ledger.updates == 1


def test_converting_the_whole_and_then_a_part_still_follows_the_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, Recipe())
    convert(model[0], Recipe())
    backward(model, 1.0)
    torch.optim.SGD(model[1].parameters(), lr=0.1).step()
    assert find_ledgers(model)[0].updates == 1


# ---- who is updated, and in what order -----------------------------------------------------


def test_a_ledger_dies_with_its_model():
    from unclamp.nn.clock import ticking

    layer, ledger, _ = made()
    assert ledger in ticking
    number = id(ledger)
    del layer, ledger, _
    gc.collect()
    assert number not in {id(other) for other in ticking}


def test_another_model_updates_nothing_of_one_that_is_gone():
    gone, ledger, optimizer = made()
    held = list(ledger.layers)  # as a graph that lives on holds them
    backward(gone, 3)
    del gone, optimizer
    gc.collect()
    other, its_own, optimizer = made()
    backward(other, 1)
    optimizer.step()
    assert held
    assert its_own.updates == 1
    assert ledger.updates == 0


def test_ledgers_and_layers_are_kept_in_the_order_in_which_they_were_made():
    from unclamp.nn.clock import ticking

    models = [made()[0] for _ in range(20)]
    ledgers = [find_ledgers(model)[0] for model in models]
    del models[3:6], ledgers[3:6]
    gc.collect()
    ours = {id(ledger) for ledger in ledgers}
    assert [ledger for ledger in ticking if id(ledger) in ours] == ledgers
    stack = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    convert(stack, Recipe())
    (ledger,) = find_ledgers(stack)
    assert [layer.fqn for layer in ledger.layers] == [str(i) for i in range(20)]


def test_an_optimizer_updates_ledgers_in_the_order_in_which_they_were_made():
    layers = [made()[0] for _ in range(8)]
    order: list[int] = []
    for number, layer in enumerate(layers):
        find_ledgers(layer)[0].subscribe(lambda _, number=number: order.append(number))
        backward(layer, 1.0)
    torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.0).step()
    assert order == list(range(8))


# ---- loops of other kinds ------------------------------------------------------------------


def test_an_optimizer_with_a_closure_makes_one_update_a_step() -> None:
    model, ledger = mlp()

    def closure() -> float:
        loss = model(torch.ones(5, 6)).square().sum()
        loss.backward()
        return loss.item()

    torch.optim.LBFGS(model.parameters(), max_iter=3).step(closure)
    assert ledger.updates == 1


def test_forwards_and_backwards_without_a_step_never_update_and_keep_adding() -> None:
    model, ledger = mlp()
    for _ in range(5):
        train(model, torch.randn(5, 6))
    assert ledger.updates == 0
    assert (ledger.scale == 0).all()
    assert (ledger.pending[:, Stat.CASTS] == 5).all()


def test_a_forward_without_its_backward_changes_nothing() -> None:
    model, ledger = mlp()
    model(torch.randn(5, 6) * 1000)
    with torch.no_grad():
        model(torch.randn(5, 6) * 1000)
    SGD(model.parameters(), lr=0.1).step()
    assert not ledger.has_pending
    assert ledger.updates == 0


def test_a_second_backward_counts_only_the_cast_that_it_makes() -> None:
    model = nn.Linear(4, 3)
    convert(model, Recipe())
    (ledger,) = find_ledgers(model)
    y = model(torch.randn(5, 4)).sum()
    y.backward(retain_graph=True)
    assert ledger.pending[:, Stat.CASTS].tolist() == [1, 1, 1]
    y.backward()
    assert ledger.pending[:, Stat.CASTS].tolist() == [1, 1, 2]


def test_a_step_that_a_gradient_scaler_skips_updates_nothing() -> None:
    model, ledger = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        before = ledger.updates, ledger.amax_history.clone(), ledger.scale.clone()
        scaler.scale(model(torch.randn(5, 6)).sum()).backward()
        if bad:
            grad = next(model.parameters()).grad
            assert grad is not None
            grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert ledger.updates == before[0] + (not bad)
        assert same([ledger.amax_history, ledger.scale], list(before[1:])) is bad
    assert (ledger.amax_history > 0).sum(1).tolist() == [2] * 6


def test_a_frozen_model_updates_with_nothing() -> None:
    model, ledger = mlp()
    model.requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=True)
    train(model, x)
    SGD([x], lr=0.1).step()
    assert x.grad is not None
    assert ledger.updates == 0


def test_an_optimizer_in_backward_updates_each_site_once_a_step() -> None:
    model, ledger = mlp()
    for parameter in model.parameters():
        optimizer = SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _p, o=optimizer: o.step())
    for _ in range(2):
        train(model, torch.randn(5, 6))
    assert (ledger.amax_history > 0).sum(1).tolist() == [2] * 6
