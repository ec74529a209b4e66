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


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_defaults_of_device_and_dtype_change_nothing(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    want = quantize(x, E4M3FN)
    before = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                got = quantize(x, E4M3FN)
        finally:
            torch.set_default_dtype(before)
        for field in ("scale_inv", "amax", "stats"):
            assert torch.equal(getattr(got, field), getattr(want, field))
        assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))


def test_memory_that_does_not_fit_is_refused() -> None:
    x = torch.randn(64, 64)
    for values in (
        torch.empty(16),
        torch.empty(64, 64, dtype=torch.float16),
        torch.empty(64, 64).t(),
        torch.empty(64, 64, device="meta"),
    ):
        with pytest.raises(ValueError, match="expected values as contiguous float32"):
            quantize(x, E4M3FN, values=values)
    with pytest.raises(ValueError, match="expected out as contiguous uint8"):
        quantize(x, E4M3FN, out=torch.empty(64, 64))


def test_a_tensor_with_the_negative_bit_is_cast_as_what_it_is() -> None:
    x = torch.randn(8, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    for granularity in (PerTensor(), PerRow()):
        got, want = (quantize(t, E4M3FN, granularity=granularity) for t in (x, x.clone()))
        assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
        assert torch.equal(got.stats, want.stats)


def test_weights_and_inputs_can_be_resized_after_a_step() -> None:
    layer = nn.Linear(8, 8)
    convert(layer, Recipe())
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    for tensor in (layer.weight, x):
        assert tensor.untyped_storage().resizable()
        tensor.untyped_storage().resize_(0)
