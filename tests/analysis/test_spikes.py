"""Spikes: planted ones are found and told whole; falling, noisy and odd series are left alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from truths.curves import FAMILIES, HELD_OUT, healthy, planted
from unclamp.analysis import (
    DEFINITIONS,
    SpikeDetector,
    find_spikes,
    run_spikes,
    smallest_height,
)
from unclamp.errors import AnalysisError
from unclamp.runlog import Header, RunLog, RunLogWriter


def decaying(steps: int = 400, seed: int = 0, noise: float = 0.03) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return 2 + 3.5 * np.exp(-np.arange(steps) / 40) + noise * generator.standard_normal(steps)


@pytest.mark.parametrize("height", [1.3, 1.6, 5.0])
@pytest.mark.parametrize("length", [1, 10])
@pytest.mark.parametrize("onset", [45, 60, 250])
def test_planted_spike_is_found(height: float, length: int, onset: int) -> None:
    """trainpulse and losslint miss spikes of 1.6x and 5x."""
    loss = decaying()
    loss[onset : onset + length] *= height
    (spike,) = find_spikes(loss.tolist())
    assert (spike.onset, spike.end, spike.kind) == (onset, onset + length - 1, "rise")
    assert spike.onset <= spike.peak <= spike.end
    assert spike.recovery is not None
    assert spike.end < spike.recovery <= spike.end + 4
    assert spike.height == pytest.approx(height, rel=0.1)
    assert spike.level == pytest.approx(loss[onset] / height, rel=0.1)


@pytest.mark.parametrize("length", [1, 10])
@pytest.mark.parametrize(
    ("height", "noise", "least"),
    [(1.3, 0.02, 0.97), (1.3, 0.03, 0.93), (1.6, 0.03, 0.99), (5.0, 0.05, 0.99)],
)
def test_share_of_planted_spikes_found(
    height: float, noise: float, least: float, length: int
) -> None:
    found = 0
    for seed in range(HELD_OUT, HELD_OUT + 100):
        curve, onset = planted(seed, height=height, length=length, noise=noise)
        found += any(s.onset == onset for s in find_spikes(curve))
    assert found / 100 >= least


def alarms(curves: int, method: str = "robust") -> tuple[dict[str, int], int]:
    """Count false alarms by family, and steps, on curves that no tuning saw."""
    counts, steps = dict.fromkeys(FAMILIES, 0), 0
    for family in FAMILIES:
        for seed in range(HELD_OUT, HELD_OUT + curves):
            curve = healthy(family, seed)
            counts[family] += len(find_spikes(curve, method=method))
            steps += len(curve)
    return counts, steps


def test_some_healthy_curves_raise_at_most_one_alarm_in_10000_steps() -> None:
    counts, steps = alarms(4)
    assert sum(counts.values()) <= steps / 10_000


@pytest.mark.slow
def test_healthy_curves_raise_at_most_one_alarm_in_10000_steps() -> None:
    """40 curves a family; docs/spikes.md has the rates, of these very curves."""
    counts, steps = alarms(40)
    assert steps > 1_600_000
    assert sum(counts.values()) <= steps / 10_000
    tame = {family: count for family, count in counts.items() if family != "heavy-tailed"}
    assert sum(tame.values()) <= 3
    assert counts["heavy-tailed"] <= 2 * 240_000 / 10_000


def test_rival_definitions_do_raise_alarms_on_the_same_curves() -> None:
    """The bound above is one that a detector can miss."""
    counts, steps = alarms(1, method="zclip")
    assert sum(counts.values()) > steps / 10_000


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_falling_loss_is_no_spike(factor: float) -> None:
    """trainscope 1.8 flags falls, and a healthy decay 13 times."""
    loss = decaying()
    loss[200:] *= factor
    loss[300] *= 0.5
    assert find_spikes(loss.tolist()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", DEFINITIONS)
def test_nonfinite_loss_is_a_spike_and_changes_no_other(bad: float, method: str) -> None:
    loss = decaying(1500)
    loss[1200] *= 60
    without = find_spikes(loss, method=method, steps=[*range(100), *range(103, 1503)])
    broken = np.insert(loss, 100, [bad] * 3)
    spikes = find_spikes(broken, method=method)
    assert [s for s in spikes if s.kind == "rise"] == without
    (spike,) = (s for s in spikes if s.kind == "nonfinite")
    assert (spike.onset, spike.peak, spike.end, spike.height) == (100, 100, 102, math.inf)


def test_divergence_into_nan_is_one_spike() -> None:
    loss = decaying()
    loss[300:303] = 4.0, 9.0, 80.0
    loss[303:] = math.nan
    (spike,) = find_spikes(loss)
    assert (spike.onset, spike.peak, spike.end, spike.recovery) == (300, 303, 399, None)
    assert (spike.kind, spike.height) == ("nonfinite", math.inf)
    assert spike.level == pytest.approx(2, rel=0.05)


def test_only_nonfinite_values_are_one_spike_without_level() -> None:
    (spike,) = find_spikes([math.nan, math.inf])
    assert (spike.onset, spike.end, spike.recovery) == (0, 1, None)
    assert math.isnan(spike.level)


def test_two_spikes_apart_are_two_and_a_notch_does_not_split_one() -> None:
    loss = decaying()
    loss[200:206] *= [1.8, 1.9, 1.5, 1.9, 1.8, 1.7]
    loss[210] *= 1.5
    assert [(s.onset, s.end) for s in find_spikes(loss)] == [(200, 205), (210, 210)]


def test_slow_rise_to_a_peak_begins_before_the_peak() -> None:
    loss = decaying()
    loss[200:220] *= np.concatenate([np.linspace(1.05, 2, 10), np.linspace(1.9, 1.02, 10)])
    (spike,) = find_spikes(loss)
    assert 200 < spike.onset < 206
    assert 207 <= spike.peak <= 211
    assert spike.recovery is not None
    assert 214 <= spike.end < spike.recovery <= 222


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
def test_rise_over_many_steps_is_one_spike(rate: float) -> None:
    loss = decaying(800)
    rise = (1 + rate) ** np.arange(int(math.log(2) / math.log1p(rate)))
    loss[300 : 300 + 2 * len(rise)] *= np.concatenate([rise, rise[::-1]])
    (spike,) = find_spikes(loss)
    assert 300 < spike.onset < 300 + len(rise)
    assert spike.height == pytest.approx(2, rel=0.15)


def test_drift_upward_by_a_fifth_in_500_steps_is_no_spike() -> None:
    loss = decaying(1200)
    loss[600:] *= np.minimum(1 + 0.2 * np.arange(600) / 500, 1.2)
    assert find_spikes(loss) == []


def test_new_level_is_one_spike_without_recovery_and_hides_no_later_one() -> None:
    loss = decaying(600)
    loss[200:] *= 1.5
    loss[400] *= 1.5
    shift, later = find_spikes(loss)
    assert (shift.onset, shift.end, shift.recovery) == (200, 399, None)
    assert later.onset == later.end == 400
    assert later.height == pytest.approx(1.5, rel=0.1)


def test_long_spike_that_recovers_is_told_whole() -> None:
    loss = decaying(900)
    loss[300:500] *= 1 + np.linspace(1.5, 0.5, 200)
    (spike,) = find_spikes(loss)
    assert (spike.onset, spike.end) == (300, 499)
    assert spike.recovery in (500, 501)


def test_detection_depends_on_no_later_step() -> None:
    loss, onset = planted(HELD_OUT, height=1.6, length=10)
    detector = SpikeDetector()
    online = [detector.update(value) for value in loss.tolist()]
    (spike,) = find_spikes(loss)
    assert np.flatnonzero(online).tolist() == list(range(spike.onset, spike.end + 1))
    for stop in (onset, onset + 1, onset + 5):
        early = find_spikes(loss[:stop])
        assert [s.onset for s in early] == [s.onset for s in [spike] if s.onset < stop]


def test_scale_of_the_loss_does_not_matter() -> None:
    loss, _ = planted(HELD_OUT + 1, height=1.3, length=2)
    places = [(s.onset, s.end) for s in find_spikes(loss)]
    assert places
    for scale in (1e-6, 1e6):
        assert [(s.onset, s.end) for s in find_spikes(scale * loss)] == places


def test_series_around_zero_is_judged_in_sigmas() -> None:
    noise = np.random.default_rng(4).standard_normal(2000)
    assert find_spikes(noise) == []
    noise[700] = 12.0
    (spike,) = find_spikes(noise)
    assert spike.onset == 700
    assert math.isnan(spike.height)
    assert 8 < spike.sigmas < 16
    assert math.isnan(smallest_height(noise))
    json.dumps(spike.to_dict(), allow_nan=False)


def test_series_that_turns_negative_keeps_what_it_learned() -> None:
    """A reward model's loss, say: positive for 300 steps, then around zero."""
    loss = 0.5 + 0.05 * np.random.default_rng(1).standard_normal(600)
    loss[300:] -= 0.5
    assert find_spikes(loss) == []
    loss[310] = 0.9
    loss[500] = 0.9
    assert [s.onset for s in find_spikes(loss)] == [310, 500]


