"""Rounded losses: the decimals are told, rounding is no spike, and unrounded ones are as before."""

import math

import numpy as np
import pytest

from truths.curves import HELD_OUT, healthy
from unclamp.analysis import SpikeDetector, find_spikes, smallest_height
from unclamp.analysis.resolution import Resolution, has_ratios


def resolution_of(values: np.ndarray) -> Resolution:
    resolution = Resolution()
    for value in values.tolist():
        resolution.add(value)
    return resolution


@pytest.mark.parametrize("decimals", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("level", [0.003, 2.0, 700.0])
def test_decimals_are_told(decimals: int, level: float) -> None:
    values = level * np.exp(0.5 * np.random.default_rng(0).standard_normal(200))
    written = np.array([float(f"{value:.{decimals}f}") for value in values])
    if not written.any():
        assert resolution_of(written).decimals is None  # zeros tell nothing
        return
    found = resolution_of(written)
    if level * 10**decimals < 1e5:
        assert found.decimals == decimals
        assert found.grid == 10.0**-decimals
    in_float32 = resolution_of(written.astype(np.float32).astype(float))
    assert in_float32.decimals == (decimals if level * 10**decimals < 5e5 else None)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_unrounded_series_have_no_grid(kind: type, scale: float) -> None:
    values = scale * np.exp(np.random.default_rng(1).standard_normal(300))
    assert resolution_of(values.astype(kind).astype(float)).grid == 0


def test_the_latest_values_count() -> None:
    noise = np.exp(np.random.default_rng(1).standard_normal(300))
    assert resolution_of(np.concatenate([noise, np.round(noise, 2)[:99]])).grid == 0
    assert resolution_of(np.concatenate([noise, np.round(noise, 2)[:100]])).decimals == 2
    assert resolution_of(np.append(np.round(noise, 2), noise[0])).grid == 0


def near_zero(seed: int, noise: float = 0.05) -> np.ndarray:
    """A loss that is learned down to a few thousandths."""
    rng = np.random.default_rng([seed, 11])
    steps, final = 2000, rng.uniform(0.001, 0.006)
    trend = final + 3 * np.exp(-np.arange(steps) / 60)
    return trend * np.exp(noise * rng.standard_normal(steps))


@pytest.mark.parametrize("decimals", [2, 3, 4])
def test_rounding_near_zero_raises_no_alarm(decimals: int) -> None:
    """With 3 decimals these raised 847 alarms in 20 curves before rounding was respected."""
    for seed in range(HELD_OUT, HELD_OUT + 20):
        assert find_spikes(np.round(near_zero(seed), decimals)) == []


@pytest.mark.parametrize(("decimals", "least"), [(3, 0.02), (4, 0.008)])
def test_spikes_above_the_grid_are_found(decimals: int, least: float) -> None:
    for seed in range(HELD_OUT, HELD_OUT + 20):
        loss = near_zero(seed)
        loss[[900, 1500]] = [least, 10 * least]
        written = np.round(loss, decimals)
        assert [spike.onset for spike in find_spikes(written)] == [900, 1500]
        assert smallest_height(written) > 1 + 3 * 10.0**-decimals / np.median(written)


def test_rounding_far_below_the_level_changes_no_answer() -> None:
    loss = healthy("decaying", HELD_OUT)
    loss[[700, 1100]] *= [1.5, 3]
    exact = find_spikes(loss)
    assert len(exact) == 2
    for decimals in (2, 3, 4):
        written = find_spikes(np.round(loss, decimals))
        assert [(s.onset, s.end) for s in written] == [(s.onset, s.end) for s in exact]


def test_online_and_afterwards_agree_on_rounded_losses() -> None:
    loss = np.round(near_zero(HELD_OUT), 3)
    loss[[800, 801, 1200]] = [0.05, 0.04, 0.3]
    detector = SpikeDetector()
    online = [detector.update(value) for value in loss.tolist()]
    assert np.flatnonzero(online).tolist() == [800, 801, 1200]
    assert [s.onset for s in find_spikes(loss)] == [800, 1200]


def test_a_zero_of_few_digits_keeps_the_ratios() -> None:
    loss = np.round(near_zero(HELD_OUT), 2)  # mostly 0.00 in the end
    assert np.sum(loss == 0) > 1000
    loss[1500] = 0.5
    (spike,) = find_spikes(loss)
    assert spike.onset == 1500
    assert spike.height == pytest.approx(0.5 / 0.005)
    assert math.isfinite(spike.sigmas)


def test_zeros_of_whole_numbers_and_negative_values_have_no_ratios() -> None:
    assert has_ratios([2.5, 1.25, 0.0])
    assert not has_ratios([2.0, 1.0, 0.0])
    assert not has_ratios([0.0, 2.5])
    assert not has_ratios([1.234, -0.001])
    assert not has_ratios([math.pi, 0.0])
    assert has_ratios([math.pi, math.inf])
