"""Slow rises are found, and told apart from what healthy losses do."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from truths.curves import FAMILIES, HELD_OUT, SCHEDULES, diverging, healthy
from truths.rows import columns
from unclamp.analysis import (
    DivergenceDetector,
    find_divergences,
    find_spikes,
    run_divergences,
)
from unclamp.cli import app
from unclamp.runlog import Header, RunLog, RunLogWriter


def falling(steps: int = 1500) -> np.ndarray:
    noise = np.random.default_rng(2).standard_normal(steps)
    return (2 + 6 * np.exp(-np.arange(steps) / 100)) * (1 + 0.02 * noise)


def test_a_loss_that_triples_slowly_is_found_and_is_no_spike() -> None:
    loss = falling()
    loss[900:] *= np.minimum(1.003 ** np.arange(600), 3)
    (drift,) = find_divergences(loss)
    assert find_spikes(loss) == []
    assert 890 <= drift.onset <= 930
    assert drift.onset < drift.found < 1050  # 1.35x is reached at 1000
    assert drift.rate == pytest.approx(0.003, rel=0.25)
    assert drift.height == pytest.approx(3, rel=0.05)
    assert drift.level == pytest.approx(2, rel=0.05)
    assert drift.peak >= 900 + math.log(3) / math.log(1.003)
    assert (drift.end, drift.recovery, drift.kind) == (1499, None, "drift")


def test_a_divergence_that_comes_back_has_an_end() -> None:
    loss = falling(2500)
    rise = 1.003 ** np.arange(300)
    loss[900:1200] *= rise
    loss[1200:1500] *= rise[::-1]
    (drift,) = find_divergences(loss, steps=range(10, 2510), series="mine")
    assert drift.recovery is not None
    assert drift.recovery == drift.end + 1
    assert 1400 < drift.recovery < 1530
    assert 1200 <= drift.peak <= 1240
    assert drift.height == pytest.approx(1.003**300, rel=0.08)
    assert drift.series == "mine"


@pytest.mark.parametrize("rate", [0.001, 0.003, 0.01])
@pytest.mark.parametrize(("height", "least"), [(1.5, 0.8), (3.0, 0.95)])
def test_share_of_planted_divergences_found(rate: float, height: float, least: float) -> None:
    found = 0
    for seed in range(HELD_OUT, HELD_OUT + 30):
        curve, onset = diverging(seed, rate=rate, height=height)
        found += any(d.found >= onset for d in find_divergences(curve))
    assert found / 30 >= least


def test_healthy_losses_of_all_families_do_not_diverge() -> None:
    """docs/spikes.md has the rates, of more curves. A gradient norm may rise slowly."""
    found = {
        (family, seed): find_divergences(healthy(family, seed))
        for family in [*FAMILIES, *SCHEDULES]
        if family != "gradient norm"
        for seed in range(HELD_OUT, HELD_OUT + 3)
    }
    assert len(found) == 39
    assert {key for key, divergences in found.items() if divergences} == set()


@pytest.mark.parametrize("width", [1, 5])
def test_a_step_to_a_new_level_is_a_spike_and_no_divergence(width: int) -> None:
    loss = falling()
    loss[800:] *= 1 + 0.6 * np.clip(np.arange(1, 701) / width, 0, 1)
    assert find_divergences(loss) == []
    (spike,) = find_spikes(loss)
    assert spike.onset == 800 + (width > 1)
    assert spike.recovery is None
    loss[1000:] *= np.minimum(1.003 ** np.arange(500), 2)
    (drift,) = find_divergences(loss)
    assert 990 <= drift.onset <= 1040


def test_spikes_are_no_divergence() -> None:
    loss = falling()
    loss[400:440] *= 5
    loss[700] = math.nan
    loss[900:1000] *= np.linspace(4, 1, 100)  # recovers slowly
    loss[1200] *= 1e6
    assert find_divergences(loss) == []


def test_rounding_near_zero_is_no_divergence() -> None:
    """From 0.0010 to 0.0014 with 3 decimals: one step of the last digit."""
    loss = np.linspace(0.0010, 0.0019, 2000)
    assert find_divergences(np.round(loss, 3)) == []
    assert len(find_divergences(loss)) == 1
    loss = np.concatenate([np.full(500, 0.0), np.linspace(0, 0.02, 1000)])
    loss[:100] = np.linspace(0.5, 0.001, 100)
    assert len(find_divergences(np.round(loss, 3))) == 1


def test_detection_depends_on_no_later_step() -> None:
    loss, _ = diverging(HELD_OUT, rate=0.003, height=2)
    detector = DivergenceDetector()
    online = [detector.update(value) for value in loss.tolist()]
    (drift,) = find_divergences(loss)
    assert np.flatnonzero(online).tolist() == list(range(drift.found, drift.end + 1))
    assert find_divergences(loss[: drift.found]) == []
    (early,) = find_divergences(loss[: drift.found + 1])
    assert (early.onset, early.found, early.level) == (drift.onset, drift.found, drift.level)


def test_scale_and_missing_values_change_nothing() -> None:
    loss, _ = diverging(HELD_OUT, rate=0.003, height=2)
    (drift,) = find_divergences(loss)
    for scale in (1e-9, 1e9):
        (other,) = find_divergences(scale * loss)
        assert (other.onset, other.found, other.end) == (drift.onset, drift.found, drift.end)
    gaps = [cell for value in loss.tolist() for cell in (value, None, math.nan)]
    (other,) = find_divergences(gaps)
    assert (other.onset, other.found) == (3 * drift.onset, 3 * drift.found)


@pytest.mark.parametrize("values", [[], [1.0], [2.0] * 400, [0.0] * 400, [-1.0, 2.0] * 200])
def test_short_constant_and_negative_series_have_none(values: list[float]) -> None:
    assert find_divergences(values) == []


def test_steps_have_to_be_as_many_as_values() -> None:
    with pytest.raises(ValueError, match="2 steps, 1 values"):
        find_divergences([1.0], steps=[1, 2])


def test_a_run_and_the_command_tell_of_it(tmp_path: Path) -> None:
    loss, _ = diverging(HELD_OUT + 1, rate=0.003, height=2)
    rows = [
        {"step": i, "rank": 0, "loss": value, "grad_norm": 1 + value, "lr": None,
         "time_s": 0.0, "step_ms": None, "scalars": None}
        for i, value in enumerate(loss.tolist())
    ]  # fmt: skip
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        writer.add("steps", columns(rows))
    with RunLog.open(tmp_path / "run") as log:
        (drift,) = run_divergences(log)
    assert [drift] == find_divergences(loss)
    done = CliRunner().invoke(app, ["spikes", str(tmp_path / "run"), "--json"])
    (record,) = json.loads(done.stdout)
    assert record["kind"] == "drift"
    assert record["number"] is None
    assert (record["onset"], record["found"]) == (drift.onset, drift.found)
    spiked = loss.copy()
    spiked[300] *= 2
    path = tmp_path / "log.csv"
    path.write_text("loss\n" + "".join(f"{value}\n" for value in spiked.tolist()))
    spike, record = json.loads(CliRunner().invoke(app, ["spikes", str(path), "--json"]).stdout)
    assert set(spike) <= set(record)  # a reader of spikes finds all its keys
    assert (spike["kind"], spike["number"], record["kind"]) == ("rise", 1, "drift")
    text = CliRunner().invoke(app, ["spikes", str(path)]).stdout
    assert f"slow divergence from step {drift.onset} on, by 0.3" in text
    assert "loss: 1 spike in" in text
    norm = CliRunner().invoke(app, ["spikes", str(path), "--series", "loss", "--json"]).stdout
    assert len(json.loads(norm)) == 2