def test_missing_values_are_left_out() -> None:
    loss = decaying().tolist()
    loss[100] *= 3
    gaps = [value for pair in zip(loss, [None] * len(loss), strict=True) for value in pair]
    (spike,) = find_spikes(gaps)
    assert (spike.onset, spike.end, spike.recovery) == (200, 200, 202)


def test_steps_are_those_given() -> None:
    loss = decaying()
    loss[100] *= 3
    (spike,) = find_spikes(loss.tolist(), steps=list(range(1000, 1400)))
    assert (spike.onset, spike.recovery) == (1100, 1101)


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 10, [1.0] * 100, [2.3] * 2500, [0.0] * 100])
@pytest.mark.parametrize("method", DEFINITIONS)
def test_short_and_constant_series_have_none(values: list[float], method: str) -> None:
    assert find_spikes(values, method=method) == []


def test_losses_of_few_digits_are_judged() -> None:
    loss = np.round(decaying(noise=0.004), 1)
    assert find_spikes(loss) == []
    loss[300] = 2.7
    assert [s.onset for s in find_spikes(loss)] == [300]


def test_missed_spike_does_not_hide_those_after_it() -> None:
    loss = decaying(600)
    loss[10] *= 8  # too early to be judged
    loss[100:600:50] *= 1.5
    assert [s.onset for s in find_spikes(loss)] == list(range(100, 600, 50))


