"""Scaling state in a model's state_dict: saved, loaded, resized, averaged, and left out."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from truths.kept import drive, fresh, state_keys, train
from unclamp import (
    Delayed,
    Fp8Linear,
    Guarded,
    PerBlock,
    PerRow,
    Recipe,
    convert,
    observe,
    revert,
    weights_only,
)
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat


def through_a_file(data: Any, path: Path) -> Any:
    torch.save(data, path)
    return torch.load(path, weights_only=True)


def goes_on_alike(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(train(a, 3, seed=5), train(b, 3, seed=5), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


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


def test_keys_of_the_weights_are_those_of_the_plain_model() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    kept = [key for key in fresh().state_dict() if "unclamp_" not in key]
    assert kept == list(plain.state_dict())


def test_a_saved_state_does_not_change_with_training() -> None:
    model = fresh()
    train(model, 1)
    saved = {k: v for k, v in model.state_dict().items() if "unclamp_" in k}
    before = {k: v.clone() for k, v in saved.items()}
    train(model, 2)
    assert all(torch.equal(saved[key], before[key]) for key in saved)


def test_a_restored_model_continues_bit_for_bit(tmp_path: Path) -> None:
    model = fresh()
    train(model, 3)
    state = through_a_file(model.state_dict(), tmp_path / "state.pt")
    other = fresh()
    train(other, 6, seed=9)
    other.load_state_dict(state)
    continued = zip(train(model, 5), train(other, 5), strict=True)
    assert all(torch.equal(a, b) for a, b in continued)
    mine, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(("before", "after"), [(6, 3), (3, 6), (4, 4), (1, 8), (8, 1)])
def test_a_resized_history_keeps_the_newest(before: int, after: int) -> None:
    model, other = fresh(history_len=before), fresh(history_len=after)
    train(model, 8)
    train(other, 2, seed=4)
    other.load_state_dict(model.state_dict())
    old, new = model.state_dict(), other.state_dict()
    for key in state_keys(model):
        if key.endswith("amax_history"):
            kept = min(before, after)
            assert torch.equal(new[key][:kept], old[key][:kept])
            assert (new[key][kept:] == 0).all()
            assert (old[key] > 0).all()


@pytest.mark.parametrize(("length", "kept"), [(2, [3, 9]), (6, [3, 9, 2, 0, 0, 0])])
def test_a_resized_window_keeps_its_newest_entries(length, kept):
    model, other = fresh(), fresh(history_len=length)
    drive(model, 2.0, 9.0, 3.0)
    other.load_state_dict(model.state_dict())
    assert find_ledgers(other)[0].history_of(0).tolist() == kept


def test_a_checkpoint_without_state_loads_strictly_and_reseeds() -> None:
    model = fresh()
    train(model, 3)
    weights = {k: v for k, v in model.state_dict().items() if "unclamp_" not in k}
    result = model.load_state_dict(weights, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    (ledger,) = find_ledgers(model)
    assert (ledger.scale == 0).all()
    assert (ledger.amax_history == 0).all()
    other = fresh()
    other.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(train(model, 3), train(other, 3), strict=True))


def test_missing_and_unexpected_weights_are_still_errors() -> None:
    model = fresh()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "0.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in state.items() if k != "0.weight"})


def test_loading_drops_what_was_pending() -> None:
    model = fresh()
    train(model, 2)
    state = model.state_dict()
    model(torch.full((5, 6), 1e6)).sum().backward()
    model.load_state_dict(state)
    SGD(model.parameters(), lr=0.0).step()
    again = model.state_dict()
    assert all(torch.equal(again[key], state[key]) for key in state_keys(model))


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_a_model_made_on_the_meta_device_can_be_materialised(where: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    with torch.device(where):  # which new tensors are on
        convert(model, Recipe.uniform(Delayed(history_len=4)))
    model.to_empty(device="cpu")
    donor = fresh()
    train(donor, 2)
    model.load_state_dict(donor.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(train(model, 3), train(donor, 3), strict=True))


def test_a_reverted_model_saves_weights_only() -> None:
    model = fresh()
    train(model, 1)
    revert(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]


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


def test_strict_loading_into_a_plain_model_names_the_scaling_state():
    model = fresh()
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.unclamp_input_amax_history"'):
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(weights_only(model.state_dict()))
    weights = [each[0].get_parameter("weight") for each in (plain, model)]
    assert torch.equal(*weights)


def test_weights_only_drops_the_state_of_a_model_that_is_one_layer_too():
    layer = nn.Linear(4, 4)
    convert(layer, Recipe())
    assert list(weights_only(layer.state_dict())) == ["weight", "bias"]
    assert list(weights_only({"unclamp_net.weight": 1, "a.unclamp_weight_scale": 2})) == [
        "unclamp_net.weight"
    ]


def test_a_partial_state_dict_leaves_the_scaling_of_other_layers():
    model = fresh()
    train(model, 3)
    scale = find_ledgers(model)[0].scale.clone()
    model.load_state_dict({"0.bias": torch.zeros(8)}, strict=False)
    assert torch.equal(find_ledgers(model)[0].scale, scale)
    model.load_state_dict({"2.weight": torch.zeros(4, 8)}, strict=False)
    assert torch.equal(find_ledgers(model)[0].scale[:3], scale[:3])
    assert (find_ledgers(model)[0].scale[3:] == 0).all()


def test_a_state_of_one_operand_leaves_the_others_as_they_are():
    model, other = fresh(), fresh()
    drive(model, 2.0, 9.0, 3.0)
    drive(other, 5.0)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    some = {k: v for k, v in model.state_dict().items() if k.startswith("0.unclamp_weight_")}
    other.load_state_dict(some, strict=False)
    after = other.state_dict()
    assert len(some) == 2
    assert all(torch.equal(after[key], some.get(key, before[key])) for key in after)


def test_weights_with_the_state_of_one_operand_forget_the_old_weights_state_alone():
    model = fresh()
    drive(model, 2.0, 9.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    some = {"2.weight": torch.zeros(4, 8), "2.unclamp_input_scale": torch.tensor(3.0)}
    model.load_state_dict(some, strict=False)
    after = model.state_dict()
    assert float(after["2.unclamp_input_scale"]) == 3
    assert (after["2.unclamp_weight_amax_history"] == 0).all()
    changed = {"2.weight", "2.unclamp_input_scale", "2.unclamp_weight_scale"}
    changed.add("2.unclamp_weight_amax_history")
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - changed)


@pytest.mark.filterwarnings("ignore")  # torch's own, for want of a process group
@pytest.mark.parametrize(
    "recipe",
    [Recipe.uniform(Guarded(history_len=4)), Recipe(weight=Delayed(granularity=PerRow()))],
)
def test_a_distributed_checkpoint_brings_everything_back(tmp_path, recipe):
    model, other = fresh(recipe), fresh(recipe)
    train(model, 3)
    train(other, 2, seed=9)
    save_distributed(model.state_dict(), checkpoint_id=tmp_path / "dcp")
    state = other.state_dict()
    load_distributed(state, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict(state)
    assert find_ledgers(other)[0].updates == 3
    assert goes_on_alike(model, other)


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


class Elements(TorchDispatchMode):
    """Counts operators and the elements that they make; index_put_ writes its values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operators += 1
        written = args[2] if func is torch.ops.aten.index_put_.default else made
        self.elements += sum(x.numel() for x in tree_leaves(written) if isinstance(x, Tensor))
        return made


@pytest.mark.parametrize("blocks", [False, True])
def test_to_load_twice_the_layers_costs_twice_and_not_four_times(blocks: bool) -> None:
    def cost(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        weight = Delayed(granularity=PerBlock(2, 2)) if blocks else Delayed()
        convert(model, Recipe(weight=weight))
        state = model.state_dict()
        with Elements() as counted:
            model.load_state_dict(state)
        return counted.elements

    assert cost(64) < 2.2 * cost(32)


def test_to_look_up_one_tensor_of_the_state_makes_that_one() -> None:
    layer = nn.Linear(4, 4)
    convert(layer, Recipe())
    name = "unclamp_input_scale"
    with Elements() as one:
        found = getattr(layer, name)
    with Elements() as every:
        state = layer.scaling_state()  # pyright: ignore
    assert torch.equal(found, state[name])
    assert len(state) == 7
    assert one.operators < every.operators / 3
    with pytest.raises(AttributeError, match="unclamp_input_scales"):
        _ = layer.unclamp_input_scales
