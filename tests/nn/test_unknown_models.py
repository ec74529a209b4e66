"""A ledger whose model is gone, or was never known, trains as one whose model is there."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import unclamp
from unclamp import Delayed, Recipe, UnclampWarning
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

LENGTH, WIDTH = 4, 16
RECIPE = Recipe.uniform(Delayed(history_len=LENGTH))
OVERFLOWS = 464
"""Above it, rounding to E4M3 lands above its largest value, 448."""
Pair = tuple[nn.Module, nn.Module]


class Aliased(nn.Module):
    """Something that names a part of a model before the model."""

    def __init__(self, model: nn.ModuleList) -> None:
        super().__init__()
        self.head = model[1]
        self.model = model


def converted() -> nn.ModuleList:
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    unclamp.convert(model, RECIPE)
    return model


def of_a_container_that_is_gone() -> Pair:
    first, second = converted()
    return first, second


def unpickled() -> Pair:
    first, second = pickle.loads(pickle.dumps(converted()))
    return first, second


def loaded() -> Pair:
    file = io.BytesIO()
    torch.save(converted(), file)
    file.seek(0)
    first, second = torch.load(file, weights_only=False)
    return first, second


def copied_beside_an_alias() -> Pair:
    first, second = copy.deepcopy(Aliased(converted())).model
    return first, second


def copied_without_their_container() -> Pair:
    first, second = converted()
    return copy.deepcopy((first, second))


MADE = [
    of_a_container_that_is_gone,
    unpickled,
    loaded,
    copied_beside_an_alias,
    copied_without_their_container,
]
every_unknown_model = pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)


def history(layer: nn.Module) -> list[float]:
    return layer.state_dict()["unclamp_input_amax_history"].tolist()


@every_unknown_model
def test_two_optimizers_make_one_update_an_iteration(made: Callable[[], Pair]) -> None:
    generator, critic = made()
    optimizers = [SGD(each.parameters(), lr=0.0) for each in (critic, generator)]
    for amax in (1.0, 2.0, 4.0):
        x = torch.full((2, WIDTH), amax)
        for part, optimizer in zip((critic, generator), optimizers, strict=True):
            part(x).sum().backward()
            optimizer.step()
    assert history(generator) == history(critic) == [4, 2, 1, 0]
    assert float(generator.state_dict()["unclamp_updates"]) == 3


@every_unknown_model
def test_an_optimizer_of_something_else_updates_nothing(made: Callable[[], Pair]) -> None:
    first, second = made()
    other = nn.Linear(WIDTH, WIDTH)
    optimizer, stranger = SGD([*first.parameters(), *second.parameters()]), SGD(other.parameters())
    for amax in (1.0, 2.0):
        other(second(first(torch.full((2, WIDTH), amax)))).sum().backward()
        stranger.step()
        optimizer.step()
    assert history(first) == [2, 1, 0, 0]


@every_unknown_model
def test_a_frozen_base_in_evaluation_mode_counts(made: Callable[[], Pair]) -> None:
    torch.manual_seed(0)
    base, adapter = made()
    base.requires_grad_(False).eval()
    optimizer = SGD(adapter.parameters(), lr=1e-3)
    (ledger,) = find_ledgers(adapter)
    counts: list[int] = []
    ledger.subscribe(lambda update: counts.append(int(update.stats[0, Stat.SATURATED])))
    truth, past = [], []
    for step in range(6):
        x = torch.randn(16, WIDTH) * (1 + 3 * step)
        scale = 448 / max(past[-LENGTH:] or [float(x.abs().max())])
        truth.append(int(((x * scale).abs() > OVERFLOWS).sum()))
        past.append(float(x.abs().max()))
        adapter(base(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counts == truth
    assert sum(truth) > 0


def test_a_frozen_base_follows_an_adapter_of_which_nothing_is_known() -> None:
    base = pickle.loads(pickle.dumps(converted()))[0].requires_grad_(False).eval()
    adapter = nn.Linear(WIDTH, WIDTH)
    optimizer = SGD(adapter.parameters(), lr=0.0)
    for amax in (1.0, 2.0, 4.0):
        base(adapter(torch.full((2, WIDTH), amax))).sum().backward()
        optimizer.step()
    assert float(base.state_dict()["unclamp_updates"]) == 3


@every_unknown_model
def test_copies_of_the_parameters_in_an_optimizer_are_told_of(made: Callable[[], Pair]) -> None:
    layer, _ = made()
    masters = [p.detach().clone() for p in layer.parameters()]
    optimizer = SGD(masters, lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for amax in range(1, 12):
            layer(torch.full((2, WIDTH), float(amax))).sum().backward()
            for master, p in zip(masters, layer.parameters(), strict=True):
                master.grad, p.grad = p.grad, None
            optimizer.step()
            for master, p in zip(masters, layer.parameters(), strict=True):
                p.data.copy_(master)
    assert [w.category for w in said] == [UnclampWarning]
    unclamp.step(layer)
    assert history(layer) == [11, 0, 0, 0]


def test_a_recorder_or_a_step_that_is_told_makes_an_unpickled_model_known() -> None:
    model = pickle.loads(pickle.dumps(converted()))
    (ledger,) = find_ledgers(model[0])  # a part, which cannot be the whole
    assert ledger.clock.model is None
    unclamp.step(model)
    assert ledger.clock.model is model
    whole = nn.Sequential(model)
    find_ledgers(whole)
    assert ledger.clock.model is whole
    find_ledgers(model)
    assert ledger.clock.model is whole


def test_a_shallow_copy_of_a_layer_leaves_it_its_place() -> None:
    model = converted()
    first: Any = model[0]
    twin = copy.copy(first)
    assert first.sites.module() is first
    del twin
    optimizer = SGD(model.parameters(), lr=0.0)
    first(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    assert history(first)[0] == 1
