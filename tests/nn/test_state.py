import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from unclamp import Delayed, Fp8Linear, Recipe, convert, revert
from unclamp.nn import find_ledgers


def fresh(history_len: int = 4) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    convert(model, Recipe.uniform(Delayed(history_len=history_len)))
    return model


def train(model: nn.Module, steps: int, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    optimizer = SGD(model.parameters(), lr=0.05)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(torch.randn(5, 6) * 3)
        y.square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def state_keys(model: nn.Module) -> list[str]:
    """Return the keys of scales and histories; the count of updates is kept beside them."""
    return [key for key in model.state_dict() if key.endswith(("_scale", "_amax_history"))]


def through_a_file(data: Any, path: Path) -> Any:
    torch.save(data, path)
    return torch.load(path, weights_only=True)


def test_keys_of_the_weights_are_those_of_the_plain_model() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    kept = [key for key in fresh().state_dict() if "unclamp_" not in key]
    assert kept == list(plain.state_dict())


def test_scaling_state_is_plain_float32_tensors() -> None:
    state = fresh().state_dict()
    keys = state_keys(fresh())
    assert len(keys) == 2 * 3 * 2
    for key in keys:
        assert type(state[key]) is Tensor
        assert state[key].dtype == torch.float32
        assert not state[key].requires_grad


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
    model, other = fresh(before), fresh(after)
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


def test_a_model_made_on_the_meta_device_can_be_materialised() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
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
