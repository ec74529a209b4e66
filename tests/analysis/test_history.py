"""What a run's record can tell an association, and what is said where it cannot."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_cli import unclamp
from truths.arrays import plant
from truths.rows import as_schema_1, cast_row, columns, merge_early
from unclamp.analysis import associate, run_curve
from unclamp.analysis.association import associate_series
from unclamp.analysis.history import read_history
from unclamp.runlog import Header, RunLog, RunLogWriter

STEPS = 400


def sites(*fqns: str) -> dict[str, Any]:
    count = len(fqns)
    return {
        "site": range(count),
        "fqn": list(fqns),
        "role": ["input"] * count,
        "format": ["e4m3fn"] * count,
        "scaling": ["delayed"] * count,
        "format_max": [448.0] * count,
    }


def write(
    path: Path,
    records: Iterable[tuple[int, float | None, float]],
    *,
    rank: int = 0,
    fqn: str = "layers.0.proj",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write one site, each record in a part of its own: step, loss and clamp error."""
    header = Header(unclamp_version="0", world_size=2, run_id="1", metadata=dict(metadata or {}))
    with RunLogWriter(path, header=header, rank=rank) as writer:
        writer.add("sites", sites(fqn))
        for step, loss, error in records:
            writer.add("steps", {"step": [step], "loss": [loss], "time_s": [0.0]})
            row = cast_row(step, 0, saturated=int(error > 0), saturated_error=error, rank=rank)
            writer.add("casts", columns([row]))
            if step % 50 == 0:
                writer.flush()
    return path


def losses(steps: int = STEPS) -> np.ndarray:
    return 2 + 0.02 * np.random.default_rng(0).standard_normal(steps)


def test_clamping_at_steps_without_a_loss_is_never_called_none(tmp_path: Path) -> None:
    loss = losses(1000)
    run = write(
        tmp_path / "run",
        [(s, loss[s] if s % 10 == 0 else None, 0.1 * (s % 10 == 5)) for s in range(1000)],
    )
    with RunLog.open(run) as log:
        found = associate(log)
    assert found.verdict == "cannot tell"
    said = " ".join(found.sentences)
    assert "Of the 100 steps at which anything was clamped, 100 have no recorded loss" in said
    assert "Nothing was clamped" not in said


def test_a_few_clamped_steps_without_a_loss_are_counted_in_the_answer(tmp_path: Path) -> None:
    loss = losses()
    run = write(
        tmp_path / "run",
        [(s, None if s in (70, 140) else loss[s], 0.1 * (s % 7 == 0)) for s in range(STEPS)],
    )
    with RunLog.open(run) as log:
        found = associate(log)
    assert found.verdict == "none"
    assert found.sites[0].clamped_steps == 58 - 2
    assert found.sentences[1].startswith("Of the 58 steps at which anything was clamped, 2 have")
    assert "2 of 398 recorded losses do not follow" in found.sentences[2]


def test_losses_of_every_tenth_step_give_no_lag(tmp_path: Path) -> None:
    loss = losses(4000)
    loss[np.arange(100, 4000, 490)] *= 2
    records = [(s, loss[s], 0.1 * (loss[s] > 3)) for s in range(0, 4000, 10)]
    with RunLog.open(write(tmp_path / "run", records)) as log:
        found = associate(log)
    assert found.verdict == "cannot tell"
    assert "a lag is no number of steps" in found.sentences[0]
    assert all(site.by is None for site in found.sites)


@pytest.mark.parametrize("is_merged", [False, True])
def test_of_a_run_that_went_back_the_last_recording_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_merged: bool
) -> None:
    if is_merged:
        merge_early(monkeypatch)
    first = [(s, 9.0, 0.9 * (s in (10, 320, 340))) for s in range(STEPS)]
    again = [(s, 2.0 + 0.001 * s, 0.1 * (s in (330, 340))) for s in range(300, STEPS)]
    with RunLog.open(write(tmp_path / "run", first + again)) as log:
        history = read_history(log)
        curve = run_curve(log)
    assert np.array_equal(history.steps, curve.steps)
    assert history.loss.tolist() == curve.series["loss"]
    assert history.loss[350] == pytest.approx(2.35)
    found = dict(zip(history.clamping.steps.tolist(), history.clamping.errors, strict=True))
    assert found == {10: 0.9, 330: 0.1, 340: 0.1}


