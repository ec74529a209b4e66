import copy
import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from unclamp import Delayed, Dynamic, Recipe, convert
from unclamp.nn import Ledger, find_ledgers
from unclamp.numerics import Stat


def mlp() -> tuple[nn.Sequential, Ledger]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    convert(model, Recipe.uniform(Delayed(history_len=4)))
    return model, find_ledgers(model)[0]


def train(model: nn.Module, x: Tensor, dy: float = 1.0) -> None:
    y = model(x)
    y.backward(torch.full_like(y, dy))


def state(ledger: Ledger) -> list[Tensor]:
    return [ledger.amax_history.clone(), ledger.scale.clone(), ledger.pending.clone()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_windows_may_differ_by_site() -> None:
    model = nn.Linear(4, 3, bias=False)
    one, two, many = Delayed(history_len=1), Delayed(history_len=2), Delayed(history_len=16)
    convert(model, Recipe(input=one, weight=two, grad_output=many))
    (ledger,), optimizer = find_ledgers(model), SGD(model.parameters(), lr=0.0)
    for value in (8.0, 4.0, 2.0):
        nn.init.constant_(model.weight, value)
        train(model, torch.full((2, 4), value), value)
        optimizer.step()
    assert ledger.scale.tolist() == [448 / 2, 448 / 4, 57344 / 8]
    assert [len(ledger.history_of(row)) for row in range(3)] == [1, 2, 16]


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


def test_a_deepcopy_has_its_own_ledger_that_follows_its_own_optimizer() -> None:
    model, ledger = mlp()
    train(model, torch.randn(5, 6))
    twin = copy.deepcopy(model)
    (twin_ledger,) = find_ledgers(twin)
    assert twin_ledger is not ledger
    assert same(state(twin_ledger), state(ledger))
    SGD(twin.parameters(), lr=0.1).step()
    assert (ledger.updates, twin_ledger.updates) == (0, 1)
    SGD(model.parameters(), lr=0.1).step()
    assert (ledger.updates, twin_ledger.updates) == (1, 1)
    train(twin, torch.randn(5, 6))
    assert not ledger.has_pending


def test_an_update_is_as_many_kernels_for_many_layers_as_for_one() -> None:
    counts = []
    for layers in (1, 12):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        convert(model, Recipe())
        train(model, torch.randn(3, 4))
        with torch.profiler.profile() as profile:
            find_ledgers(model)[0].update()
        counts.append(len(cast(list[object], profile.events())))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_of_the_gradient_leaves_other_rows_alone(bad: float) -> None:
    results = []
    for value in (0.0, bad):
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        convert(model, Recipe.uniform(Dynamic()))
        x, dy = torch.randn(6, 7, requires_grad=True), torch.randn(6, 5)
        dy[2], dy[2, 1] = 0, value
        model(x).backward(dy)
        results.append((x.grad, model.weight.grad))
    (clean, _), (grad_input, grad_weight) = results
    assert clean is not None
    assert grad_input is not None
    assert grad_weight is not None
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(grad_input[keep], clean[keep])
    finite = grad_weight.isfinite().all(1).tolist()
    assert finite == [True, math.isinf(bad), True, True, True]


def blocks(scaling: Delayed | Dynamic) -> nn.ModuleList:
    torch.manual_seed(3)
    model = nn.ModuleList(
        nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.GELU(), nn.Linear(9, 6))
        for _ in range(2)
    )
    convert(model, Recipe.uniform(scaling))
    return model


def gradients(model: nn.ModuleList, call: Callable[..., Tensor]) -> list[Tensor]:
    """Train three steps of two microsteps; return every gradient of every microstep."""
    optimizer = SGD(model.parameters(), lr=0.1)
    grads = []
    torch.manual_seed(5)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            leaf = x = torch.randn(5, 6, requires_grad=True)
            for block in model:
                x = call(block, x)
            x.square().sum().backward()
            held = [leaf.grad, *(p.grad for p in model.parameters())]
            grads += [g.clone() for g in held if g is not None]
        optimizer.step()
    return grads


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("scaling", [Delayed(history_len=2), Dynamic()])
def test_checkpointing_over_steps_microsteps_and_dropout_changes_no_bit(
    scaling: Delayed | Dynamic, use_reentrant: bool
) -> None:
    seen: list[Tensor] = []
    plain, model = blocks(scaling), blocks(scaling)
    for ledger in (*find_ledgers(plain), *find_ledgers(model)):
        ledger.subscribe(lambda update: seen.append(update.stats))
    expected = gradients(plain, lambda block, x: block(x))
    got = gradients(
        model, lambda block, x: cast(Tensor, checkpoint(block, x, use_reentrant=use_reentrant))
    )
    assert len(got) == 54
    assert same(got, expected)
    assert same(state(find_ledgers(model)[0]), state(find_ledgers(plain)[0]))
    assert len(seen) == 6
    assert same(seen[:3], seen[3:])
    assert all((stats[:, Stat.CASTS] == 2).all() for stats in seen)
