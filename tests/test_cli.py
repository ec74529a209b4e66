"""The command line as a user types it: output, exit codes, and one clear line for bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from patience import PATIENCE_S
from typed import Typed, unclamp
from unclamp import Recorder
from unclamp.cli import app


def assert_one_clear_line(done: Typed, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def write_run(path: Path) -> Path:
    with Recorder(nn.Linear(2, 2), path, plain=True) as recorder:
        for step in range(3):
            recorder.step(loss=torch.tensor(1.0 / (step + 1)))
    return path


def test_help_names_the_commands() -> None:
    command = [sys.executable, "-m", "unclamp", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("study", "report", "formats"))


COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


@pytest.mark.parametrize("command", ["", *sorted(COMMANDS)])
def test_flags_are_shown_as_flags(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    assert "bool" not in done.stdout
    assert "--help" in done.stdout
    if "--json" in done.stdout:
        (line,) = (
            line for line in done.stdout.splitlines() if line.strip(" │").startswith("--json")
        )
        assert line.split("--json")[1].strip(" │") == "Print one JSON document on stdout."


def test_formats_prints_json_and_a_table() -> None:
    rows = json.loads(unclamp("formats", "--json").stdout)
    assert {row["name"]: row["max"] for row in rows}["e4m3fn"] == 448
    assert "57344" in unclamp("formats").stdout


def test_printed_config_is_a_study(tmp_path: Path) -> None:
    from unclamp.study.config import StudyConfig, default_toml

    printed = unclamp("study", "--print-config").stdout
    assert StudyConfig.from_toml(printed) == StudyConfig.from_toml(default_toml())


def test_report_of_a_run_is_a_page_and_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    document = json.loads(unclamp("report", run, "--json").stdout)
    assert document["scenarios"][0]["arms"][0]["final_loss"] == pytest.approx(1 / 3)
    assert Path(document["page"]).is_file()
    assert "final loss" in unclamp("report", run).stdout


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    assert_one_clear_line(unclamp("report", tmp_path / "none"), "none")


def test_foreign_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert_one_clear_line(unclamp("report", tmp_path), "run.json")


def test_run_of_another_version_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    header = json.loads((run / "run.json").read_text())
    header.update(schema_version=99, unclamp_version="9.0")
    (run / "run.json").write_text(json.dumps(header))
    assert_one_clear_line(unclamp("report", run), "9.0", "99")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), (b"", "is empty"), (b"short", "too short")],
)
def test_bad_text_is_one_line(content: bytes | None, words: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    out = tmp_path / "out"
    assert_one_clear_line(unclamp("study", "--text", text, "--out", out), words)
    assert not out.exists()


def test_folder_that_holds_another_run_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = sorted(p.name for p in run.iterdir())
    assert_one_clear_line(unclamp("study", "--out", run), "holds a run")
    assert sorted(p.name for p in run.iterdir()) == before


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('"delaid"', "did you mean 'delayed'"),
        ('{ input = { scaling = "dynamik" } }', "did you mean 'dynamic'"),
        ('{ input = { format = "e4m3" } }', "did you mean 'e4m3fn'"),
        ('{ inputs = { scaling = "dynamic" } }', "did you mean 'input'"),
    ],
)
def test_unknown_name_in_a_recipe_is_one_line(recipe: str, words: str, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(f'scenarios = ["text"]\nseeds = [0]\nsteps = 2\n[arms.a]\nrecipe = {recipe}\n')
    assert_one_clear_line(unclamp("study", "--config", study, "--out", tmp_path / "o"), words)


@pytest.mark.parametrize("strict", [False, True])
def test_glob_that_matches_nothing_warns_or_fails(strict: bool, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        'scenarios = ["text"]\nseeds = [0]\nsteps = 2\n[data]\nbatch_size = 2\nseq_len = 32\n'
        "[model]\nhidden_size = 32\nintermediate_size = 64\nlayers = 1\nheads = 2\n"
        '[arms.a.recipe]\noverride = [{ match = "nope.*", input = { scaling = "dynamic" } }]\n'
    )
    flags = ["--strict"] if strict else []
    done = unclamp("study", "--config", study, "--out", tmp_path / "out", *flags)
    assert "nope.*" in done.stderr
    assert "model.layers.0.mlp.down_proj" in done.stderr.replace("\n", "")
    if strict:
        # A study that has begun says first what it is; the error is the one line after that.
        done.stderr = re.sub(r"^unclamp study: 1 run of 2 steps.*\n", "", done.stderr)
        assert_one_clear_line(done, "matches no linear layer")
    else:
        assert done.returncode == 0


def test_a_damaged_part_is_one_line_and_the_rest_is_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (part,) = (run / "steps").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    done = unclamp("report", run)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"unclamp: {run}: steps/{part.name} is damaged and left out")


def test_a_csv_with_only_a_header_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n")
    assert_one_clear_line(
        unclamp("spikes", tmp_path / "log.csv"), "expected rows under the header", "'step', 'loss'"
    )


def test_a_folder_of_several_runs_names_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{number}") for number in range(7)]
    listed = ", ".join(map(str, runs[:5])) + " and 2 more"
    for command in ("spikes", "associate"):
        assert_one_clear_line(
            unclamp(command, tmp_path), f"name one of the runs below it: {listed}"
        )
