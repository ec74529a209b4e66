"""Convolutions whose patches do not overlap: linear layers on patches, found, counted, computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from unclamp.nn import Converted

CASES = {
    "one tap": (lambda: nn.Conv1d(6, 5, 1), (2, 6, 9)),
    "patches of sound": (lambda: nn.Conv1d(6, 5, 4, stride=4), (2, 6, 13)),
    "patches of pictures": (lambda: nn.Conv2d(3, 5, (4, 2), stride=(4, 2)), (2, 3, 9, 8)),
    "no bias": (lambda: nn.Conv2d(3, 5, 2, stride=2, bias=False, padding="valid"), (2, 3, 6, 4)),
    "patches of films": (lambda: nn.Conv3d(3, 5, 2, stride=2), (2, 3, 4, 4, 6)),
    "no batch": (lambda: nn.Conv2d(3, 5, 2, stride=2), (3, 6, 4)),
}


def taught(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return output and gradients of a layer's step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.mul(torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum().backward()
    assert x.grad is not None
    grads = [p.grad for p in layer.parameters()]
    return [y.detach(), x.grad, *(g for g in grads if g is not None)]


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches as rows, cut out one by one."""
    kernel = layer.kernel_size
    places = [range(0, size - taps + 1, taps) for size, taps in zip(x.shape[2:], kernel)]  # pyright: ignore  # noqa: B905
    index = torch.cartesian_prod(*map(torch.tensor, places)).reshape(-1, len(kernel))  # pyright: ignore
    rows = []
    for sample in x:
        for place in index.tolist():
            cut = sample
            for axis, (start, taps) in enumerate(zip(place, kernel, strict=True)):  # pyright: ignore
                cut = cut.narrow(1 + axis, start, taps)
            rows.append(cut.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_observed_it_is_the_plain_convolution_bit_for_bit(case: str) -> None:
    make, shape = CASES[case]
    layer, x = make(), torch.randn(shape)
    plain = copy.deepcopy(layer)
    with unclamp.observe(layer) as observation:
        assert set(observation.report.converted) == {""}
        got = taught(layer, x)
        torch.optim.SGD(layer.parameters(), lr=0.0).step()
        assert {s.role for s in observation.sites()} == {"input", "weight", "grad_output"}
    assert all(map(torch.equal, got, taught(plain, x)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_converted_it_is_a_linear_layer_on_its_patches(case: str, scaling: str) -> None:
    make, shape = CASES[case]
    layer, x = make(), torch.randn(shape)
    batched = x if x.ndim == layer.weight.ndim else x.unsqueeze(0)
    rows = unfolded(layer, batched)
    linear = nn.Linear(rows.shape[1], 5, bias=layer.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.flatten(1))
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    for each in (layer, linear):
        unclamp.convert(each, unclamp.Recipe.uniform(scaling))
    y, expected = layer(x), linear(rows)
    flat = (y if x is batched else y.unsqueeze(0)).movedim(1, -1).flatten(0, -2)
    assert torch.equal(flat, expected)
    for each in (flat, expected):
        each.square().sum().backward()
    assert torch.equal(layer.weight.grad.flatten(1), linear.weight.grad)  # pyright: ignore
    assert y.is_contiguous()


def test_what_is_counted_are_the_patches() -> None:
    layer, x = nn.Conv2d(3, 5, 2, stride=2), torch.randn(2, 3, 6, 4)
    with unclamp.observe(layer) as observation:
        taught(layer, x)
        torch.optim.SGD(layer.parameters(), lr=0.0).step()
        elements = {s.role: s.elements for s in observation.sites()}
    assert elements == {"input": 2 * 3 * 6 * 4, "weight": 60, "grad_output": 2 * 5 * 3 * 2}


OTHERS = {
    "overlap": nn.Conv2d(3, 5, 3, stride=2),
    "padding": nn.Conv2d(3, 5, 2, stride=2, padding=1),
    "groups": nn.Conv2d(4, 4, 2, stride=2, groups=2),
    "dilation": nn.Conv2d(3, 5, 2, stride=2, dilation=2),
    "strided tap": nn.Conv2d(3, 5, 1, stride=2),
    "same": nn.Conv1d(3, 5, 1, padding="same"),
    "transposed": nn.ConvTranspose2d(3, 5, 2, stride=2),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_convolutions_are_left_alone(case: str) -> None:
    layer = OTHERS[case]
    report = unclamp.convert(nn.Sequential(layer, nn.Linear(2, 2)), unclamp.Recipe())
    assert report.skipped["0"] == f"not a linear layer ({type(layer).__name__})"
    assert not isinstance(layer, Converted)


def test_it_comes_back_and_is_saved_as_a_convolution_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2))
    plain = copy.deepcopy(model)
    unclamp.convert(model, unclamp.Recipe())
    assert str(model[0]).startswith("Fp8Conv2d(3, 5, kernel_size=(2, 2), stride=(2, 2)")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        taught(model, torch.randn(2, 3, 4, 4))
        optimizer.step()
    twin = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2))
    unclamp.convert(twin, unclamp.Recipe())
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    unclamp.revert(model)
    assert type(model[0]) is nn.Conv2d
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_channels_last_stays() -> None:
    layer = nn.Conv2d(3, 5, 2, stride=2)
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    unclamp.convert(layer, unclamp.Recipe())
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_with_casts_off_it_is_the_plain_convolution() -> None:
    layer, x = nn.Conv2d(3, 5, 2, stride=2), torch.randn(2, 3, 4, 4)
    expected = F.conv2d(x, layer.weight, layer.bias, stride=2)
    unclamp.convert(nn.Sequential(layer, nn.Linear(2, 2)), unclamp.Recipe().override(
        "0", input=unclamp.HighPrecision(), weight=unclamp.HighPrecision(),
        grad_output=unclamp.HighPrecision(),
    ))  # fmt: skip
    assert torch.equal(layer(x), expected)


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = nn.Conv2d(3, 5, 2, stride=2), torch.randn(2, 3, 4, 4)
    unclamp.convert(layer, unclamp.Recipe())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
