"""`unclamp study` as it is typed: a first look, its configuration, and what it writes where."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import typed
from patience import PATIENCE_S
from typed import Typed
from unclamp.cli import app
from unclamp.study.config import StudyConfig


def unclamp(*arguments: object) -> Typed:
    """Run `unclamp study` in this process."""
    return typed.unclamp("study", *arguments)


def printed(*arguments: object) -> dict[str, Any]:
    done = unclamp(*arguments, "--print-config", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_a_first_look_is_one_scenario_one_seed_three_arms_and_two_planted_steps() -> None:
    quick = printed("--quick")
    assert (quick["scenarios"], quick["seeds"]) == (["outlier"], [0])
    assert list(quick["arms"]) == ["dynamic", "delayed", "guarded"]
    config = StudyConfig.from_dict(quick)
    assert config.outlier.planted_steps(config.steps) == [40, 60]


def test_what_is_asked_for_wins_over_the_first_look() -> None:
    asked = ("--seeds", 2, "--steps", 50, "--arm", "hp", "--arm", "mixed", "--scenario", "text")
    quick = printed("--quick", *asked, "--text", "a.txt")
    assert (quick["scenarios"], quick["seeds"], quick["steps"]) == (["text"], [0, 1], 50)
    assert list(quick["arms"]) == ["hp", "delayed", "mixed"]
    assert quick["data"]["text"] == ["a.txt"]


def test_a_first_look_at_a_model_of_ones_own_plants_nothing() -> None:
    quick = printed("--quick", "--hf-model", "some/model")
    assert (quick["scenarios"], quick["model"]["hf_model"]) == (["text"], "some/model")


def test_a_first_look_takes_no_study_file(tmp_path: Path) -> None:
    done = unclamp("--quick", "--config", tmp_path / "study.toml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "leave out --config" in done.stderr


def test_the_printed_file_is_the_study_that_the_options_make() -> None:
    done = unclamp("--steps", 50, "--arm", "delayed", "--print-config")
    file = tomllib.loads(done.stdout)
    assert (file["steps"], list(file["arms"])) == (50, ["delayed"])
    assert StudyConfig.from_dict(file).to_dict() == printed("--steps", 50, "--arm", "delayed")


def test_what_matches_nothing_is_told_once_and_stdout_is_one_document(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        "scenarios = ['text']\nseeds = [0, 1]\nsteps = 3\n[data]\nbatch_size = 2\nseq_len = 32\n"
        "[model]\nhidden_size = 32\nintermediate_size = 64\nlayers = 1\nheads = 2\n"
        '[arms.a.recipe]\noverride = [{ match = "nope.*", input = { scaling = "dynamic" } }]\n'
    )
    out = tmp_path / "out"
    options = ["--config", str(study), "--out", str(out), "--jobs", "2", "--json"]
    command = [sys.executable, "-m", "unclamp", "study", *options]  # with what its workers write
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["page"] == str(out / "report.html")
    lines = done.stderr.splitlines()
    head = "unclamp study: 2 runs of 3 steps (1 scenario, 1 arm, 2 seeds)"
    assert sum(line.startswith(head) for line in lines) == 1
    assert sum("nope.*" in line for line in lines) == 1
    assert lines[-1] == f"The page: {out / 'report.html'}"
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("seeds", [0, -2])
def test_a_study_has_a_seed_at_least(seeds: int) -> None:
    done = unclamp("--seeds", seeds, "--print-config")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--seeds" in done.stderr


@pytest.mark.slow
def test_a_first_look_with_two_seeds_does_not_call_them_one(tmp_path: Path) -> None:
    options = ("--seeds", 2, "--arm", "dynamic", "--scenario", "text", "--steps", 3)
    done = unclamp("--quick", *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "one seed" not in done.stderr


@pytest.mark.slow
def test_a_first_look_shows_the_spikes_of_delayed_scaling(tmp_path: Path) -> None:
    done = unclamp("--quick", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    (scenario,) = json.loads(done.stdout)["scenarios"]
    ratios = {arm["name"]: arm["planted_ratio"] for arm in scenario["arms"]}
    assert ratios["delayed"][0] > 1.3
    assert ratios["guarded"][0] < 1.05
    assert "With one seed" in done.stderr


def test_arms_without_the_one_they_are_compared_with_are_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclamp.cli.study._run_study", lambda *_: False)
    told = "without the arm dynamic no arm is called better or worse"
    line = ["study", "--out", str(tmp_path / "study"), "--arm", "guarded", "--arm"]
    assert told in CliRunner().invoke(app, [*line, "delayed"]).stderr
    assert told not in CliRunner().invoke(app, [*line, "dynamic"]).stderr
