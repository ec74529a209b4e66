"""What happens to tensors and graphs around a converted layer: views, resizing, traces."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import MX, Dynamic, Guarded, HighPrecision, PerRow, Recipe
from unclamp.errors import UnsupportedError
from unclamp.nn import find_ledgers

RECIPES = {
    "delayed": Recipe(),
    "guarded": Recipe.uniform(Guarded()),
    "rows": Recipe.uniform(Dynamic(PerRow())),
    "mx": Recipe.uniform(Dynamic(MX())),
    "hopper": Recipe(accumulate="hopper"),
    "smooth": Recipe(weight=Dynamic(), smooth=True),
    "GEMM in high precision": Recipe(grad_weight=HighPrecision()),
    "warm-up": Recipe(warmup_steps=5),
}
TRACED = [name for name in RECIPES if name != "smooth"]


def made(name: str) -> nn.Sequential:
    """Return a model that was trained for two steps, so that its scales are known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    unclamp.convert(model, RECIPES[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def in_a_trace(model: nn.Module) -> Any:
    """Return a model's trace, which torch's stubs take for a tuple."""
    return torch.jit.trace(model, torch.randn(4, 32))


def result(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return the output, all gradients, and what the casts counted."""
    model = copy.deepcopy(model)
    output = model(x)
    output.backward(dy)
    (ledger,) = find_ledgers(model)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [output.detach(), *grads, ledger.pending.clone()]


@pytest.mark.parametrize("tokens", [4, 600])
@pytest.mark.parametrize("name", RECIPES)
def test_negative_and_conjugate_views_are_cast_as_what_they_show(name: str, tokens: int) -> None:
    model = made(name)
    numbers = torch.randn(tokens, 32, dtype=torch.complex64)
    wanted = torch.randn(tokens, 8, dtype=torch.complex64)
    given = numbers.conj().imag, wanted.conj().imag
    shown = -numbers.imag.clone(), -wanted.imag.clone()
    assert all(x.is_neg() for x in given)
    assert not any(x.is_neg() for x in shown)
    for one, two in zip(result(model, *given), result(model, *shown), strict=True):
        assert torch.equal(one, two)
    real = result(model, numbers.conj().real, wanted.conj().real)
    for one, two in zip(real, result(model, numbers.real, wanted.real), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["delayed", "guarded", "rows", "mx", "hopper", "smooth"])
def test_an_input_that_is_resized_after_the_forward_changes_no_gradient(name: str) -> None:
    model, dy = made(name)[0], torch.randn(4, 64)
    grads = []
    for resized in (False, True):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        x = torch.randn(4, 32)
        output = twin(x)
        if resized:
            x.resize_(9, 32).fill_(7)
        output.backward(dy)
        grads.append([p.grad for p in twin.parameters() if p.grad is not None])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["warm-up", "GEMM in high precision"])
def test_a_resized_input_that_backward_needs_is_refused_as_torch_does(name: str) -> None:
    layer = made(name)[0]
    x = torch.randn(4, 32)
    output = layer(x)
    x.resize_(9, 32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit as a whole
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("name", [name for name in TRACED if name != "warm-up"])
def test_a_traced_model_infers_with_the_bits_of_eager_mode_for_any_batch(
    name: str, with_gradients: bool
) -> None:
    model = made(name).eval()
    (ledger,) = find_ledgers(model)
    before = ledger.pending.clone()
    with torch.set_grad_enabled(with_gradients):
        traced = in_a_trace(model)
    assert torch.equal(ledger.pending, before)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in ((4, 32), (9, 32), (1, 32)):
        x = torch.randn(shape) * 3
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(traced(x), expected)
            assert torch.equal(loaded(x), expected)
    with pytest.raises(UnsupportedError, match="has no backward"):
        traced(torch.randn(4, 32)).sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_smoothed_layer_says_that_it_cannot_be_traced() -> None:
    with pytest.raises(UnsupportedError, match=r"0: expected a layer that is not smoothed"):
        in_a_trace(made("smooth"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::unclamp.UnclampWarning")
def test_a_trace_of_a_warm_up_is_that_of_the_plain_model() -> None:
    model = made("warm-up")
    traced = in_a_trace(model)
    plain = copy.deepcopy(model)
    unclamp.revert(plain)
    x = torch.randn(9, 32)
    assert torch.equal(traced(x), plain(x))
