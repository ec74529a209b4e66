"""Asking about any step of a run, and keeping what that takes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import unclamp
from truths.trainings import SPIKE, STEPS, Case, record
from unclamp.cli import app
from unclamp.errors import AnalysisError, ReplayError
from unclamp.explain import Limits, Snapshots, explain_spike
from unclamp.explain.store import find_snapshots, read_facts

CASE = Case(paths=((1.0, 1.0),))
FEW = Limits(replays=6)


def ask(run: Path, at: int, spike: int | None = None) -> unclamp.explain.Explanation:
    return explain_spike(run, spike, at=at, build=partial(CASE.build), step=CASE.step, limits=FEW)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("asked") / "run"
    record(CASE, run, write="all")
    return run


def test_the_step_of_a_spike_is_that_spike(run: Path) -> None:
    asked = ask(run, SPIKE)
    assert (asked.onset, asked.verdict) == (SPIKE, "clamping")


def test_a_step_that_no_detector_names_is_asked_about(run: Path) -> None:
    with unclamp.RunLog.open(run) as log:
        losses = log.steps()["loss"].to_pylist()
    at = next(n for n in range(20, SPIKE) if losses[n] > max(losses[n - 9 : n - 1]))
    assert ask(run, at).onset == at


def test_a_step_whose_loss_is_not_above_the_level_is_said(run: Path) -> None:
    with unclamp.RunLog.open(run) as log:
        losses = log.steps()["loss"].to_pylist()
    at = next(n for n in range(9, SPIKE) if losses[n] < sorted(losses[n - 9 : n])[4])
    with pytest.raises(ReplayError, match=f"the loss of step {at} is .* no rise to explain"):
        ask(run, at)


def test_wrong_questions_are_refused(run: Path) -> None:
    within = f"no loss of step 999; it has those of 0 to {STEPS - 1}"
    with pytest.raises(AnalysisError, match=within):
        ask(run, 999)
    with pytest.raises(ReplayError, match="got both: spike 1, step 34"):
        ask(run, SPIKE, spike=1)


def test_a_step_that_no_snapshot_reaches_is_said(tmp_path: Path) -> None:
    record(CASE, tmp_path / "run", keep=1)
    with unclamp.RunLog.open(tmp_path / "run") as log:
        losses = log.steps()["loss"].to_pylist()
    at = next(n for n in range(10, 20) if losses[n] > sorted(losses[n - 9 : n])[4])
    with pytest.raises(ReplayError, match=rf"no snapshot reaches step {at}: .*Snapshots\.keep"):
        ask(tmp_path / "run", at)


def kept(tmp_path: Path, *, asked: int, at: int | None, lead: int = 4) -> list[tuple[int, int]]:
    """Return first and last step of what a run without a spike has written."""
    training = CASE.build()
    with Snapshots(training, tmp_path / "run", every=5, after=3, lead=lead) as snapshots:
        for n, _ in snapshots.follow(list(CASE.batches())[:30]):
            if n == asked:
                snapshots.keep(at)
            snapshots.after(n, 1.0)
    facts = [read_facts(path) for path in find_snapshots(tmp_path / "run")]
    return sorted((fact["step"], fact["last_step"]) for fact in facts)


@pytest.mark.parametrize("asked", [2, 17, 19])
def test_a_step_is_kept_asked_for_before_or_shortly_after(tmp_path: Path, asked: int) -> None:
    """Step 17 with states each 5 steps and a lead of 4: the one of step 10, and batches to 20."""
    written = kept(tmp_path, asked=asked, at=17)
    assert (10, 20) in written
    assert all(last < 10 for first, last in written if first < 10)
    assert all(first <= 10 for first, _ in written)


def test_a_kept_step_near_the_end_has_the_batches_there_are(tmp_path: Path) -> None:
    assert (20, 29) in kept(tmp_path, asked=3, at=28)


def test_without_a_step_the_last_one_is_kept(tmp_path: Path) -> None:
    assert (10, 18) in kept(tmp_path, asked=16, at=None)


def test_keep_says_what_it_cannot_keep(tmp_path: Path) -> None:
    training = CASE.build()
    with Snapshots(training, tmp_path / "run", every=5, keep=1) as snapshots:
        for n, _ in snapshots.follow(list(CASE.batches())[:12]):
            snapshots.after(n, 1.0)
        with pytest.raises(ReplayError, match=r"no state from before step 3 is left.* of step 10"):
            snapshots.keep(3)
    with pytest.raises(ReplayError, match="closed"):
        snapshots.keep(11)


def test_the_command_takes_a_step(run: Path) -> None:
    for option in ("--at", "--step"):
        done = CliRunner().invoke(app, ["explain", str(run), option, "999"])
        assert "no loss of step 999" in str(done.exception)
    done = CliRunner().invoke(app, ["explain", str(run), "--step", "3", "--step", "4"])
    assert done.exit_code == 2


@pytest.mark.parametrize("step", [2.5, "3", -1, True])
def test_what_is_no_step_is_not_kept(tmp_path: Path, step: Any) -> None:
    snapshots = Snapshots(CASE.build(), tmp_path / "run")
    with snapshots, pytest.raises(ReplayError, match="expected the number of a step"):
        snapshots.keep(step)
