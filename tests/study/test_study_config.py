"""Study files: what they must hold, and how wrong ones are refused."""

import pytest

from unclamp.errors import RecipeError, StudyError
from unclamp.recipe import Recipe
from unclamp.scaling import Delayed, Dynamic, Guarded
from unclamp.study.config import StudyConfig, default_toml


def changed(**changes: object) -> dict[str, object]:
    return {**StudyConfig.from_toml(default_toml()).to_dict(), **changes}


def test_default_study_round_trips() -> None:
    config = StudyConfig.from_toml(default_toml())
    assert StudyConfig.from_dict(config.to_dict()) == config


def test_default_arms() -> None:
    arms = StudyConfig.from_toml(default_toml()).arms
    assert list(arms) == ["hp", "dynamic", "delayed", "guarded", "smooth", "mixed", "autopilot"]
    assert arms["hp"].recipe is None
    assert arms["dynamic"].recipe == Recipe.uniform(Dynamic())
    assert arms["delayed"].recipe == Recipe.uniform(Delayed())
    assert arms["guarded"].recipe == Recipe.uniform(Guarded())
    assert arms["smooth"].recipe == Recipe().override(
        "mlp.down_proj", smooth=True, weight=Guarded()
    )
    assert arms["mixed"].from_arm == "delayed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenarios": ["outlierr"]}, "did you mean 'outlier'"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"steps": 0}, "int >= 1 for steps, got 0"),
        ({"steps": "many"}, "steps"),
        ({"seeds": []}, "at least one of seeds"),
        ({"seeds": [1, 1]}, "distinct seeds"),
        ({"arms": {}}, "at least one arm"),
        ({"arms": {"a<b>": {}}}, "expected an arm's name of letters.*got 'a<b>'"),
        ({"arms": {"../up": {}}}, "not beginning with '.', as it names a folder"),
        ({"arms": {"..": {}}}, "got '..'"),
        ({"arms": {".hidden": {}}}, "got '.hidden'"),
        ({"arms": {"": {}}}, "got ''"),
        ({"arms": {"a\n": {}}}, "expected an arm's name"),
        ({"arms": {"mixed": {"from": "delayed"}}}, "must be an arm with a recipe"),
        ({"arms": {"a": {"recipe": "dynamic", "from": "b"}}}, "both from and recipe"),
        ({"data": {"batch": 3}}, "did you mean 'batch_size'"),
        ({"data": {"batch_size": 0}}, "data.batch_size"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"model": 3}, "expected a dict for model"),
    ],
)
def test_wrong_study_is_refused_with_a_reason(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        StudyConfig.from_dict(changed(**changes))


def test_an_arm_may_be_called_by_letters_digits_and_dots_within() -> None:
    arms = {"e4m3.2-x_Y": {"recipe": "dynamic"}}
    assert list(StudyConfig.from_dict(changed(arms=arms)).arms) == ["e4m3.2-x_Y"]


def test_unknown_scaling_of_an_arm_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'delayed'"):
        StudyConfig.from_dict(changed(arms={"a": {"recipe": "delaid"}}))


def test_text_that_is_not_toml_is_refused() -> None:
    with pytest.raises(StudyError, match="not valid TOML"):
        StudyConfig.from_toml("steps = = 3")
