"""Casts leave the user's tensors as they are: their storage stays resizable, as FSDP needs it."""

import pytest
import torch
from torch import nn

from unclamp import E4M3FN, MX, Recipe, convert, dequantize, quantize
from unclamp.scaling import Granularity, PerRow, PerTensor

SIZES = [(3, 5), (700, 1500)]
"""One task of a thread, and several."""


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), MX()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_can_be_resized_after_a_cast(
    dtype: torch.dtype, granularity: Granularity, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape).to(dtype)
    values = torch.empty(x.numel())
    q = quantize(x, E4M3FN, granularity=granularity, values=values)
    dequantize(q)
    for tensor in (x, values, q.codes):
        size = tensor.untyped_storage().size()
        tensor.untyped_storage().resize_(2 * size)
        assert tensor.untyped_storage().resizable()


def test_weights_and_inputs_can_be_resized_after_a_step() -> None:
    layer = nn.Linear(8, 8)
    convert(layer, Recipe())
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    for tensor in (layer.weight, x):
        assert tensor.untyped_storage().resizable()
        tensor.untyped_storage().resize_(0)
