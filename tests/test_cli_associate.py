"""`unclamp associate` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest

from test_cli import assert_one_clear_line, unclamp
from unclamp.runlog import Header, RunLogWriter

STEPS = 400
ONSETS = (60, 101, 163, 222, 287, 350)


def write_run(path: Path, *, with_casts: bool = True, with_loss: bool = True) -> Path:
    """Write two sites: one clamps at every spike, one at random steps."""
    generator = np.random.default_rng(0)
    loss = 2 + 0.02 * generator.standard_normal(STEPS)
    loss[list(ONSETS)] *= 2
    steps = np.arange(STEPS)
    columns = {"step": steps, "time_s": steps * 1.0}
    clamped = np.stack([np.isin(steps, ONSETS), generator.random(STEPS) < 0.1])
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        writer.add("steps", {**columns, "loss": loss} if with_loss else columns)
        writer.add(
            "sites",
            {
                "site": [0, 1],
                "fqn": ["layers.0.down_proj", "layers.1.up_proj"],
                "role": ["input", "grad_output"],
                "format": ["e4m3fn"] * 2,
                "scaling": ["delayed"] * 2,
                "format_max": [448.0] * 2,
            },
        )
        for site in range(2 if with_casts else 0):
            writer.add("casts", _casts(site, clamped[site]))
    return path


def _casts(site: int, clamped: np.ndarray) -> dict[str, np.ndarray]:
    ones = np.ones(STEPS)
    counts = ("underflowed", "nonfinite", "recast")
    return {
        "step": np.arange(STEPS),
        "site": np.full(STEPS, site),
        "amax": ones,
        "scale": ones,
        "elements": np.full(STEPS, 100),
        "saturated": clamped.astype(np.int64),
        "saturated_error": 0.01 * clamped,
        "microsteps": np.ones(STEPS, dtype=np.int64),
        "sqnr_db": 30.0 + ones,
        **{name: np.zeros(STEPS, dtype=np.int64) for name in counts},
    }


def test_the_culprit_of_a_run_is_named_in_words_table_and_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = unclamp("associate", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("- Evidence at 1 site: 6 spikes of the loss in 400 steps")
    assert "* layers.0.down_proj input" in done.stdout
    assert "* named (p at most 0.02)." in done.stdout
    assert "31.0 dB" in done.stdout.replace("\n", " ")
    assert max(map(len, done.stdout.splitlines())) <= 80
    document = json.loads(unclamp("associate", run, "--json").stdout)
    assert document["level"] == pytest.approx(0.02)
    assert document["verdict"] == "named"
    first = document["sites"][0]
    assert (first["fqn"], first["hits"], first["by"]) == ("layers.0.down_proj", 6, "spikes")
    assert first["lag"] == 0


def test_an_unfinished_run_is_answered_with_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    header = json.loads((run / "run.json").read_text())
    for status, words in (("running", "has not finished (running or killed)"), ("failed",) * 2):
        (run / "run.json").write_text(json.dumps({**header, "status": status}))
        done = unclamp("associate", run, "--json")
        assert json.loads(done.stdout)["spikes"] == 6
        assert f"The run {words}:" in done.stderr


def test_a_run_without_casts_is_one_plain_line(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", with_casts=False)
    header = json.loads((bare / "run.json").read_text())
    said = " ".join(unclamp("associate", bare).stdout.split())
    assert said == (
        "- Cannot tell: no cast was recorded, and whether the run trained in FP8 is not in its log."
    )
    (bare / "run.json").write_text(json.dumps({**header, "plain": True}))
    done = unclamp("associate", bare)
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert said == (
        "- Nothing was cast in this run: it trained without FP8, so nothing was clamped."
    )
    assert json.loads(unclamp("associate", bare, "--json").stdout)["verdict"] == "none"
    (bare / "run.json").write_text(json.dumps({**header, "status": "running"}))
    assert "no cast was recorded yet" in " ".join(unclamp("associate", bare).stdout.split())


def test_what_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    mute = write_run(tmp_path / "mute", with_loss=False)
    assert_one_clear_line(unclamp("associate", mute), "expected losses")
    assert_one_clear_line(unclamp("associate", tmp_path / "none"), "does not exist")
    clamped = write_run(tmp_path / "run")
    assert_one_clear_line(unclamp("associate", clamped, "--max-lag", "100"), "at most 40")
    (tmp_path / "study.json").write_text("{}")
    assert_one_clear_line(unclamp("associate", tmp_path), "is a study", "mute")
