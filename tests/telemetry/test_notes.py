"""What a run's header says beside its figures: what was not in FP8, and what matched nothing."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import unclamp
from unclamp import Dynamic, HighPrecision, Recipe, Recorder, RunLog, UnclampWarning
from unclamp.report.view import build_view


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
    with pytest.warns(UnclampWarning, match="the recipe leaves"):
        unclamp.convert(model, Recipe.uniform(HighPrecision()))
    with pytest.warns(UnclampWarning, match="plain=True"):
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


def test_only_a_run_that_was_to_be_plain_is_said_to_be_without_fp8_by_design(
    tmp_path: Path,
) -> None:
    late = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(late.parameters(), lr=0.1)
    with pytest.warns(UnclampWarning):
        recorder = Recorder(late, tmp_path / "late")
    unclamp.convert(late, Recipe())
    late(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    with pytest.warns(UnclampWarning, match="converted after"), recorder:
        recorder.step(loss=1.0)
    with Recorder(nn.Linear(2, 2), tmp_path / "plain", plain=True) as recorder:
        recorder.step(loss=1.0)
    said = {
        name: " ".join(view.run.sentences)
        for name in ("late", "plain")
        if (view := build_view(tmp_path / name)).run is not None
    }
    assert "No cast was recorded. It is a training without FP8, by design." in said["plain"]
    assert "No cast was recorded. Whether it was in FP8 is not in the log." in said["late"]


def test_an_older_log_is_plain_only_where_a_study_says_so(tmp_path: Path) -> None:
    arm = {"scenario": "text", "arm": "hp", "seed": 0, "recipe": None}
    for number, metadata in enumerate((arm, {})):
        path = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnclampWarning)
            Recorder(nn.Linear(2, 2), path, metadata=metadata).close()
        header = json.loads((path / "run.json").read_text())
        assert header.pop("plain") is False
        (path / "run.json").write_text(json.dumps(header))
        with RunLog.open(path) as log:
            assert log.header.plain == bool(metadata)


def test_a_warning_names_the_line_of_the_user(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unclamp.convert(nn.Embedding(2, 2), Recipe())
        unclamp.observe(nn.Embedding(2, 2)).stop()
        Recorder(nn.Linear(2, 2), tmp_path / "run").close()
    assert [warning.filename for warning in caught] == [__file__] * 3


@pytest.mark.parametrize("begin", [unclamp.convert, unclamp.observe])
def test_a_recipe_that_puts_no_layer_in_fp8_is_warned_of(begin: Callable[..., object]) -> None:
    with pytest.warns(UnclampWarning, match="the recipe leaves 0, 1 in high precision"):
        begin(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Recipe.uniform(HighPrecision()))
    gemms = Recipe(output=HighPrecision(), grad_input=HighPrecision(), grad_weight=HighPrecision())
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        begin(nn.Linear(2, 2), gemms)
    left = Recipe().override("0", scaling=HighPrecision())
    begin(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), left)
