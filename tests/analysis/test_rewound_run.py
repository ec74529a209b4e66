"""A run that went back and ended before it had caught up: everybody sees the same spikes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from unclamp.analysis import associate, run_spikes
from unclamp.analysis.curves import run_losses
from unclamp.analysis.history import read_history
from unclamp.cli import app
from unclamp.errors import ReplayError
from unclamp.explain import explain_spike
from unclamp.report import build_view
from unclamp.runlog import Header, RunLog, RunLogWriter

FIRST, BACK_TO, SECOND_END = 200, 140, 180


def recorded() -> list[tuple[int, float]]:
    """Steps and losses in the order of recording: 0 to 199, then again from 140 to 179.

    At first spikes at 150 and 190; the second time, mended, the one at 150 is gone and there is
    another at 170. What came after 179 belongs to weights that were thrown away.
    """
    noise = np.random.default_rng(0).standard_normal(FIRST + SECOND_END - BACK_TO)
    steps = [*range(FIRST), *range(BACK_TO, SECOND_END)]
    planted = [3.0 if i in (150, 190, FIRST + 170 - BACK_TO) else 1.0 for i in range(len(steps))]
    return [
        (step, 2.0 * rise * (1 + 0.01 * float(noise[i])))
        for i, (step, rise) in enumerate(zip(steps, planted, strict=True))
    ]


def final_way() -> list[tuple[int, float]]:
    """The way to the last weights by brute force: who goes back throws away what comes after."""
    way: list[tuple[int, float]] = []
    for step, loss in recorded():
        way = [kept for kept in way if kept[0] < step]
        way.append((step, loss))
    return way


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    with RunLogWriter(path, header=Header(unclamp_version="test")) as writer:
        writer.add("sites", {"site": [0], "fqn": ["down"], "role": ["input"],
                             "format": ["e4m3fn"], "format_max": [448.0], "scaling": ["delayed"],
                             "granularity": ["tensor"]})  # fmt: skip
        for number, (step, loss) in enumerate(recorded()):
            # A clock that was set back says nothing of the order of steps.
            seconds = float(number if number < 230 else number - 100)
            writer.add("steps", {"step": [step], "loss": [loss], "grad_norm": [None],
                                 "time_s": [seconds], "step_ms": [1.0],
                                 "scalars": [None]})  # fmt: skip
            writer.add("casts", {"step": [step], "site": [0], "amax": [1.0], "scale": [1.0],
                                 "elements": [10], "saturated": [int(step == 169)],
                                 "underflowed": [0], "nonfinite": [0], "recast": [0],
                                 "saturated_error": [0.0], "microsteps": [1]})  # fmt: skip
    snapshot = path / "snapshots" / "step-000000-to-000180"
    snapshot.mkdir(parents=True)
    facts = {"schema_version": 1, "step": 0, "last_step": 180}
    (snapshot / "snapshot.json").write_text(json.dumps(facts))
    return path


def test_the_losses_are_those_of_the_way_to_the_last_weights(run: Path) -> None:
    with RunLog.open(run) as log:
        losses = run_losses(log)
        steps, losses = losses.steps, losses.values
        history = read_history(log)
    assert list(zip(steps, losses, strict=True)) == final_way()
    assert list(zip(history.steps.tolist(), history.loss.tolist(), strict=True)) == final_way()


def test_all_commands_see_the_one_spike_that_is_on_that_way(run: Path) -> None:
    said = CliRunner().invoke(app, ["spikes", str(run), "--json"], catch_exceptions=False)
    assert [(s["onset"], s["number"]) for s in json.loads(said.stdout)] == [(170, 1)]
    with RunLog.open(run) as log:
        assert [spike.onset for spike in run_spikes(log)] == [170]
        assert associate(log).spikes == 1
    view = build_view(run).run
    assert view is not None
    assert [spike["onset"] for spike in view.spikes] == [170]
    with pytest.raises(ReplayError, match=r"got 2; it has 1 at step 170 \(3\.\d+x\)$"):
        explain_spike(run, 2)
