"""Spikes: planted ones are found, falling and noisy losses are left alone."""

import math

import numpy as np
import pytest

from unclamp.analysis import find_spikes


def decaying(steps: int = 400, seed: int = 0, noise: float = 0.03) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return 2 + 3.5 * np.exp(-np.arange(steps) / 40) + noise * generator.standard_normal(steps)


@pytest.mark.parametrize("height", [1.3, 1.6, 5.0])
@pytest.mark.parametrize("length", [1, 10])
@pytest.mark.parametrize("onset", [60, 250])
def test_planted_spike_is_found(height: float, length: int, onset: int) -> None:
    loss = decaying()
    loss[onset : onset + length] *= height
    (spike,) = find_spikes(loss.tolist())
    assert (spike.onset, spike.end) == (onset, onset + length - 1)
    assert onset <= spike.peak <= spike.end
    assert spike.height == pytest.approx(height, rel=0.1)


def test_healthy_curves_raise_no_alarm() -> None:
    alarms = sum(len(find_spikes(decaying(1000, seed).tolist())) for seed in range(20))
    assert alarms == 0


def test_falling_loss_is_no_spike() -> None:
    loss = decaying()
    loss[200:] *= 0.5
    assert find_spikes(loss.tolist()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_loss_is_a_spike_and_poisons_nothing(bad: float) -> None:
    loss = decaying()
    loss[100] = bad
    loss[200] *= 2
    first, second = find_spikes(loss.tolist())
    assert (first.onset, first.height) == (100, math.inf)
    assert second.onset == 200


def test_steps_are_those_given() -> None:
    loss = decaying()
    loss[100] *= 3
    (spike,) = find_spikes(loss.tolist(), steps=list(range(1000, 1400)))
    assert spike.onset == 1100


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 10, [1.0] * 100])
def test_short_and_constant_series_have_none(values: list[float]) -> None:
    assert find_spikes(values) == []