def test_mildly_raised_steps_do_not_hide_spikes() -> None:
    generator = np.random.default_rng(0)
    loss = np.exp(0.25 * generator.standard_normal(400))
    loss[::20] *= 2.5
    onsets = [57, 103, 149, 211, 266, 302, 347]
    loss[onsets] *= 40
    assert [s.onset for s in find_spikes(loss)] == onsets
    assert smallest_height(loss) < 20


def test_smallest_height_grows_with_the_noise_and_is_found() -> None:
    least = [smallest_height(decaying(2000, noise=noise)) for noise in (0.02, 0.1, 0.2)]
    assert 1.2 < least[0] < least[1] < least[2] < 2.5
    assert math.isnan(smallest_height([2.0] * 20))
    loss = decaying(2000, noise=0.2)
    found = 0
    for onset in range(500, 1500, 20):
        spiked = loss.copy()
        spiked[onset] *= least[2]
        found += any(s.onset == onset for s in find_spikes(spiked))
    assert found >= 45


def test_unknown_method_and_threshold_say_what_there_is() -> None:
    with pytest.raises(AnalysisError, match="zclip"):
        find_spikes([1.0], method="nonsense")
    for threshold in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(AnalysisError, match="above 0"):
            find_spikes([1.0], threshold=threshold)
    with pytest.raises(ValueError, match="2 steps, 1 values"):
        find_spikes([1.0], steps=[1, 2])


def test_threshold_moves_the_limit() -> None:
    loss = decaying(noise=0.2)
    loss[300] = 3.3
    assert [s.onset for s in find_spikes(loss, threshold=4)] == [300]
    assert find_spikes(loss, threshold=9) == []


def test_spikes_of_a_run_are_of_loss_and_gradient_norm(tmp_path: Path) -> None:
    loss, norm = decaying(), decaying(seed=1)
    loss[100] *= 3
    norm[98] *= 5
    norm[300] = math.nan
    rows = {"step": list(range(400)), "rank": [0] * 400, "loss": loss, "grad_norm": norm,
            "lr": [None] * 400, "time_s": [0.0] * 400, "step_ms": [None] * 400,
            "scalars": [None] * 400}  # fmt: skip
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        writer.add("steps", rows)
    with RunLog.open(tmp_path / "run") as log:
        found = [(s.series, s.onset, s.kind) for s in run_spikes(log)]
    assert found == [
        ("grad_norm", 98, "rise"),
        ("loss", 100, "rise"),
        ("grad_norm", 300, "nonfinite"),
    ]
