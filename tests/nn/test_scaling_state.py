"""Scaling state is plain float32 tensors that no optimizer and no change of dtype reaches."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from truths.kept import fresh, state_keys, train
from unclamp import (
    Recipe,
    convert,
)
from unclamp.nn import find_ledgers


def test_scaling_state_is_plain_float32_tensors() -> None:
    state = fresh().state_dict()
    keys = state_keys(fresh())
    assert len(keys) == 2 * 3 * 2
    for key in keys:
        assert type(state[key]) is Tensor
        assert state[key].dtype == torch.float32
        assert not state[key].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_dtype_leaves_scaling_state_alone(dtype: torch.dtype) -> None:
    model = fresh()
    train(model, 2)
    state = model.state_dict()
    before = {key: state[key] for key in state_keys(model)}
    model.to(dtype)
    after = model.state_dict()
    assert all(after[key].dtype == torch.float32 for key in before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert after["0.weight"].dtype == dtype


def test_half_trains_on() -> None:
    model = fresh().half()
    y = model(torch.randn(5, 6).half())
    y.sum().backward()
    SGD(model.parameters(), lr=0.1).step()
    assert y.dtype == torch.float16
    assert find_ledgers(model)[0].scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_keep_float32_scaling_state(dtype):
    model = fresh()
    train(model, 1)
    (ledger,) = find_ledgers(model)
    before = ledger.scale.clone()
    model.to(dtype)
    assert ledger.scale.dtype == ledger.amax_history.dtype == torch.float32
    assert torch.equal(ledger.scale, before)
    other = fresh().to(dtype)
    other.load_state_dict(model.state_dict())
    assert torch.equal(find_ledgers(other)[0].scale, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_reach_scaling_state(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = nn.Linear(8, 8, dtype=torch.float32)
        convert(model, Recipe(accumulate="hopper"))
        model(torch.randn(4, 8, dtype=torch.float32)).sum().backward()
        SGD(model.parameters(), lr=0.1).step()
        (ledger,) = find_ledgers(model)
        for tensor in (ledger.scale, ledger.amax_history, ledger.block_amax):
            assert tensor.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_parameters_and_buffers_hold_no_scaling_state() -> None:
    model = fresh()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight"]
    assert list(model.buffers()) == []


def test_optimizers_decay_and_clipping_never_touch_scaling_state() -> None:
    model = fresh()
    train(model, 2)
    (ledger,) = find_ledgers(model)
    before = ledger.amax_history.clone(), ledger.scale.clone()
    optimizer = AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm**2 == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-6)
    optimizer.step()
    assert torch.equal(ledger.amax_history, before[0])
    assert torch.equal(ledger.scale, before[1])


def test_an_attribute_that_is_not_there_is_an_attribute_error() -> None:
    model = fresh()
    assert not hasattr(model[0], "unclamp_nonsense")  # pyright: ignore[reportIndexIssue]
    assert not hasattr(nn.Module.__new__(type(model[0])), "unclamp_input_scale")  # pyright: ignore
