"""A cast gives torchao's codes and scales, and does not share its faults.

Where torchao is installed, its dynamic casts must give the bits of ours; elsewhere those tests are
skipped. The bound on the error of a cast is that of its test/float8/test_base.py.
"""

import importlib
import math
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

from unclamp import (
    E4M3FN,
    E5M2,
    Format,
    PerRow,
    dequantize,
    quantize,
)
from unclamp.numerics import Stat, torch_dtype

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


each_format = pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda fmt: fmt.name)


OUTPUT_DECIBELS = 25


def decibels(want: Tensor, got: Tensor) -> float:
    want, got = want.to(torch.float64), got.to(torch.float64)
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


@each_dtype
@each_format
@pytest.mark.parametrize("axis", [0, 1])
def test_a_rowwise_cast_keeps_every_row(axis, fmt, dtype):
    x = torch.randn(64, 300) * 10.0 ** torch.linspace(-3, 3, 64)[:, None]
    x = (x if axis == 1 else x.t()).to(dtype)
    back = dequantize(quantize(x, fmt, granularity=PerRow(), axis=axis))
    wide, limit = x.to(torch.float32), 25 if fmt is E4M3FN else 22
    rows, backs = (t if axis == 1 else t.t() for t in (wide, back))
    assert decibels(wide, back) >= limit
    assert all(decibels(a, b) >= limit for a, b in zip(rows, backs, strict=True))


def torchao(module: str) -> ModuleType:
    """Import one of torchao's modules, which warn of much; skip where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        return importlib.import_module(f"torchao.float8.{module}")


def torchao_cast(
    x: Tensor, fmt: Format, axis: int | None = None, **settings
) -> tuple[Tensor, Tensor]:
    """Return codes and scale, which multiplies, of torchao's dynamic cast."""
    config = torchao("config").ScalingGranularity
    if axis is not None:
        settings = {**settings, "scaling_granularity": config.AXISWISE, "axiswise_dim": axis}
    cast = torchao("float8_scaling_utils").hp_tensor_to_float8_dynamic
    linear_mm = torchao("float8_training_tensor").LinearMMConfig()
    made = cast(x, torch_dtype(fmt), linear_mm, **settings)
    return made._data, made._scale


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def samples(dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of many sizes; torchao takes an amax below 1e-12, zero too, for 1e-12."""
    sizes = (1e-3, 1.0, 37.7, 1e4) if dtype == torch.float16 else (1e-9, 1e-3, 1.0, 1e4, 1e30)
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 70), (1, 5), (128, 256))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    wild = drawn[0] * torch.exp2(torch.linspace(-9, 1, 70))
    return [(x * size).to(dtype) for x in (*drawn, wild) for size in sizes]


@each_dtype
@each_format
def test_codes_and_scale_are_those_of_torchaos_tensorwise_cast(fmt, dtype):
    for x in samples(dtype):
        ours = quantize(x, fmt)
        codes, scale = torchao_cast(x, fmt)
        assert torch.equal(bits(ours.codes), bits(codes))
        assert torch.equal(ours.scale_inv, scale.reciprocal())
        assert ours.stats[Stat.SATURATED] == 0


@each_dtype
@each_format
@pytest.mark.parametrize("axis", [0, -1])
def test_codes_and_scales_are_those_of_torchaos_rowwise_cast(axis, fmt, dtype):
    for x in samples(dtype):
        ours = quantize(x, fmt, granularity=PerRow(), axis=axis)
        codes, scale = torchao_cast(x, fmt, axis)
        assert torch.equal(bits(ours.codes), bits(codes))
        assert torch.equal(ours.scale_inv.flatten(), scale.flatten().reciprocal())


@each_dtype
@each_format
def test_powers_of_two_are_those_of_torchao(fmt, dtype):
    for x in samples(dtype):
        ours = quantize(x, fmt, power_of_two=True)
        codes, scale = torchao_cast(x, fmt, round_scales_to_power_of_2=True)
        assert torch.equal(bits(ours.codes), bits(codes))
        assert torch.equal(ours.scale_inv, scale.reciprocal())


def test_a_power_of_two_lands_within_the_format_where_torchaos_does_not():
    amax = torch.nextafter(torch.tensor(3.5), torch.tensor(math.inf))
    theirs = torchao("float8_utils").amax_to_scale(
        amax, torch.float8_e4m3fn, round_scales_to_power_of_2=True
    )
    ours = quantize(amax, E4M3FN, power_of_two=True).scale_inv.reciprocal()
    assert theirs.to(torch.float64) * amax > 448
    assert ours.to(torch.float64) * amax <= 448


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_nonfinite_element_costs_torchao_every_element_and_us_its_own(special):
    x = torch.randn(40, 70)
    x[3, 5] = special
    ours = dequantize(quantize(x, E4M3FN))
    codes, scale = torchao_cast(x, E4M3FN)
    clean = torch.ones_like(x, dtype=torch.bool)
    clean[3, 5] = False
    assert decibels(x[clean], ours[clean]) > OUTPUT_DECIBELS
    back = codes.to(torch.float32) / scale
    assert not back[clean].isfinite().any()


def test_an_empty_tensor_is_cast_where_torchao_raises():
    assert quantize(torch.zeros(0, 5), E4M3FN).codes.shape == (0, 5)
    with pytest.raises(RuntimeError):
        torchao_cast(torch.zeros(0, 5), E4M3FN)
