"""What clamping took of a matrix is what a loop over its elements says, whichever device's way."""

import pytest
import torch

from unclamp import E4M3FN, PerBlock, PerRow, PerTensor
from unclamp.numerics import dequantize, quantize
from unclamp.numerics.gradient import inverse_of_each
from unclamp.numerics.price import (
    ALWAYS,
    CutOff,
    _clamped_elsewhere,
    clamp_price,
    clamped_rows,
    cut_off,
    whole_price,
)

GRAINS = {"tensor": PerTensor(), "row": PerRow(), "block": PerBlock(4, 8)}


def cast(grain: str, *, rows: int = 12, columns: int = 24, size: float = 3.0):
    """Return a matrix, its cast by scales of which some are too large, and a gradient."""
    generator = torch.Generator().manual_seed(3)
    x = size * torch.randn(rows, columns, generator=generator)
    q = quantize(x / 3, E4M3FN, granularity=GRAINS[grain], axis=1)
    made = quantize(x, E4M3FN, q.scale_inv.reciprocal(), granularity=GRAINS[grain], axis=1)
    return x, made, torch.randn(rows, columns, generator=generator)


def truth(x, q, grad) -> tuple[float, float]:
    each = inverse_of_each(q.scale_inv, x, q.plan, 1).expand(x.shape).reshape(-1).tolist()
    hats = dequantize(q).reshape(-1).tolist()
    clamp = rounding = 0.0
    for value, hat, inv, g in zip(
        x.reshape(-1).tolist(), hats, each, grad.reshape(-1).tolist(), strict=True
    ):
        if abs(value) / inv > 464:
            clamp += g * (hat - value)
        else:
            rounding += g * (hat - value)
    return clamp, rounding


@pytest.mark.parametrize("grain", list(GRAINS))
def test_both_parts_are_those_of_a_loop(grain: str):
    x, q, grad = cast(grain)
    clamp, rounding = truth(x, q, grad)
    assert clamp
    assert float(clamp_price(cut_off(x, q), grad)) == pytest.approx(clamp, rel=1e-5)
    whole = whole_price(x, q.codes, q.scale_inv, q.plan, grad).tolist()
    assert whole == pytest.approx([clamp, rounding], rel=1e-5)


@pytest.mark.parametrize("grain", list(GRAINS))
def test_places_found_without_the_host_are_the_same(grain: str):
    x, q, _ = cast(grain)
    each = inverse_of_each(q.scale_inv, x, q.plan, q.axis)
    places, is_there, is_known = _clamped_elsewhere(x, each, q.plan)
    assert bool(is_known)
    assert places[is_there].tolist() == cut_off(x, q).places.tolist()


def test_more_clamped_elements_than_there_is_room_for_are_not_known():
    x = torch.full((64, 64), 500.0)
    q = quantize(x, E4M3FN, torch.tensor(1.0))
    *_, is_known = _clamped_elsewhere(x, q.scale_inv.reshape(1, 1), q.plan)
    assert x.numel() > ALWAYS
    assert not bool(is_known)


def test_rows_of_clamped_elements_are_a_smaller_matrix():
    x, _, grad = cast("tensor")
    x[::2] = x[::2].clamp(-3, 3)
    q = quantize(x, E4M3FN, torch.tensor(448 / 4))
    cut = cut_off(x, q)
    rows, own = clamped_rows(cut, x.shape[1])
    assert 0 < len(rows) < len(x)
    assert float(clamp_price(own, grad[rows])) == pytest.approx(float(clamp_price(cut, grad)))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_an_empty_matrix_costs_nothing(shape: tuple[int, int]):
    x = torch.zeros(shape)
    q = quantize(x, E4M3FN, torch.tensor(1.0))
    assert float(clamp_price(cut_off(x, q), x)) == 0
    assert whole_price(x, q.codes, q.scale_inv, q.plan, x).tolist() == [0, 0]
    assert float(clamp_price(CutOff.nothing(x.device), x)) == 0


def test_a_transposed_view_is_looked_at_in_its_own_order():
    x, _, grad = cast("tensor")
    q = quantize(x.t(), E4M3FN, torch.tensor(120.0))
    turned = float(clamp_price(cut_off(x.t(), q), grad.t()))
    assert turned == pytest.approx(truth(x.t(), q, grad.t())[0], rel=1e-5)
