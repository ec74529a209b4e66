import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp import Delayed, Dynamic, Recipe, convert
from unclamp.formats import E4M3FN, E5M2
from unclamp.nn import Fp8Linear, find_ledgers
from unclamp.numerics import Stat, dequantize, quantize
from unclamp.scaling import HighPrecision

pytestmark = pytest.mark.filterwarnings("ignore:no layer is in FP8")
HIGH = Recipe.uniform(HighPrecision())
DYNAMIC = Recipe.uniform(Dynamic())


def pair(recipe: Recipe, k: int = 7, n: int = 5, *, bias: bool = True, dtype=torch.float32):
    """Return a linear layer and its converted copy."""
    torch.manual_seed(0)
    plain = nn.Linear(k, n, bias=bias, dtype=dtype)
    fp8 = copy.deepcopy(plain)
    convert(fp8, recipe)
    assert type(fp8) is Fp8Linear
    return plain, fp8


def hat(x: Tensor, fmt=E4M3FN) -> Tensor:
    return dequantize(quantize(x, fmt))


def gradients(layer: nn.Linear, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.backward(dy)
    return [output.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (7,), (0, 7), (1, 7), (2, 0, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_high_precision_is_nn_linear_bit_for_bit(dtype, bias, shape):
    plain, layer = pair(HIGH, bias=bias, dtype=dtype)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 5).to(dtype)
    for got, expected in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        assert got is not None
        assert expected is not None
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (1, 7)])
@pytest.mark.parametrize("roles", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("bias", [True, False])
def test_each_gemm_takes_the_dequantised_operands(bias, roles, shape):
    scalings = [Dynamic() if on else HighPrecision() for on in roles]
    recipe = Recipe(input=scalings[0], weight=scalings[1], grad_output=scalings[2])
    plain, layer = pair(recipe, bias=bias)
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 5)
    output, grad_input, grad_weight, *grad_bias = gradients(layer, x, dy)
    assert output is not None
    x2, dy2 = x.reshape(-1, 7), dy.reshape(-1, 5)
    weight = plain.weight.detach()
    x_hat = hat(x2) if roles[0] else x2
    w_hat = hat(weight) if roles[1] else weight
    dy_hat = hat(dy2, E5M2) if roles[2] else dy2
    bias_value = plain.bias.detach() if bias else None
    assert torch.equal(output, F.linear(x_hat, w_hat, bias_value).reshape(output.shape))
    assert grad_input is not None
    assert torch.equal(grad_input, (dy_hat @ w_hat).reshape(shape))
    assert grad_weight is not None
    assert torch.equal(grad_weight, dy_hat.t() @ x_hat)
    if bias:
        assert grad_bias[0] is not None
        assert torch.equal(grad_bias[0], dy2.sum(0))


