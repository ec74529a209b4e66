"""Recipes of Transformer Engine as ours: what maps, and what does not, by name."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unclamp.errors import RecipeError, UnclampWarning
from unclamp.recipe import Recipe
from unclamp.scaling import MX, Delayed, Dynamic, PerBlock, Scaling

_LOST: Mapping[str, tuple[object, str]] = {
    "scaling_factor_compute_algo": (None, "scales by its function; ours follow from amaxes alone"),
    "fp8_dpa": (False, "attention in FP8: convert names it by an override of its products"),
    "fp8_mha": (False, "FP8 between layers and attention: ours casts each operand itself"),
    "backward_override": (None, "the backward's precision: see grad_input and grad_weight"),
    "override_linear_precision": ((False, False, False), "GEMMs in high precision"),
    "reduce_amax": (True, "amaxes are agreed on by the ranks that hold a product, always"),
    "interval": (1, "scales are updated at every step"),
}
"""Settings that say nothing of one layer, with their default and what it means that they go."""
UPDATES = (
    "Transformer Engine updates scales at every microbatch, from 1 at the start; unclamp once an "
    "optimizer step, from the first tensor's own"
)


@dataclass(frozen=True, kw_only=True)
class _Mapped:
    input: Scaling
    weight: Scaling
    grad_output: Scaling
    lost: tuple[str, ...] = ()


def recipe(te_recipe: object) -> Recipe:
    """Return a recipe of Transformer Engine as an `unclamp.Recipe`; a warning names what is lost.

    Args:
        te_recipe: A `DelayedScaling`, `Float8CurrentScaling`, `Float8BlockScaling` or
            `MXFP8BlockScaling`, or an object with the name and the fields of one: Transformer
            Engine need not be installed.

    Raises:
        RecipeError: It is no recipe of Transformer Engine, or nothing of it maps, as of `NVFP4`.

    Example:
        >>> class MXFP8BlockScaling:
        ...     margin = 0
        >>> found = recipe(MXFP8BlockScaling())
        >>> found.weight.kind, found.grad_output_format
        ('dynamic', 'e4m3fn')
    """
    name = type(te_recipe).__name__
    if "FP4" in name:
        raise RecipeError(
            f"{name} casts to 4 bits, and unclamp has the 8-bit formats alone: nothing of it maps; "
            "for blocks in FP8 use Dynamic(MX())"
        )
    kind = next((c.__name__ for c in type(te_recipe).__mro__ if c.__name__ in _KINDS), None)
    if kind is None:
        raise RecipeError(
            f"expected a recipe of Transformer Engine, one of {', '.join(_KINDS)}, got {name}: "
            "its quantizers are made by code that nobody can read here"
        )
    mapped = _KINDS[kind](te_recipe)
    forward, backward = _formats(te_recipe, default="E4M3" if "Block" in kind else "HYBRID")
    lost = [*mapped.lost, *_lost(te_recipe)]
    if lost:
        warnings.warn(
            f"{kind} as a recipe of unclamp: {'; '.join(lost)}", UnclampWarning, stacklevel=2
        )
    return Recipe(
        input=mapped.input,
        weight=mapped.weight,
        grad_output=mapped.grad_output,
        input_format=forward,
        weight_format=forward,
        grad_output_format=backward,
    )


def _formats(te_recipe: object, *, default: str) -> tuple[str, str]:
    name = getattr(getattr(te_recipe, "fp8_format", None), "name", default)
    formats = {"E4M3": ("e4m3fn", "e4m3fn"), "HYBRID": ("e4m3fn", "e5m2"), "E5M2": ("e5m2", "e5m2")}
    if name not in formats:
        raise RecipeError(f"expected an fp8_format of {', '.join(formats)}, got {name!r}")
    return formats[name]


def _lost(te_recipe: object) -> list[str]:
    found = []
    for name, (default, meaning) in _LOST.items():
        value = getattr(te_recipe, name, default)
        if value != default:
            found.append(f"{name}={value!r} does not map ({meaning})")
    return found


def _delayed(te_recipe: Any) -> _Mapped:
    reduce = getattr(te_recipe, "amax_compute_algo", "max")
    lost = [UPDATES]
    if callable(reduce):
        own, name = reduce, getattr(reduce, "__name__", repr(reduce))
        lost.append(f"amax_compute_algo {name} gets histories [scales, updates], newest first")
        reduce = lambda history: own(history.T)  # noqa: E731 - theirs is [updates, scales]
    scaling = Delayed(
        getattr(te_recipe, "amax_history_len", 1024),
        reduce=reduce,
        margin=getattr(te_recipe, "margin", 0),
    )
    return _Mapped(input=scaling, weight=scaling, grad_output=scaling, lost=tuple(lost))


def _current(te_recipe: Any) -> _Mapped:
    scalings, lost = [], []
    for field in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        params = getattr(te_recipe, field, None)
        default = getattr(te_recipe, "use_power_2_scales", False)
        scalings.append(Dynamic(power_of_two=bool(getattr(params, "power_2_scale", default))))
        lost += _epsilon(field, params)
    return _Mapped(input=scalings[0], weight=scalings[1], grad_output=scalings[2], lost=tuple(lost))


def _blocks(te_recipe: Any) -> _Mapped:
    scalings, lost = [], []
    fields = (("x_block_scaling_dim", 1, "fp8_quant_fwd_inp"),
              ("w_block_scaling_dim", 2, "fp8_quant_fwd_weight"),
              ("grad_block_scaling_dim", 1, "fp8_quant_bwd_grad"))  # fmt: skip
    for dimension, default, field in fields:
        is_square = getattr(te_recipe, dimension, default) == 2
        params = getattr(te_recipe, field, None)
        scalings.append(
            Dynamic(
                PerBlock(128, 128) if is_square else PerBlock(1, 128),
                power_of_two=bool(getattr(params, "power_2_scale", True)),
            )
        )
        lost += _epsilon(field, params)
    return _Mapped(input=scalings[0], weight=scalings[1], grad_output=scalings[2], lost=tuple(lost))


def _mx(te_recipe: Any) -> _Mapped:
    lost = [f"margin={te_recipe.margin} does not map"] if getattr(te_recipe, "margin", 0) else []
    scaling = Dynamic(MX())
    return _Mapped(input=scaling, weight=scaling, grad_output=scaling, lost=tuple(lost))


def _epsilon(field: str, params: object) -> list[str]:
    epsilon = getattr(params, "amax_epsilon", 0.0)
    return [f"{field}.amax_epsilon={epsilon} does not map"] if epsilon else []


_KINDS = {
    "DelayedScaling": _delayed,
    "Float8CurrentScaling": _current,
    "Float8BlockScaling": _blocks,
    "MXFP8BlockScaling": _mx,
}