def test_ranks_take_part_with_their_last_recordings(tmp_path: Path) -> None:
    loss = losses()
    run = write(tmp_path / "run", [(s, loss[s], 0.1 * (s == 20)) for s in range(STEPS)])
    other = [(s, loss[s], 0.3 * (s in (20, 30))) for s in range(STEPS)]
    write(run, [*other, (STEPS - 1, 2.0, 0.2)], rank=1)
    with RunLog.open(run) as log:
        clamping = read_history(log).clamping
    assert clamping.steps.tolist() == [20, 30, STEPS - 1]
    assert clamping.errors.tolist() == [0.3, 0.3, 0.2]


def test_ranks_with_different_modules_are_told_apart(tmp_path: Path) -> None:
    loss = losses()
    run = write(tmp_path / "run", [(s, loss[s], 0.1 * (s == 20)) for s in range(STEPS)])
    other = [(s, loss[s], 0.3 * (s in (20, 30))) for s in range(STEPS)]
    write(run, [*other, (STEPS - 1, 2.0, 0.2)], rank=1, fqn="layers.9.proj")
    with RunLog.open(run) as log:
        history = read_history(log)
    clamping = history.clamping
    assert [(fqn, role) for _, fqn, role in history.names] == [
        ("layers.0.proj", "input"),
        ("layers.9.proj", "input"),
    ]
    assert clamping.starts.tolist() == [0, 1, 4]
    assert clamping.steps.tolist() == [20, 20, 30, STEPS - 1]
    assert clamping.errors.tolist() == [0.1, 0.3, 0.3, 0.2]


def test_a_site_has_its_name_on_whatever_rank_and_under_whatever_id(tmp_path: Path) -> None:
    header = Header(unclamp_version="0", world_size=2, run_id="1")
    for rank, fqns in enumerate((["a", "b"], ["b", "a"])):
        with RunLogWriter(tmp_path, header=header, rank=rank) as writer:
            writer.add("sites", sites(*fqns) | {"site": [rank, 2 + rank]})
            writer.add("steps", {"step": range(4), "loss": [2.0] * 4, "time_s": [0.0] * 4})
            row = cast_row(2, 2 + rank, rank=rank, saturated=1, saturated_error=0.25 * (1 + rank),
                           sqnr_db=10.0 + rank)  # fmt: skip
            writer.add("casts", columns([row]))
    with RunLog.open(tmp_path) as log:
        history = read_history(log)
    assert history.names == [(0, "a", "input"), (1, "b", "input")]
    assert history.clamping.starts.tolist() == [0, 1, 2]
    assert history.clamping.errors.tolist() == [0.5, 0.25]  # a on rank 1, b on rank 0
    assert history.sqnr_db == {0: 11.0, 1: 10.0}


@pytest.mark.parametrize(
    ("cadence", "is_refused"),
    [
        ({"casts": {"steps": 20, "or_clamped": False}}, True),
        ({"casts": {"steps": 20, "or_clamped": True}}, False),
        ({"casts": {"steps": 1, "or_clamped": False}}, False),
        ({"casts": None}, False),
        ("unknown", False),
    ],
)
def test_casts_of_every_nth_step_cannot_tell(
    tmp_path: Path, cadence: Any, is_refused: bool
) -> None:
    loss = losses()
    records = [(s, loss[s], 0.0) for s in range(STEPS)]
    run = write(tmp_path / "run", records, metadata={"cadence": cadence})
    as_schema_1(run)
    with RunLog.open(run) as log:
        found = associate(log)
    assert (found.verdict == "cannot tell") == is_refused
    assert ("Every(20, or_clamped=True)" in found.sentences[0]) == is_refused
    assert ("Nothing was clamped" in found.sentences[0]) != is_refused


def test_losses_that_are_not_positive_are_worded_in_their_own_unit(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    loss = 1e4 * generator.standard_normal(2000)
    clamped = generator.random(2000) < 0.1
    run = write(tmp_path / "run", [(s, loss[s], 0.1 * clamped[s]) for s in range(2000)])
    done = unclamp("associate", run, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["is_relative"] is False
    assert 1e2 < document["loss_needed"] < 1e4
    row = next(r for r in unclamp("associate", run).stdout.splitlines() if "layers.0" in r)
    assert "%" not in row


def test_what_is_not_finite_is_none_in_json() -> None:
    run = plant(3, sites=60, steps=2000)
    run.errors[5, 77] = np.inf
    found = associate_series(run.clamping(), run.loss, spikes=run.spikes, names=run.names)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [site["clamp_error"] for site in data["sites"] if site["site"] == 5] == [None]