@pytest.mark.parametrize("recipe", [DYNAMIC, Recipe()], ids=["dynamic", "delayed"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 2, 3, 7), (0, 7), (2, 0, 7), (1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_leading_shape_goes_forward_and_backward(dtype, shape, recipe):
    _, layer = pair(recipe, dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        x = torch.randn(shape).to(dtype).requires_grad_()
        output = layer(x)
        assert output.shape == (*shape[:-1], 5)
        assert output.dtype == dtype
        optimizer.zero_grad()
        output.sum().backward()
        assert x.grad is not None
        assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            assert bool(parameter.grad.isfinite().all())
        optimizer.step()
    assert bool(layer.weight.isfinite().all())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(("k", "n"), [(0, 5), (7, 0), (0, 0)])
def test_a_layer_without_features_behaves_as_nn_linear(k, n):
    plain, layer = pair(DYNAMIC, k, n)
    x, dy = torch.randn(3, k), torch.randn(3, n)
    for got, expected in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_layer_computes_in_float32_and_rounds_once(dtype):
    plain, layer = pair(DYNAMIC, dtype=dtype)
    x = torch.randn(6, 7).to(dtype)
    weight, bias = plain.weight.detach(), plain.bias.detach()
    expected = F.linear(hat(x), hat(weight), bias.float()).to(dtype)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("recipe", [DYNAMIC, HIGH], ids=["dynamic", "high precision"])
def test_autocast_gives_its_dtype_and_keeps_float32_gradients(recipe):
    plain, layer = pair(recipe)
    x = torch.randn(6, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        expected = plain(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    if recipe is HIGH:
        assert torch.equal(output, expected)
    else:
        weight, bias = plain.weight.detach(), plain.bias.detach()
        by_hand = F.linear(hat(x.bfloat16()), hat(weight), bias).bfloat16()
        assert torch.equal(output, by_hand)


def test_backward_inside_autocast_is_that_outside():
    _, layer = pair(DYNAMIC)
    x = torch.randn(6, 7)
    grads = []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(x).float().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append(layer.weight.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_only_what_needs_a_gradient_gets_one(needs):
    _, layer = pair(Recipe())
    x = torch.randn(3, 7, requires_grad=needs[0])
    layer.weight.requires_grad_(needs[1])
    layer.bias.requires_grad_(needs[2])
    output = layer(x)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.sum().backward()
    assert [t.grad is not None for t in (x, layer.weight, layer.bias)] == list(needs)
    casts = find_ledgers(layer)[0].pending[:, Stat.CASTS].tolist()
    assert casts == [1, 1, 1 if needs[0] or needs[1] else 0]


def test_eval_no_grad_and_inference_mode_give_the_training_output():
    _, layer = pair(Recipe())
    x = torch.randn(3, 7)
    expected = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), expected)
    assert not find_ledgers(layer)[0].has_pending


def test_training_goes_on_after_inference_mode():
    _, layer = pair(Recipe())
    with torch.inference_mode():
        layer(torch.randn(3, 7))
    layer(torch.randn(3, 7)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert find_ledgers(layer)[0].updates == 1


@pytest.mark.parametrize("shape", [(3, 6), (8,), ()])
def test_a_wrong_shape_names_the_module(shape):
    model = nn.Sequential(nn.Sequential(nn.Linear(7, 5)))
    convert(model, DYNAMIC)
    with pytest.raises(ValueError, match=r"0\.0: expected an input \[\.\.\., 7\]"):
        model(torch.randn(shape))


@pytest.mark.parametrize("recipe", [DYNAMIC, Recipe()], ids=["dynamic", "delayed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_row_leaves_the_others_as_they_are(bad, recipe):
    _, layer = pair(recipe)
    x = torch.randn(4, 7)
    x[:, 0] = 9.0
    expected = layer(x)
    x[1, 3] = bad
    output = layer(x)
    others = [0, 2, 3]
    assert torch.equal(output[others], expected[others])
    assert bool(output[1].isnan().all()) == math.isnan(bad)
    assert bool(output[1].isfinite().all()) != math.isnan(bad)


def test_an_expanded_gradient_and_a_strided_input_are_fine():
    _, layer = pair(DYNAMIC)
    base = torch.randn(7, 6)
    strided, packed = base.t(), base.t().contiguous()
    dy = torch.randn(1, 5).expand(6, 5)
    for a, b in zip(
        gradients(layer, strided, dy), gradients(layer, packed, dy.contiguous()), strict=True
    ):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b)


def test_the_input_is_not_modified_and_an_in_place_relu_after_is_fine():
    _, layer = pair(DYNAMIC)
    x = torch.randn(4, 7)
    before = x.clone()
    layer(x).relu_().sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("role", ["input", "weight"])
def test_changing_a_high_precision_operand_in_place_before_backward_is_an_error(role):
    recipe = Recipe(
        input=HighPrecision() if role == "input" else Dynamic(),
        weight=HighPrecision() if role == "weight" else Dynamic(),
    )
    _, layer = pair(recipe)
    leaf = torch.randn(4, 7, requires_grad=True)
    x = leaf * 1
    output = layer(x)
    with torch.no_grad():
        (x if role == "input" else layer.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    _, layer = pair(DYNAMIC)
    x = torch.randn(4, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_backward_keeps_one_byte_an_element():
    _, layer = pair(Recipe(), 64, 64)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(32, 64, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in kept) == 32 * 64 + 64 * 64 + 8


def test_the_layer_shows_special_gemms_and_smoothing():
    recipe = Recipe(weight=Dynamic(), smooth=True, output="hopper", grad_weight=HighPrecision())
    _, layer = pair(recipe)
    assert repr(layer).endswith(", output=hopper, grad_weight=high_precision, smooth)")


def test_the_layer_shows_what_it_does():
    _, layer = pair(Recipe(input=Dynamic(), weight=HighPrecision(), grad_output=Delayed()))
    assert "input=dynamic:e4m3fn, weight=high_precision, grad_output=delayed:e5m2" in repr(layer)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_of_the_gradient_leaves_other_rows_alone(bad: float) -> None:
    results = []
    for value in (0.0, bad):
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        convert(model, Recipe.uniform(Dynamic()))
        x, dy = torch.randn(6, 7, requires_grad=True), torch.randn(6, 5)
        dy[2], dy[2, 1] = 0, value
        model(x).backward(dy)
        results.append((x.grad, model.weight.grad))
    (clean, _), (grad_input, grad_weight) = results
    assert clean is not None
    assert grad_input is not None
    assert grad_weight is not None
    assert not grad_input[2].isfinite().any()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(grad_input[keep], clean[keep])
    finite = grad_weight.isfinite().all(1).tolist()
    assert finite == [True, False, True, True, True]
