"""One arm of a study: high precision, a recipe, or another arm's recipe mended or steered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unclamp.analysis.steering.rule import Rule, parse_rule
from unclamp.errors import StudyError
from unclamp.recipe import Recipe
from unclamp.scaling import scaling_from_dict
from unclamp.study.given import check_keys, expect, number


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One way to train: high precision, a recipe, or another arm's recipe, mended or steered.

    Args:
        recipe: None for high precision.
        from_arm: The arm whose recipe and whose clamped sites this arm starts from.
        switch_worst: Sites of `from_arm` that clamped most, made dynamic here.
        autopilot: The rule that steers this arm, tried on the logs of `from_arm`; None: none.
    """

    recipe: Recipe | None = None
    from_arm: str | None = None
    switch_worst: int = 0
    autopilot: Rule | None = None


def arm_to_dict(arm: ArmConfig) -> dict[str, Any]:
    """Return an arm as plain data."""
    if arm.autopilot is not None:
        return {"from": arm.from_arm, "autopilot": str(arm.autopilot)}
    if arm.from_arm is not None:
        return {"from": arm.from_arm, "switch_worst": arm.switch_worst}
    return {} if arm.recipe is None else {"recipe": arm.recipe.to_dict()}


def arm_from_dict(name: str, data: object) -> ArmConfig:
    """Return the arm that plain data describes; raises as `StudyConfig.from_dict`."""
    arm = expect(data, dict, f"arm {name}")
    check_keys(f"arm {name}", arm, ["recipe", "from", "switch_worst", "autopilot"])
    if "from" in arm:
        if "recipe" in arm:
            raise StudyError(f"arm {name!r} has both from and recipe; expected one of them")
        if "autopilot" in arm:
            return _steered(name, arm)
        worst = number(arm.get("switch_worst", 4), int, f"switch_worst of arm {name}", low=1)
        return ArmConfig(from_arm=expect(arm["from"], str, "from"), switch_worst=worst)
    for key in ("switch_worst", "autopilot"):
        if key in arm:
            raise StudyError(f"arm {name!r} has {key} without from")
    return ArmConfig(recipe=_recipe(arm["recipe"]) if "recipe" in arm else None)


def _recipe(value: object) -> Recipe:
    if isinstance(value, Mapping):
        return Recipe.from_dict(value)
    name = expect(value, str, "recipe")
    if name.endswith(".toml"):
        return Recipe.load(name)
    return Recipe.uniform(scaling_from_dict({"scaling": name}))


def _steered(name: str, arm: Mapping[str, Any]) -> ArmConfig:
    given = arm["autopilot"]
    if "switch_worst" in arm or given is False:
        raise StudyError(
            f"expected autopilot = true, or a rule, and no switch_worst in the arm {name!r}"
        )
    rule = Rule() if given is True else parse_rule(expect(given, str, f"autopilot of arm {name}"))
    return ArmConfig(from_arm=expect(arm["from"], str, "from"), autopilot=rule)
