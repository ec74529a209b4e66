"""torchao's settings as a recipe of ours: what maps, and what does not, by name.

What becomes of a model that torchao has converted (`observe` counts beside its casts, `convert`
leaves it alone) is in `nn.beside`. torchao itself is not imported: who has a `Float8LinearConfig`
has loaded it.
"""

import warnings
from collections.abc import Iterator
from typing import Any

from unclamp.errors import RecipeError, UnclampWarning
from unclamp.names import GEMMS, ROLES, Gemm, Role
from unclamp.recipe import Recipe
from unclamp.rule import OPERANDS, Mode
from unclamp.scaling import Dynamic, HighPrecision, PerRow, PerTensor

__all__ = ["recipe"]

CONFIG = "Float8LinearConfig"
FIELDS: dict[tuple[Role, Gemm], str] = {
    ("input", "output"): "cast_config_input",
    ("weight", "output"): "cast_config_weight",
    ("grad_output", "grad_input"): "cast_config_grad_output",
    ("weight", "grad_input"): "cast_config_weight_for_grad_input",
    ("input", "grad_weight"): "cast_config_input_for_grad_weight",
    ("grad_output", "grad_weight"): "cast_config_grad_output_for_grad_weight",
}
"""What torchao calls the cast of a role for a GEMM."""
FORMATS = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")
ELSEWHERE = {
    "enable_fsdp_float8_all_gather": "codes are gathered by unclamp.parallel.gather_codes",
    "pad_inner_dim": "a GEMM whose sizes are no multiples of 16 is computed another way here, "
    "without padding",
}
"""Settings of torchao that are none of a recipe's, and what to know of each if it is on."""


def recipe(config: Any) -> Recipe:
    """Return torchao's `Float8LinearConfig` as a recipe; one warning names what does not map.

    Args:
        config: A `Float8LinearConfig`, or an object with its fields.

    Raises:
        RecipeError: It is another one.

    Numerics: with `emulate=True` sums are in float32, and without it as `use_fast_accum` says.
    """
    if not all(hasattr(config, name) for name in (*FIELDS.values(), "gemm_config_output")):
        raise RecipeError(
            f"expected torchao's {CONFIG}, got {type(config).__name__}; of a name ask "
            f"{CONFIG}.from_recipe_name"
        )
    gemms: dict[Gemm, Mode] = {gemm: _mode(config, gemm) for gemm in GEMMS}
    lost = list(_lost(config))
    if lost:
        warnings.warn(
            f"{CONFIG} as a recipe of unclamp: {'; '.join(lost)}", UnclampWarning, stacklevel=2
        )
    return Recipe(
        input=_scaling(config, "input", gemms),
        weight=_scaling(config, "weight", gemms),
        grad_output=_scaling(config, "grad_output", gemms),
        input_format=_format(config, "input"),
        weight_format=_format(config, "weight"),
        grad_output_format=_format(config, "grad_output"),
        output=gemms["output"],
        grad_input=gemms["grad_input"],
        grad_weight=gemms["grad_weight"],
    )


def _casts(config: Any, role: Role, gemm: Gemm) -> Any:
    return getattr(config, FIELDS[role, gemm])


def _is_cast(cast: Any) -> bool:
    return cast.scaling_type.value != "disabled"


def _mode(config: Any, gemm: Gemm) -> Mode:
    """Return how a GEMM adds; in high precision where torchao does not cast its operands."""
    if not all(_is_cast(_casts(config, role, gemm)) for role in OPERANDS[gemm]):
        return HighPrecision()
    is_fast = getattr(config, f"gemm_config_{gemm}").use_fast_accum and not config.emulate
    return "hopper_fast" if is_fast else "float32"


def _uses(config: Any, role: Role) -> list[tuple[Gemm, Any]]:
    """Return the casts of a role, by the GEMMs that use them."""
    return [(gemm, _casts(config, role, gemm)) for gemm in GEMMS if role in OPERANDS[gemm]]


def _scaling(config: Any, role: Role, gemms: dict[Gemm, Mode]) -> Dynamic | HighPrecision:
    """Return a role's scaling: that of the first GEMM which is in FP8."""
    cast = next((c for gemm, c in _uses(config, role) if gemms[gemm] != HighPrecision()), None)
    if cast is None:
        return HighPrecision()
    is_row = cast.scaling_granularity.value == "axiswise"
    return Dynamic(
        PerRow() if is_row else PerTensor(), power_of_two=bool(config.round_scales_to_power_of_2)
    )


def _format(config: Any, role: Role) -> str:
    cast = _uses(config, role)[0][1]
    name = str(cast.target_dtype).removeprefix("torch.float8_")
    if name not in FORMATS:
        raise RecipeError(
            f"{CONFIG} casts {role} to {cast.target_dtype}; unclamp has {', '.join(FORMATS)}"
        )
    return name


def _lost(config: Any) -> Iterator[str]:
    """Yield what of the settings is otherwise here."""
    for role in ROLES:
        kinds = [
            f"{cast.scaling_granularity.value} for {gemm}"
            for gemm, cast in _uses(config, role)
            if _is_cast(cast)
        ]
        if len({kind.split()[0] for kind in kinds}) > 1:
            yield (
                f"{role} is cast {' and '.join(kinds)}: here a role has one granularity, that of "
                "the first"
            )
    for name, meaning in ELSEWHERE.items():
        if getattr(config, name, False):
            yield f"{name}=True is none of a recipe's: {meaning}"
