"""Copies and loads of scaling state that go wrong silently if they go wrong."""

import copy
import io

import pytest
import torch
from torch import nn

from unclamp.nn import Fp8Linear, convert, find_ledgers, revert
from unclamp.numerics import Stat
from unclamp.recipe import Recipe
from unclamp.scaling import Delayed, Dynamic


def step(model: nn.Module, optimizer: torch.optim.Optimizer, amax: float) -> None:
    optimizer.zero_grad()
    model(torch.full((2, 4), amax)).sum().backward()
    optimizer.step()


def made(history_len: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    convert(model, Recipe.uniform(Delayed(history_len=history_len)))
    return model, optimizer


def test_a_deep_copy_has_its_own_ledger_following_its_own_optimizer():
    model, optimizer = made()
    step(model, optimizer, 2.0)
    twin = copy.deepcopy(model)
    (ledger,), (other,) = find_ledgers(model), find_ledgers(twin)
    assert other is not ledger
    assert torch.equal(other.scale, ledger.scale)
    step(model, optimizer, 8.0)
    assert (ledger.updates, other.updates) == (2, 1)
    assert ledger.scale[0] == 56
    assert other.scale[0] == 224
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.0), 16.0)
    assert (ledger.updates, other.updates) == (2, 2)
    assert ledger.scale[0] == 56
    assert other.scale[0] == 28


def test_a_checkpoint_loads_with_weights_only_and_continues_bit_for_bit():
    model, optimizer = made()
    for amax in (2.0, 9.0, 3.0):
        step(model, optimizer, amax)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = made()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 4) * 10
    assert torch.equal(model(x), other(x))
    assert torch.equal(find_ledgers(model)[0].scale, find_ledgers(other)[0].scale)


@pytest.mark.parametrize(("length", "kept"), [(2, [3, 9]), (6, [3, 9, 2, 0, 0, 0])])
def test_a_resized_window_keeps_its_newest_entries(length, kept):
    model, optimizer = made()
    for amax in (2.0, 9.0, 3.0):
        step(model, optimizer, amax)
    other, _ = made(length)
    other.load_state_dict(model.state_dict())
    assert find_ledgers(other)[0].history_of(0).tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_keep_float32_scaling_state(dtype):
    model, optimizer = made()
    step(model, optimizer, 3.0)
    (ledger,) = find_ledgers(model)
    before = ledger.scale.clone()
    model.to(dtype)
    assert ledger.scale.dtype == ledger.amax_history.dtype == torch.float32
    assert torch.equal(ledger.scale, before)
    other = made()[0].to(dtype)
    other.load_state_dict(model.state_dict())
    assert torch.equal(find_ledgers(other)[0].scale, before)


def test_gradient_clipping_and_weight_decay_never_see_scaling_state():
    model, optimizer = made()
    step(model, optimizer, 3.0)
    (ledger,) = find_ledgers(model)
    scale, history = ledger.scale.clone(), ledger.amax_history.clone()
    decay = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    decay.step()
    assert torch.equal(ledger.scale, scale)
    assert torch.equal(ledger.amax_history, history)
    assert [name for name, _ in model.named_buffers()] == []
    assert len(list(model.parameters())) == 4


def test_revert_gives_the_same_keys_outputs_and_parameters():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    keys, output = list(plain.state_dict()), plain(x)
    parameters = list(plain.parameters())
    convert(plain, Recipe.uniform(Dynamic()))
    assert not torch.equal(plain(x), output)
    assert [k for k in plain.state_dict() if "unclamp_" not in k] == keys
    revert(plain)
    assert not any(isinstance(m, Fp8Linear) for m in plain)
    assert list(plain.state_dict()) == keys
    assert torch.equal(plain(x), output)
    assert all(a is b for a, b in zip(plain.parameters(), parameters, strict=True))


def test_state_saved_under_another_format_saturates_nothing() -> None:
    saved = torch.nn.Linear(8, 8)
    convert(saved, Recipe(input_format="e5m2"))
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.0)
    x = torch.randn(4, 8)
    for _ in range(2):
        saved(x).sum().backward()
        optimizer.step()
    model = torch.nn.Linear(8, 8)
    convert(model, Recipe())
    model.load_state_dict(saved.state_dict())
    assert isinstance(model, Fp8Linear)
    model(x).sum().backward()
    ledger = model.sites.ledger
    assert ledger.pending[model.sites.indices["input"], Stat.SATURATED] == 0
