"""A checkpoint that comes in parts, as the files of a sharded one, leaves what one load would."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from truths.kept import fresh, train
from unclamp import Delayed, PerBlock, Recipe, ScalingState, convert, observe, weights_only
from unclamp.nn import find_ledgers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
BLOCKS = Recipe(weight=Delayed(granularity=PerBlock(2, 2), history_len=3), warmup_steps=9)


def donor(recipe: Recipe | None) -> dict[str, Tensor]:
    model = fresh(recipe)
    train(model, 3)
    return model.state_dict()


DONORS = {"delayed": donor(None), "blocks": donor(BLOCKS)}
KEYS = list(DONORS["delayed"])


def in_part(model: nn.Module, part: dict[str, Tensor]) -> None:
    model.load_state_dict(part, strict=False)


def in_part_of_a_full_one(model: nn.Module, part: dict[str, Tensor]) -> None:
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(part), options=options)


def differs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("load", [in_part, in_part_of_a_full_one])
@pytest.mark.parametrize("recipe", DONORS)
@settings(max_examples=25)
@given(order=st.permutations(KEYS), cuts=st.sets(st.integers(1, len(KEYS) - 1), max_size=5))
def test_parts_in_any_order_are_the_whole(
    load: Callable[..., None], recipe: str, order: list[str], cuts: set[int]
) -> None:
    whole = DONORS[recipe]
    model = fresh(None if recipe == "delayed" else BLOCKS)
    train(model, 2, seed=9)
    ends = [0, *sorted(cuts), len(order)]
    for start, end in itertools.pairwise(ends):
        load(model, {key: whole[key] for key in order[start:end]})
    assert differs(model.state_dict(), whole) == []
    assert find_ledgers(model)[0].count() == 3


@pytest.mark.parametrize("load", [in_part, in_part_of_a_full_one])
def test_what_a_part_does_not_speak_of_stays(load: Callable[..., None]) -> None:
    model = fresh()
    train(model, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load(model, {"0.bias": torch.zeros(8)})
    assert differs(model.state_dict(), before) == ["0.bias"]
    load(model, {"0.unclamp_input_scale": torch.tensor(3.0)})
    assert differs(model.state_dict(), before) == ["0.bias", "0.unclamp_input_scale"]


@pytest.mark.parametrize("load", [in_part, in_part_of_a_full_one])
def test_plain_weights_in_parts_are_another_models(load: Callable[..., None]) -> None:
    model = fresh()
    train(model, 3)
    for key, value in weights_only(DONORS["delayed"]).items():
        load(model, {key: value})
    assert (find_ledgers(model)[0].scale == 0).all()


def test_a_second_weight_is_another_checkpoints() -> None:
    whole, model = DONORS["delayed"], fresh()
    plain = weights_only(whole)
    model.load_state_dict(whole)
    model.load_state_dict(plain)
    assert (find_ledgers(model)[0].scale == 0).all()
    model.load_state_dict(plain)
    model.load_state_dict({k: v for k, v in whole.items() if k not in plain}, strict=False)
    assert differs(model.state_dict(), whole) == []
    model.load_state_dict(plain)
    assert (find_ledgers(model)[0].scale == 0).all()


def test_state_that_came_before_a_step_is_not_that_of_a_weight_after_it() -> None:
    whole, model = DONORS["delayed"], fresh()
    plain = weights_only(whole)
    model.load_state_dict({k: v for k, v in whole.items() if k not in plain}, strict=False)
    train(model, 1)
    model.load_state_dict(plain)
    assert (find_ledgers(model)[0].scale == 0).all()


def test_scaling_state_may_come_before_the_weights_too() -> None:
    model, other = fresh(), fresh()
    train(model, 3)
    ScalingState(other).load_state_dict(ScalingState(model).state_dict())
    other.load_state_dict(weights_only(model.state_dict()))
    assert differs(other.state_dict(), model.state_dict()) == []


def test_a_model_that_loads_its_own_tensors_keeps_what_is_known_of_them() -> None:
    model = fresh()
    train(model, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(4, 6)
    with torch.no_grad():
        want = copy.deepcopy(model.eval())(x)
        model.load_state_dict(dict(model.named_parameters()))
        assert torch.equal(model(x), want)
    assert differs(model.state_dict(), before) == []


def test_observed_models_load_parts_too() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    observe(model)
    train(model, 2)
    before = ScalingState(model).state_dict()
    model.load_state_dict({"0.bias": torch.zeros(8)}, strict=False)
    assert differs(ScalingState(model).state_dict(), before) == []
    convert_later = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    convert(convert_later, Recipe())
    ScalingState(convert_later).load_state_dict(before)
    assert find_ledgers(convert_later)[0].count() == 2
