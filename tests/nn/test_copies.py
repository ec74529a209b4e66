"""Copies, pickles and averages of a model have scaling state of their own and go on with it."""

import copy
import io
import pickle

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from truths.kept import drive, fresh, train
from unclamp import (
    Fp8Linear,
    Guarded,
    PerRow,
    Recipe,
    evaluation_counts,
    refresh,
)
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat


def goes_on_alike(a: nn.Module, b: nn.Module) -> bool:
    pairs = list(zip(train(a, 3, 5, lr=1e-3), train(b, 3, 5, lr=1e-3), strict=True))
    assert all(x.isfinite().all() for x, _ in pairs)
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_deep_copy_has_its_own_ledger_following_its_own_optimizer():
    model = fresh()
    drive(model, 2.0)
    twin = copy.deepcopy(model)
    (ledger,), (other,) = find_ledgers(model), find_ledgers(twin)
    assert other is not ledger
    assert torch.equal(other.scale, ledger.scale)
    drive(model, 8.0)
    assert (ledger.updates, other.updates) == (2, 1)
    assert ledger.scale[0] == 56
    assert other.scale[0] == 224
    drive(twin, 16.0)
    assert (ledger.updates, other.updates) == (2, 2)
    assert ledger.scale[0] == 56
    assert other.scale[0] == 28


def test_a_deep_copy_starts_with_nothing_pending_and_commits_to_its_own_ledger() -> None:
    """As it starts without gradients: what its source's casts saw is its source's."""
    model = fresh()
    drive(model, 1.0)
    (ledger,) = find_ledgers(model)
    model(torch.randn(5, 6)).sum().backward()
    twin = copy.deepcopy(model)
    (twin_ledger,) = find_ledgers(twin)
    assert twin_ledger is not ledger
    for name in ("amax_history", "scale"):
        assert torch.equal(getattr(twin_ledger, name), getattr(ledger, name))
    assert ledger.has_pending
    assert not twin_ledger.has_pending
    assert not twin_ledger.pending[:, Stat.CASTS].any()
    SGD(twin.parameters(), lr=0.1).step()
    assert (ledger.updates, twin_ledger.updates) == (1, 1)
    SGD(model.parameters(), lr=0.1).step()
    assert (ledger.updates, twin_ledger.updates) == (2, 1)
    assert evaluation_counts(twin).age == 1
    drive(twin, 2.0)
    assert twin_ledger.history_of(0)[:2].tolist() == [2, 1]
    twin(torch.randn(5, 6)).sum().backward()
    assert not ledger.has_pending


def test_a_copied_layer_keeps_its_state_and_goes_on() -> None:
    model = fresh()
    train(model, 2)
    layer = model[0]
    twin = copy.deepcopy(layer)
    assert isinstance(layer, Fp8Linear)
    assert isinstance(twin, Fp8Linear)
    old, new = layer.sites.ledger, twin.sites.ledger
    assert torch.equal(new.scale[:3], old.scale[:3])
    twin(torch.randn(2, 6)).sum().backward()
    SGD(twin.parameters(), lr=0.1).step()
    assert new.updates == old.updates + 1


def test_a_pickled_model_keeps_its_state_and_goes_on() -> None:
    model = fresh()
    train(model, 2)
    twin = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(a, b) for a, b in zip(train(model, 3), train(twin, 3), strict=True))


def test_torch_saves_the_whole_model() -> None:
    model = fresh()
    train(model, 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert isinstance(twin[0], Fp8Linear)


def test_an_average_of_the_weights_has_its_own_state_and_disturbs_none():
    model = fresh(Recipe.uniform(Guarded(history_len=4)))
    steady = copy.deepcopy(model)
    rate = 1e-3  # at which it does not diverge: an overflow is NaN, which is equal to nothing
    train(model, 2, lr=rate)
    train(steady, 2, lr=rate)
    average = AveragedModel(model, multi_avg_fn=None)
    own = find_ledgers(average)[0]
    assert own is not find_ledgers(model)[0]
    before = own.scale.clone()
    for seed in (1, 2):
        train(model, 2, seed, rate)
        train(steady, 2, seed, rate)
        average.update_parameters(model)
        average(torch.randn(5, 6))
    assert torch.equal(own.scale, before)
    assert goes_on_alike(model, steady)


def test_a_copy_of_a_layer_with_row_histories_reads_its_own_ledger():
    model = fresh(Recipe(weight=Guarded(granularity=PerRow())))
    train(model, 3)
    twin = copy.deepcopy(model)
    (mine,), (theirs,) = find_ledgers(model), find_ledgers(twin)
    theirs.scale.fill_(1e-3)
    assert bool((mine.scale != 1e-3).all())
    x = torch.randn(5, 6)
    assert not torch.equal(twin(x), model(x))


def test_a_copy_that_is_made_in_inference_mode_can_be_refreshed_and_trained() -> None:
    model = fresh()
    drive(model, 1.0)
    with torch.inference_mode():
        twin = copy.deepcopy(model)
    drive(model, 4.0)
    refresh(twin, from_=model)
    (ledger,), (source,) = find_ledgers(twin), find_ledgers(model)
    assert torch.equal(ledger.amax_history, source.amax_history)
    assert torch.equal(ledger.scale, source.scale)
    assert float(ledger.history_of(0)[0]) == 4
