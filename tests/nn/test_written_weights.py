"""A weight that is written outside of an optimizer's step is not cast on the scale before it."""

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Delayed, PerRow, Recipe
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

GAIN = 50.0


def through_fp8(x: Tensor, scale: float | Tensor) -> Tensor:
    factor = np.asarray(scale, dtype=np.float32)
    scaled = (x.detach().numpy() * factor).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(scaled.astype(np.float32) / factor)


def trained(**settings: object) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    unclamp.convert(layer, Recipe.uniform(Delayed(), **settings))
    optimizer = SGD(layer.parameters(), lr=1e-3)
    for _ in range(3):
        layer(torch.full((4, 16), 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.eval()


def by_version(weight: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(new)


def by_data(weight: Tensor, new: Tensor) -> None:
    weight.data.copy_(new)  # as PEFT's merge does: no version tells of it


def by_pointer(weight: Tensor, new: Tensor) -> None:
    weight.data = new.clone()


@pytest.mark.parametrize("write", [by_version, by_data, by_pointer])
def test_a_weight_written_in_an_evaluation_is_cast_by_its_own_scale(write) -> None:
    layer = trained()
    new = layer.weight.detach() * GAIN + torch.randn(16, 16)
    before = float(layer.state_dict()["unclamp_weight_scale"])
    assert through_fp8(new, before).isnan().float().mean() > 0.9  # what would be clamped
    write(layer.weight, new)
    x = torch.rand(8, 16)
    truth = through_fp8(x, 448.0) @ through_fp8(new, 448 / float(new.abs().max())).T
    with torch.no_grad():
        assert torch.allclose(layer(x), truth, rtol=1e-5, atol=1e-5)
    assert unclamp.evaluation_counts(layer).saturated == 0
    assert float(layer.state_dict()["unclamp_weight_scale"]) == before


def test_a_weight_that_became_much_smaller_is_measured_anew_too() -> None:
    layer = trained()
    new = layer.weight.detach() * 1e-6
    by_version(layer.weight, new)
    x = torch.rand(8, 16)
    truth = through_fp8(x, 448.0) @ through_fp8(new, 448 / float(new.abs().max())).T
    with torch.no_grad():
        assert torch.allclose(layer(x), truth, rtol=1e-5, atol=1e-12)


def test_each_row_of_a_written_weight_is_measured_anew() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    unclamp.convert(layer, Recipe(weight=Delayed(granularity=PerRow())))
    optimizer = SGD(layer.parameters(), lr=1e-3)
    layer(torch.full((4, 16), 1.0)).sum().backward()
    optimizer.step()
    new = torch.randn(16, 16) * torch.logspace(0, 3, 16).unsqueeze(1)
    by_version(layer.weight, new)
    x = torch.rand(8, 16)
    rows = 448 / new.abs().amax(1, keepdim=True)
    truth = through_fp8(x, 448.0) @ through_fp8(new, rows).T
    with torch.no_grad():
        assert torch.allclose(layer.eval()(x), truth, rtol=1e-5, atol=1e-4)


def test_a_training_counts_what_it_clamps_of_a_written_weight_and_the_next_update_follows() -> None:
    layer = trained().train()
    (ledger,) = find_ledgers(layer)
    new = layer.weight.detach() * GAIN
    want = int(through_fp8(new, float(ledger.scale[1])).isnan().sum())
    by_version(layer.weight, new)
    layer(torch.full((4, 16), 1.0)).sum().backward()
    assert int(ledger.pending[1, Stat.SATURATED]) == want
    assert ledger.pending[1, Stat.AMAX] == float(new.abs().max())
    SGD(layer.parameters(), lr=0.0).step()
    assert float(ledger.scale[1]) == pytest.approx(448 / float(new.abs().max()))


@pytest.mark.parametrize("is_pending", [True, False])
def test_a_step_of_an_optimizer_is_no_write_from_outside(is_pending: bool) -> None:
    layer = trained().train()
    optimizer = SGD(layer.parameters(), lr=1.0)
    layer(torch.full((4, 16), 1.0)).sum().backward()
    layer.weight.grad = torch.full((16, 16), 1e-4)
    optimizer.step()
    if is_pending:
        layer(torch.full((4, 16), 1.0)).sum().backward()
    layer.weight.grad = layer.weight.detach() * 0.3
    optimizer.step()
    x = torch.rand(8, 16)
    scale = float(layer.state_dict()["unclamp_weight_scale"])
    truth = through_fp8(x, 448.0) @ through_fp8(layer.weight, scale).T
    with torch.no_grad():
        assert torch.allclose(layer.eval()(x), truth, rtol=1e-6, atol=1e-6)
        own = 448 / float(layer.weight.detach().abs().max())
        assert own != scale
        other = through_fp8(x, 448.0) @ through_fp8(layer.weight, own).T
        assert not torch.allclose(truth, other, rtol=1e-6, atol=1e-6)  # it would have shown


def test_an_average_swapped_in_for_an_evaluation_leaves_the_training_as_it_was() -> None:
    model, other = (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        unclamp.convert(each, Recipe.uniform(Delayed(history_len=4)))
    optimizers = [SGD(each.parameters(), lr=1e-4) for each in (model, other)]
    for _ in range(4):
        x = torch.randn(5, 6)
        outputs = []
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(each(x))
            outputs[-1].square().sum().backward()
            optimizer.step()
        assert torch.equal(*outputs)
        kept = [p.detach().clone() for p in model.parameters()]
        for p, own in zip(model.parameters(), kept, strict=True):
            by_version(p, own * GAIN)
        with torch.no_grad():
            model.eval()(torch.randn(5, 6))
        assert all(
            site.saturated == 0
            for site in unclamp.evaluation_counts(model).sites
            if site.name.role == "weight"
        )
        model.train()
        for p, own in zip(model.parameters(), kept, strict=True):
            by_version(p, own)


def test_weights_alone_that_are_loaded_are_measured_anew() -> None:
    layer = trained()
    new = layer.weight.detach() * GAIN
    layer.load_state_dict({"weight": new})
    x = torch.rand(8, 16) * 7
    truth = through_fp8(x, 448 / float(x.max())) @ through_fp8(new, 448 / float(new.abs().max())).T
    with torch.no_grad():
        assert torch.allclose(layer(x), truth, rtol=1e-5, atol=1e-4)


def test_a_copys_weight_is_measured_anew_once_it_is_averaged() -> None:
    layer = trained()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for value, new in zip(twin.state_dict().values(), layer.state_dict().values(), strict=True):
            value.copy_(value * 0.5 + new * GAIN)
        x = torch.rand(8, 16)
        weight = twin.weight.detach()
        truth = through_fp8(x, 448.0) @ through_fp8(weight, 448 / float(weight.abs().max())).T
        assert torch.allclose(twin(x), truth, rtol=1e-5, atol=1e-4)


def grown(model: nn.Module, reentrant: bool | None, *, training: bool) -> list[Tensor]:
    """Train on weights that outgrow their scales; return losses, weights and what was clamped."""
    model.train(training)
    (ledger,) = find_ledgers(model)
    optimizer = SGD(model.parameters(), lr=0.0)
    seen = []
    for step in range(5):
        torch.manual_seed(step)
        x = torch.randn(8, 16, requires_grad=True)
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        loss = y.square().mean()
        loss.backward()
        seen += [loss.detach(), ledger.pending[1, Stat.SATURATED].clone()]
        with torch.no_grad():  # the gradient decides where to, and the scale is one step behind
            for weight in model.parameters():
                assert weight.grad is not None
                weight.sub_(weight.grad / weight.grad.norm()).mul_(1.5)
        optimizer.step()
        optimizer.zero_grad()
        seen += [weight.detach().clone() for weight in model.parameters()]
    return seen


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=2)))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_trains_with_the_bits_of_no_checkpointing(
    reentrant: bool, training: bool
) -> None:
    plain = grown(two_layers(), None, training=True)
    assert sum(float(x) for x in plain[1::6]) > 50  # weights do clamp
    found = grown(two_layers(), reentrant, training=training)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_of_edited_weights_trains_with_the_bits_of_its_source(
    training: bool, reentrant: bool | None
) -> None:
    source = two_layers()
    grown(source, None, training=True)
    for weight in source.parameters():
        by_version(weight, weight.detach() * 1.3)
    twin = copy.deepcopy(source)
    plain = grown(source, None, training=True)
    found = grown(twin, reentrant, training=training)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("gain", [0.3, 30.0])
def test_a_copy_of_an_edited_model_evaluates_with_the_bits_of_its_source(gain: float) -> None:
    layer = trained()
    by_version(layer.weight, layer.weight.detach() * gain)
    twin = copy.deepcopy(layer)
    x = torch.rand(8, 16)
    truth = (
        through_fp8(x, 448.0)
        @ through_fp8(layer.weight, 448 / float(layer.weight.detach().abs().max())).T
    )
    with torch.no_grad():
        assert torch.allclose(layer(x), truth, rtol=1e-5, atol=1e-6)
        assert torch.equal(twin(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gain", [0.3, 30.0])
def test_a_compiled_evaluation_casts_a_written_weight_by_its_scale_unless_it_would_clamp(
    gain: float,
) -> None:
    layer = trained()
    before = float(layer.state_dict()["unclamp_weight_scale"])
    by_version(layer.weight, layer.weight.detach() * gain)
    own = 448 / float(layer.weight.detach().abs().max())
    x = torch.rand(8, 16)
    x_hat = through_fp8(x, 448.0)
    eager = x_hat @ through_fp8(layer.weight, own).T
    compiled = x_hat @ through_fp8(layer.weight, min(own, before)).T
    assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-5) == (own < before)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(layer(x), eager, rtol=1e-5, atol=1e-5)
        assert torch.allclose(run(x), compiled, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit as a whole
@pytest.mark.parametrize("gain", [0.3, 30.0])
def test_a_trace_of_a_written_weight_has_eager_bits_and_clamps_no_weight_that_comes_later(
    gain: float,
) -> None:
    layer = trained()
    by_version(layer.weight, layer.weight.detach() * gain)
    x = torch.rand(8, 16)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(x), layer(x))  # pyright: ignore[reportCallIssue]
        by_version(layer.weight, torch.randn(16, 16) * 100)  # the trace has the same parameter
        own = 448 / float(layer.weight.detach().abs().max())
        truth = through_fp8(x, 448.0) @ through_fp8(layer.weight, own).T
        assert torch.allclose(traced(x), truth, rtol=1e-5, atol=1e-3)  # pyright: ignore[reportCallIssue]
