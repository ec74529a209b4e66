"""Scaling state in checkpoints, copies and models of other kinds."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from unclamp import Delayed, Dynamic, Guarded, PerRow, Recipe, convert, weights_only
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat


def made(recipe: Recipe | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    convert(model, recipe or Recipe.uniform(Guarded(history_len=4)))
    return model


def train(model: nn.Module, steps: int, seed: int = 0) -> list[torch.Tensor]:
    optimizer = SGD(model.parameters(), lr=0.05)
    torch.manual_seed(seed)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(torch.randn(5, 6))
        y.square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def goes_on_alike(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(train(a, 3, seed=5), train(b, 3, seed=5), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.filterwarnings("ignore")  # torch's own, for want of a process group
@pytest.mark.parametrize("recipe", [None, Recipe(weight=Delayed(granularity=PerRow()))])
def test_a_distributed_checkpoint_brings_everything_back(tmp_path, recipe):
    model, other = made(recipe), made(recipe)
    train(model, 3)
    train(other, 2, seed=9)
    save_distributed(model.state_dict(), checkpoint_id=tmp_path / "dcp")
    state = other.state_dict()
    load_distributed(state, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict(state)
    assert find_ledgers(other)[0].updates == 3
    assert goes_on_alike(model, other)


def test_strict_loading_into_a_plain_model_names_the_scaling_state():
    model, plain = made(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
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
    model = made()
    train(model, 3)
    scale = find_ledgers(model)[0].scale.clone()
    model.load_state_dict({"2.bias": torch.zeros(4)}, strict=False)
    assert torch.equal(find_ledgers(model)[0].scale, scale)
    model.load_state_dict({"2.weight": torch.zeros(4, 8)}, strict=False)
    assert torch.equal(find_ledgers(model)[0].scale[:3], scale[:3])
    assert (find_ledgers(model)[0].scale[3:] == 0).all()


def test_an_average_of_the_weights_has_its_own_state_and_disturbs_none():
    model, steady = made(), made()
    train(model, 2)
    train(steady, 2)
    average = AveragedModel(model, multi_avg_fn=None)
    own = find_ledgers(average)[0]
    assert own is not find_ledgers(model)[0]
    before = own.scale.clone()
    for seed in (1, 2):
        train(model, 2, seed)
        train(steady, 2, seed)
        average.update_parameters(model)
        average(torch.randn(5, 6))
    assert torch.equal(own.scale, before)
    assert goes_on_alike(model, steady)


def test_a_copy_of_a_layer_with_row_histories_reads_its_own_ledger():
    model = made(Recipe(weight=Guarded(granularity=PerRow())))
    train(model, 3)
    twin = copy.deepcopy(model)
    (mine,), (theirs,) = find_ledgers(model), find_ledgers(twin)
    theirs.scale.fill_(1e-3)
    assert bool((mine.scale != 1e-3).all())
    x = torch.randn(5, 6)
    assert not torch.equal(twin(x), model(x))


def test_tied_weights_are_cast_by_each_layer_that_uses_them():
    embed, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Linear(8, 8), head)
    report = convert(model, Recipe.uniform(Dynamic()))
    assert report.skipped == {"0": "not a linear layer (Embedding)"}
    assert list(report.converted) == ["1", "2"]
    assert model[2].weight is model[0].weight
    model(torch.arange(16)).sum().backward()
    (ledger,) = find_ledgers(model)
    assert ledger.pending[:, Stat.CASTS].tolist() == [1] * 6
    assert embed.weight.grad is not None


def test_attention_stays_as_it_is_and_is_reported():
    model = nn.MultiheadAttention(8, 2)
    report = convert(model, Recipe())
    assert report.converted == {}
    assert report.skipped[""] == "not a linear layer (MultiheadAttention)"
    assert "never calls it" in report.skipped["out_proj"]
