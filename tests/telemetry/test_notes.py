"""What a run's header says beside its figures: what was not in FP8, and what matched nothing."""

import warnings
from pathlib import Path

import pytest
from torch import nn

import unclamp
from unclamp import Dynamic, HighPrecision, Recipe, Recorder, RunLog, UnclampWarning


def notes(path: Path) -> list[str]:
    with RunLog.open(path) as log:
        return log.header.notes


def test_a_model_without_fp8_is_warned_of_once_and_noted(tmp_path: Path) -> None:
    with pytest.warns(UnclampWarning, match="plain=True") as caught:
        recorder = Recorder(nn.Linear(2, 2), tmp_path / "run")
    assert len(caught) == 1
    with recorder:
        recorder.step(loss=1.0)
    (note,) = notes(tmp_path / "run")
    assert note.startswith("No layer of this model is in FP8")


def test_a_baseline_is_recorded_without_a_word(tmp_path: Path) -> None:
    with Recorder(nn.Linear(2, 2), tmp_path / "run", plain=True) as recorder:
        recorder.step(loss=1.0)
    assert notes(tmp_path / "run") == []


def test_a_baseline_that_has_fp8_layers_is_refused_before_anything_is_claimed(
    tmp_path: Path,
) -> None:
    model = nn.Linear(2, 2)
    unclamp.convert(model, Recipe())
    with pytest.raises(unclamp.RunLogError, match="plain=True"):
        Recorder(model, tmp_path / "run", plain=True)
    Recorder(model, tmp_path / "run").close()
    assert notes(tmp_path / "run") == []


def test_a_recipe_in_high_precision_everywhere_is_noted(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    unclamp.convert(model, Recipe.uniform(HighPrecision()))
    Recorder(model, tmp_path / "run").close()
    (note,) = notes(tmp_path / "run")
    assert note.startswith("No layer of this model is in FP8")
    Recorder(model, tmp_path / "plain", plain=True).close()
    assert notes(tmp_path / "plain") == []


def test_an_observed_model_has_casts_to_count(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with unclamp.observe(model):
        Recorder(model, tmp_path / "run").close()
    assert notes(tmp_path / "run") == []


def test_globs_that_match_nothing_are_in_the_header(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.warns(UnclampWarning):
        unclamp.convert(model, Recipe().override("down", input=Dynamic()), skip=["lm_head"])
    Recorder(model, tmp_path / "run").close()
    assert notes(tmp_path / "run") == [
        "The skip glob 'lm_head' matched no layer: nothing was left out for it.",
        "The override 'down' matched no layer: this run is plain delayed.",
    ]


def test_an_override_that_matches_in_one_part_of_a_model_is_not_noted(tmp_path: Path) -> None:
    parts = [nn.Sequential(), nn.Sequential()]
    parts[0].add_module("up", nn.Linear(2, 2))
    parts[1].add_module("down", nn.Linear(2, 2))
    recipe = Recipe().override("down", input=Dynamic()).override("none", input=Dynamic())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnclampWarning)
        for part in parts:
            unclamp.convert(part, recipe)
    Recorder(nn.Sequential(*parts), tmp_path / "run").close()
    assert notes(tmp_path / "run") == [
        "The override 'none' matched no layer: this run is as it would be without it.",
    ]
