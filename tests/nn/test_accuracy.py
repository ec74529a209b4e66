"""A layer is as near to the one in high precision as torchao asks of its own.

Source: torchao's test/float8/test_base.py holds an FP8 linear layer to 25 dB (output) and 24 dB
(gradients) against the layer in high precision.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from unclamp import (
    Dynamic,
    PerRow,
    Recipe,
    convert,
)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


OUTPUT_DECIBELS, GRADIENT_DECIBELS = 25, 24


SHAPES = ((16, 256, 32), (96, 384, 200), (257, 512, 64))


"""Tokens, in features, out features."""


def decibels(want: Tensor, got: Tensor) -> float:
    want, got = want.to(torch.float64), got.to(torch.float64)
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def passes(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **grads}


def twins(
    recipe: Recipe, shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool
) -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    """Return a float32 layer, its twin in FP8 and in this dtype, an input and a gradient."""
    tokens, columns, rows = shape
    layer = nn.Linear(columns, rows, bias=bias).to(dtype)
    plain = copy.deepcopy(layer).to(torch.float32)
    convert(layer, recipe)
    return plain, layer, torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_layer_keeps_what_torchao_asks_of_its_own(granularity, shape, bias, dtype):
    scaling = Dynamic() if granularity == "tensor" else Dynamic(granularity=PerRow())
    plain, layer, x, dy = twins(Recipe.uniform(scaling), shape, dtype, bias=bias)
    got = passes(layer, x, dy)
    want = passes(plain, x.to(torch.float32), dy.to(torch.float32))
    assert all(value.dtype == dtype for value in got.values())
    assert decibels(want["output"], got["output"]) >= OUTPUT_DECIBELS
    for name in ("input", "weight"):
        assert decibels(want[name], got[name]) >= GRADIENT_DECIBELS
    if bias:
        assert decibels(want["bias"], got["bias"]) > 40


def test_one_huge_row_costs_the_others_nothing_per_row_and_everything_per_tensor():
    row = Dynamic(granularity=PerRow())
    found = {}
    for name, scaling in (("row", row), ("tensor", Dynamic())):
        torch.manual_seed(0)
        recipe = Recipe(input=scaling, weight=Dynamic(), grad_output=Dynamic())
        plain, layer, x, dy = twins(recipe, (64, 256, 48), torch.float32, bias=False)
        x[5] *= 1e6
        others = torch.arange(64) != 5
        got, want = passes(layer, x, dy)["output"], passes(plain, x, dy)["output"]
        found[name] = decibels(want[others], got[others])
        assert decibels(want[~others], got[~others]) >= OUTPUT_DECIBELS
    assert found["row"] >= OUTPUT_DECIBELS
    assert found["tensor"] < 5
