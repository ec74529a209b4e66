"""Rows and blocks: each GEMM gets operands scaled along the axis that it contracts."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp import (
    E4M3FN,
    E5M2,
    MX,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    PerRow,
    PerTensor,
    Recipe,
    Static,
    convert,
    dequantize,
    quantize,
)
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

K, N, T = 70, 45, 33
GRANULARITIES = [PerTensor(), PerRow(), PerBlock(1, 16), PerBlock(16, 16), PerBlock(4, 32), MX()]
FORMATS = {"input": E4M3FN, "weight": E4M3FN, "grad_output": E5M2}


def pair(recipe: Recipe) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(K, N)
    with torch.no_grad():  # rows and columns of very different size
        plain.weight *= torch.logspace(-2, 2, N).unsqueeze(1) * torch.logspace(0, 2, K)
    fp8 = copy.deepcopy(plain)
    convert(fp8, recipe)
    return plain, fp8


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(T, K) * torch.logspace(-2, 2, T).unsqueeze(1) * torch.logspace(1, -1, K)
    return x, torch.randn(T, N) * torch.logspace(-3, 0, N)


def gradients(layer: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


def expected(plain: nn.Linear, x: Tensor, dy: Tensor, granularities: tuple) -> list[Tensor]:
    g = dict(zip(FORMATS, granularities, strict=True))

    def hat(t: Tensor, role: str, axis: int) -> Tensor:
        return dequantize(quantize(t, FORMATS[role], granularity=g[role], axis=axis))

    weight, bias = plain.weight.detach(), plain.bias.detach()
    return [
        F.linear(hat(x, "input", 1), hat(weight, "weight", 1), bias),
        hat(dy, "grad_output", 1) @ hat(weight, "weight", 0),
        hat(dy, "grad_output", 0).t() @ hat(x, "input", 0),
    ]


CASES = [(g, g, g) for g in GRANULARITIES]
CASES += [(PerBlock(1, 16), PerBlock(16, 16), PerBlock(1, 16)), (PerRow(), MX(), PerTensor())]


@pytest.mark.parametrize("granularities", CASES, ids=lambda c: ",".join(map(str, c)))
def test_the_three_gemms_take_operands_cast_along_their_own_axis(granularities):
    scalings = [Dynamic(granularity=g) for g in granularities]
    recipe = Recipe(input=scalings[0], weight=scalings[1], grad_output=scalings[2])
    plain, layer = pair(recipe)
    x, dy = data()
    for got, want in zip(
        gradients(layer, x, dy), expected(plain, x, dy, granularities), strict=True
    ):
        assert torch.equal(got, want)


def test_a_scale_along_the_wrong_axis_would_show():
    _, layer = pair(Recipe.uniform(Dynamic(granularity=PerRow())))
    x, dy = data()
    by_rows = dequantize(quantize(x, E4M3FN, granularity=PerRow(), axis=1))
    dy_hat = dequantize(quantize(dy, E5M2, granularity=PerRow(), axis=0))
    assert not torch.equal(gradients(layer, x, dy)[2], dy_hat.t() @ by_rows)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_backward_keeps_one_byte_an_element_and_the_scales(granularity):
    _, layer = pair(Recipe.uniform(Dynamic(granularity=granularity)))
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x, _ = data()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x.requires_grad_())
    codes = [t for t in kept if t.element_size() == 1]
    assert sum(t.numel() for t in codes) == T * K + N * K
    assert len(codes) == 2


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_odd_and_empty_batches_go_forward_and_backward(granularity):
    _, layer = pair(Recipe.uniform(Dynamic(granularity=granularity)))
    for shape in ((0, K), (1, K), (2, 3, K), (K,)):
        x = torch.randn(shape, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
    assert find_ledgers(layer)[0].pending[0, Stat.ELEMENTS] >= 8 * K


def test_square_blocks_are_cast_once_and_others_once_an_axis():
    for granularity, casts in ((PerBlock(16, 16), 1), (PerTensor(), 1), (PerRow(), 2), (MX(), 2)):
        _, layer = pair(Recipe.uniform(Dynamic(granularity=granularity)))
        gradients(layer, *data())
        assert find_ledgers(layer)[0].pending[:, Stat.CASTS].tolist() == [casts] * 3


def test_an_evaluation_casts_for_the_output_alone():
    _, layer = pair(Recipe.uniform(Dynamic(granularity=PerRow())))
    with torch.no_grad():
        layer.train()(data()[0])
    assert not find_ledgers(layer)[0].has_pending


# ---- histories of rows and blocks of a weight ----------------------------------------------


@pytest.mark.parametrize("kind", [Delayed, Guarded])
@pytest.mark.parametrize("granularity", [PerRow(), PerBlock(16, 16), PerBlock(1, 16), MX()])
def test_each_block_of_a_weight_has_its_own_history(kind, granularity):
    scaling = kind(history_len=2, margin=0, granularity=granularity)
    high = HighPrecision()
    _, layer = pair(Recipe(input=high, weight=scaling, grad_output=high))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x, dy = data()
    first = gradients(layer, x, dy)
    optimizer.step()
    again = gradients(layer, x, dy)  # scales from the history, which are those of the tensor
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    optimizer.step()
    (ledger,) = find_ledgers(layer)
    histories = ledger.history_of(1)
    assert histories.ndim == 2
    assert torch.equal(histories[:, 0], histories[:, 1])
    with torch.no_grad():
        layer.weight *= 4
    gradients(layer, x, dy)
    clamps = ledger.pending[1, Stat.SATURATED] > 0
    assert clamps == (kind is Delayed)
    optimizer.step()
    assert torch.equal(ledger.history_of(1)[:, 0], 4 * histories[:, 0])


def test_a_row_of_a_weight_keeps_its_state_through_a_checkpoint():
    recipe = Recipe(weight=Delayed(history_len=3, granularity=PerRow()))
    _, layer = pair(recipe)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(3):
        gradients(layer, *data())
        optimizer.step()
    state = layer.state_dict()
    assert state["unclamp_weight_amax_history"].shape == (N + K, 3)
    assert state["unclamp_weight_scale"].shape == (N + K,)
    _, other = pair(recipe)
    other.load_state_dict(state)
    for a, b in zip(gradients(layer, *data()), gradients(other, *data()), strict=True):
        assert torch.equal(a, b)
    _, per_tensor = pair(Recipe())
    per_tensor.load_state_dict(state)  # other blocks: forgotten, and seeded again
    assert find_ledgers(per_tensor)[0].scale[1] == 0


@pytest.mark.parametrize("role", ["input", "grad_output"])
def test_rows_of_tokens_have_no_past(role):
    from unclamp import RecipeError

    for kind, granularity in itertools.product((Delayed, Guarded), GRANULARITIES[1:]):
        with pytest.raises(RecipeError, match="other tokens at every step"):
            Recipe(**{role: kind(granularity=granularity)})  # pyright: ignore[reportArgumentType]


def test_a_static_scale_never_changes_and_its_history_goes_on():
    _, layer = pair(Recipe(input=Static(scale=2.0), weight=Dynamic(), grad_output=Dynamic()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    (ledger,) = find_ledgers(layer)
    for amax in (1.0, 1000.0, 3.0):
        layer(torch.full((2, K), amax)).sum().backward()
        assert ledger.pending[0, Stat.SCALE_INV] == 0.5
        assert ledger.pending[0, Stat.SATURATED] == (2 * K if amax == 1000 else 0)
        optimizer.step()
        assert ledger.scale[0] == 2
    assert ledger.history_of(0)[:3].tolist() == [3, 1000, 1]
    other = pair(Recipe(input=Static(scale=4.0)))[1]
    other.load_state_dict(layer.state_dict())
    assert find_ledgers(other)[0].scale[0] == 4
