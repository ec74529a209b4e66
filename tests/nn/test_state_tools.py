"""Scaling state in the hands of others: distributed checkpoints, averages of weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from unclamp import Recipe, convert, observe
from unclamp.nn import find_ledgers


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    convert(model, Recipe())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_torchs_distributed_checkpoints_get_and_set_the_whole_state() -> None:
    model, optimizer = trained()
    want = {key: value.clone() for key, value in model.state_dict().items()}
    got = get_model_state_dict(model)
    assert same(got, want)
    assert same(get_state_dict(model, optimizer)[0], want)
    other, _ = trained(0)
    set_model_state_dict(other, copy.deepcopy(got))
    assert same(other.state_dict(), want)
    both = get_state_dict(model, optimizer)
    third, thirds_optimizer = trained(1)
    set_state_dict(third, thirds_optimizer, model_state_dict=both[0], optim_state_dict=both[1])
    assert same(third.state_dict(), want)
    assert find_ledgers(third)[0].count() == 3


def test_an_observed_model_has_no_scaling_state_to_look_up() -> None:
    model = nn.Linear(4, 3)
    observe(model)
    assert set(get_model_state_dict(model)) == {"weight", "bias"}
    assert not hasattr(model, "unclamp_input_scale")


def test_averages_of_a_state_dict_can_be_taken_and_loaded() -> None:
    model, _ = trained()
    decay = 0.9
    average = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(value.is_floating_point() for value in average.values())
    for key, value in model.state_dict().items():
        average[key].mul_(decay).add_(value, alpha=1 - decay)
    twin, _ = trained(0)
    twin.load_state_dict(average)
    assert find_ledgers(twin)[0].count() == 3


def test_a_count_of_updates_saved_as_a_whole_number_loads() -> None:
    model, _ = trained()
    state = model.state_dict()
    old = {k: v.to(torch.int64) if k.endswith("unclamp_updates") else v for k, v in state.items()}
    twin, _ = trained(0)
    twin.load_state_dict(old)
    assert find_ledgers(twin)[0].count() == 3


def test_an_attribute_that_is_not_there_is_an_attribute_error() -> None:
    model, _ = trained(0)
    assert not hasattr(model[0], "unclamp_nonsense")  # pyright: ignore[reportIndexIssue]
    assert not hasattr(nn.Module.__new__(type(model[0])), "unclamp_input_scale")  # pyright: ignore
