"""A study end to end: deterministic, resumable, and its outlier scenario does what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

from ctrl_c import with_ctrl_c
from patience import PATIENCE_S
from typed import unclamp
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog
from unclamp.scaling import Delayed, Dynamic, HighPrecision
from unclamp.study.arms import switch_to_dynamic
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.data import IGNORED, Batches
from unclamp.study.loop import RunPlan, build_model, train
from unclamp.study.outlier import ANSWERS, PROMPTS, down_projection, plant_batch

SMALL = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2}


def config(**changes: Any) -> StudyConfig:
    base = StudyConfig.from_toml(default_toml()).to_dict()
    return StudyConfig.from_dict({**base, **changes})


def small(**changes: Any) -> StudyConfig:
    return config(model=SMALL, data={"batch_size": 2, "seq_len": 32}, steps=4, **changes)


def plan(study: StudyConfig, arm: str, path: Path, *, scenario: str = "text") -> RunPlan:
    recipe = study.arms[arm].recipe
    return RunPlan(config=study, scenario=scenario, arm=arm, seed=0, recipe=recipe, path=path)


def losses(path: Path) -> list[float]:
    with RunLog.open(path) as log:
        return log.steps()["loss"].to_pylist()


def test_same_run_twice_gives_the_same_losses_bit_for_bit(tmp_path: Path) -> None:
    study = small()
    for name in ("one", "two"):
        train(plan(study, "delayed", tmp_path / name))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(1000) % 256
    one, other = (Batches(tokens, batch_size=3, seq_len=8, seed=5) for _ in range(2))
    other.batch(1)
    assert torch.equal(one.batch(7)[0], other.batch(7)[0])
    assert not torch.equal(one.batch(7)[0], one.batch(8)[0])


def test_planted_prompts_are_no_targets_and_answers_are() -> None:
    tokens = torch.full((4, 64), 65)
    planted, labels = plant_batch((tokens, tokens.clone()), seed=0, step=3, share=0.1)
    prompts = torch.isin(planted, torch.tensor(PROMPTS))
    assert prompts.sum() == 4 * 6
    assert (labels[prompts] == IGNORED).all()
    answers = torch.isin(planted, torch.tensor(ANSWERS))
    assert torch.equal(labels[answers], planted[answers])
    assert torch.equal(answers[:, 1:], prompts[:, :-1])
    assert torch.equal(tokens, torch.full((4, 64), 65))


def test_switching_sites_keeps_the_rest_of_the_recipe() -> None:
    base = Recipe(input_format="e5m2").override("a", weight=HighPrecision())
    mended = switch_to_dynamic(base, [("m.a", "input"), ("b", "grad_output")])
    a, b = mended.plan("m.a").operands, mended.plan("b").operands
    assert a["input"].scaling == Dynamic()
    assert a["input"].format.name == "e5m2"
    assert a["weight"].scaling == HighPrecision()
    assert b["grad_output"].scaling == Dynamic()
    assert b["input"].scaling == Delayed()
    assert mended.plan("c").operands == base.plan("c").operands


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_outlier_scenario_spikes_under_delayed_and_under_no_other_arm(
    seed: int, tmp_path: Path
) -> None:
    """The first planted steps of the default study; `unclamp study` runs all of it."""
    study = config(steps=62)
    curves: dict[str, list[float]] = {}
    for arm in ("hp", "dynamic", "delayed", "guarded", "smooth"):
        run = RunPlan(
            config=study,
            scenario="outlier",
            arm=arm,
            seed=seed,
            recipe=study.arms[arm].recipe,
            path=tmp_path / arm,
        )
        train(run)
        curves[arm] = losses(run.path)
    for step in (40, 60):
        before = np.mean(curves["dynamic"][step - 5 : step])
        assert curves["dynamic"][step] < 1.1 * before
        assert curves["hp"][step] < 1.1 * before
        for mended in ("guarded", "smooth"):
            assert curves[mended][step] < 1.05 * curves["dynamic"][step]
        assert curves["delayed"][step] > 1.3 * curves["dynamic"][step]
    with RunLog.open(tmp_path / "guarded") as log:
        counts = log.sql("SELECT sum(saturated) AS clamped, sum(recast) AS recast FROM casts")
    assert counts["clamped"][0].as_py() == 0
    assert counts["recast"][0].as_py() > 0
    culprit = down_projection(build_model(study.model))
    rows = (
        duckdb.connect()
        .execute(
            f"SELECT max(amax * scale / format_max) FROM '{tmp_path}/delayed/casts/*.parquet' "
            f"JOIN '{tmp_path}/delayed/sites/*.parquet' USING (site) "
            f"WHERE fqn = '{culprit}' AND role = 'input' AND step IN (40, 60)"
        )
        .fetchone()
    )
    assert rows is not None
    assert rows[0] > 10


def test_study_command_reports_and_resumes(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        "scenarios = ['text']\nseeds = [0]\nsteps = 4\n"
        "[data]\nbatch_size = 2\nseq_len = 32\n"
        "[model]\nhidden_size = 32\nintermediate_size = 64\nlayers = 1\nheads = 2\n"
        "[arms.hp]\n[arms.delayed]\nrecipe = 'delayed'\n"
        "[arms.mixed]\nfrom = 'delayed'\nswitch_worst = 2\n"
        "[arms.pilot]\nfrom = 'delayed'\nautopilot = true\n"
    )
    out = tmp_path / "out"
    first = unclamp("study", "--config", study, "--out", out, "--json", "--jobs", 1)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    arms = [arm["name"] for arm in document["scenarios"][0]["arms"]]
    assert arms == ["hp", "delayed", "mixed", "pilot"]
    tested = json.loads((out / "text" / "pilot" / "backtest.json").read_text())
    assert [run["run"] for run in tested["runs"]] == [str(out / "text" / "delayed" / "seed-0")]
    assert (out / "report.html").stat().st_size > 1000
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("**/steps/*.parquet")}
    assert len(stamps) == 4
    again = unclamp("study", "--config", study, "--out", out, "--json")
    assert json.loads(again.stdout)["scenarios"] == document["scenarios"]
    assert {p: p.stat().st_mtime_ns for p in out.glob("**/steps/*.parquet")} == stamps
    other = unclamp("study", "--config", study, "--out", out, "--steps", 5)
    note, error = other.stderr.splitlines()
    assert (other.returncode, "without the arm dynamic" in note) == (2, True)
    assert "another study" in error


def test_interrupted_study_is_readable_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = 100  # which take longer than the 2 s after which what was recorded is on disk
    arguments = [
        "study",
        "--scenario",
        "text",
        "--seeds",
        "1",
        "--steps",
        str(steps),
        "--arm",
        "hp",
    ]
    command = [sys.executable, "-m", "unclamp", *arguments, "--out", str(out)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=with_ctrl_c
    )
    run = out / "text" / "hp" / "seed-0"
    deadline = time.monotonic() + PATIENCE_S
    while not list(run.glob("steps/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal came")
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    with RunLog.open(run) as log:
        assert log.header.status == "interrupted"
        assert log.steps().num_rows > 0
    assert unclamp("report", out).returncode == 0
    assert unclamp(*arguments, "--out", out).returncode == 0
    assert len(losses(run)) == steps
