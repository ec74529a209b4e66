"""Recipes of Transformer Engine as ours: objects with their names and fields."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import unclamp
from integrations.te_standin import DelayedScaling, Float8CurrentScaling, Format
from unclamp import Delayed, Dynamic
from unclamp.errors import RecipeError, UnclampWarning
from unclamp.integrations.transformer_engine import recipe
from unclamp.scaling import MX, PerBlock


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


@dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_quant_fwd_inp: QParams = field(default_factory=lambda: QParams(power_2_scale=True))
    fp8_quant_fwd_weight: QParams = field(default_factory=lambda: QParams(power_2_scale=True))
    fp8_quant_bwd_grad: QParams = field(default_factory=lambda: QParams(power_2_scale=True))


@dataclass
class MXFP8BlockScaling:
    margin: int = 0
    fp8_format: Format = Format.E4M3


class NVFP4BlockScaling:
    fp8_format = Format.E4M3


class MXFP4QATMXFP8BlockScaling(MXFP8BlockScaling):
    pass


class CustomRecipe:
    def qfactory(self, role: object) -> None:
        raise NotImplementedError


def formats(found: unclamp.Recipe) -> tuple[str, str, str]:
    return found.input_format, found.weight_format, found.grad_output_format


def test_delayed_scaling():
    theirs = DelayedScaling(margin=2, amax_history_len=32, amax_compute_algo="most_recent")
    with pytest.warns(UnclampWarning, match="updates scales at every microbatch") as said:
        found = recipe(theirs)
    ours = Delayed(32, reduce="most_recent", margin=2)
    assert (found.input, found.weight, found.grad_output) == (ours, ours, ours)
    assert formats(found) == ("e4m3fn", "e4m3fn", "e5m2")
    assert "does not map" not in str(said[0].message)


def test_the_scales_are_those_of_theirs_recipe_test():
    """Golden numbers of Transformer Engine's own recipe test: margin 2, x = step + 0.25."""
    with pytest.warns(UnclampWarning):
        found = recipe(DelayedScaling(margin=2, amax_history_len=1))
    layer = torch.nn.Linear(8, 8)
    unclamp.convert(layer, found)
    scales = []
    for step in range(4):
        layer(torch.full((4, 8), step + 0.25)).sum().backward()
        unclamp.step(layer)
        scales.append(float(layer.state_dict()["unclamp_input_scale"]))
    assert scales == pytest.approx([448, 89.6, 49.777778, 34.461538])


def test_what_does_not_map_is_named():
    theirs = DelayedScaling(fp8_dpa=True, reduce_amax=False, scaling_factor_compute_algo=max)
    with pytest.warns(UnclampWarning) as said:
        recipe(theirs)
    text = str(said[0].message)
    for name in ("fp8_dpa=True", "reduce_amax=False", "scaling_factor_compute_algo=<built-in"):
        assert f"{name}" in text
    assert text.count("does not map") == 3


def test_a_function_of_a_history_gets_theirs_shape():
    seen = []

    def algorithm(history: torch.Tensor) -> torch.Tensor:
        seen.append(history.shape)
        return history.amax(0)

    with pytest.warns(UnclampWarning, match="amax_compute_algo algorithm"):
        found = recipe(DelayedScaling(amax_history_len=4, amax_compute_algo=algorithm))
    assert callable(found.input.reduce)
    history = torch.rand(3, 4)  # of three scales
    assert torch.equal(found.input.reduce(history), history.amax(1))
    assert seen == [(4, 3)]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_current_scaling(power_of_two: bool):
    found = recipe(Float8CurrentScaling(use_power_2_scales=power_of_two))
    assert found == unclamp.Recipe.uniform(Dynamic(power_of_two=power_of_two))
    assert formats(found) == ("e4m3fn", "e4m3fn", "e5m2")


def test_block_scaling():
    found = recipe(Float8BlockScaling())
    assert found.input == found.grad_output == Dynamic(PerBlock(1, 128), power_of_two=True)
    assert found.weight == Dynamic(PerBlock(128, 128), power_of_two=True)
    assert formats(found) == ("e4m3fn", "e4m3fn", "e4m3fn")
    theirs = Float8BlockScaling(fp8_quant_bwd_grad=QParams(amax_epsilon=1e-4))
    with pytest.warns(UnclampWarning, match=r"fp8_quant_bwd_grad.amax_epsilon=0.0001 does not map"):
        assert recipe(theirs).grad_output == Dynamic(PerBlock(1, 128))


def test_mx_blocks():
    found = recipe(MXFP8BlockScaling())
    assert found.input == found.weight == found.grad_output == Dynamic(MX())
    assert formats(found) == ("e4m3fn", "e4m3fn", "e4m3fn")
    with pytest.warns(UnclampWarning, match="margin=1 does not map"):
        recipe(MXFP8BlockScaling(margin=1))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (NVFP4BlockScaling(), "casts to 4 bits"),
        (MXFP4QATMXFP8BlockScaling(), "casts to 4 bits"),
        (CustomRecipe(), "made by code that nobody can read"),
        (unclamp.Recipe(), "expected a recipe of Transformer Engine"),
    ],
    ids=["NVFP4", "MXFP4", "custom", "ours"],
)
def test_refused(theirs: Any, message: str):
    with pytest.raises(RecipeError, match=message):
        recipe(theirs)
