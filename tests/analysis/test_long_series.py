"""Long series are judged by compiled code and by arrays: bit for bit as value by value."""

import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from unclamp.analysis import (
    DivergenceDetector,
    SpikeDetector,
    find_divergences,
    find_spikes,
    kernels,
    long_series,
)
from unclamp.analysis.joining import last_records, means_over_ranks, union
from unclamp.analysis.kind_shifts import make_kind_shifts
from unclamp.analysis.shifts import make_shifts
from unclamp.report.runs import _curve
from unclamp.report.thinning import MOST_POINTS

KINDS = (
    "heavy tails",
    "written with few decimals",
    "crosses zero",
    "one zero",
    "many zeros",
    "log-normal",
    "constant in steps",
    "written as float32",
)


def series(kind: str, seed: int) -> np.ndarray:
    """Return a series with spikes of all lengths, and with what detectors treat specially."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(3, 3000))
    loss = 2 + 6 * np.exp(-np.arange(count) / max(count / 5, 1))
    loss = np.abs(loss + 0.05 * draw.standard_t(3, count)) + 0.01
    for _ in range(int(draw.integers(0, 20))):
        begin, length = int(draw.integers(0, count)), int(draw.integers(1, 120))
        loss[begin : begin + length] *= 1 + 3 * draw.random()
    if kind == "written with few decimals":
        return np.round(loss, int(draw.integers(0, 5)))
    if kind == "crosses zero":
        return loss - 3
    if kind == "one zero":
        loss[int(draw.integers(0, count))] = 0.0
        return loss
    if kind == "many zeros":
        return np.round(loss.clip(0, 0.4) * draw.integers(0, 2, count), 3)
    if kind == "log-normal":
        return np.exp(2 * draw.standard_normal(count))
    if kind == "constant in steps":
        return np.where(np.arange(count) < count // 2, 3.25, 4.5)
    if kind == "written as float32":
        return np.round(loss, 3).astype(np.float32).astype(np.float64)
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_spikes_are_those_of_the_detector(kind: str) -> None:
    spikes = 0
    for seed, threshold in ((0, 5.0), (1, 5.0), (2, 2.0), (3, 8.0)):
        values = series(kind, seed)
        detector, last = SpikeDetector(threshold=threshold), -1
        judged = long_series.judge_robust(values, threshold)
        expected = np.full(len(values), -1)
        for i, value in enumerate(values.tolist()):
            detector.update(value)
            begins, last = detector.spike > last, max(last, detector.spike)
            expected[i - detector.length + 1 if begins else i : i + 1] = detector.spike
            told = (detector.level, detector.limit, detector.spread)
            found = (judged.level[i], judged.limit[i], judged.spread[i])
            assert np.array_equal(told, found, equal_nan=True), (seed, i)
        assert np.array_equal(judged.spike, expected)
        spikes += last + 1
    assert spikes > 0 or kind == "constant in steps"


@pytest.mark.parametrize("kind", [*KINDS, "drifts", "random walk"])
def test_compiled_divergences_are_those_of_the_detector(kind: str) -> None:
    found = 0
    for seed in range(4):
        values = series(kind, seed)
        if kind in ("drifts", "random walk"):
            steps = 0.002 * np.random.default_rng(seed).standard_normal(2500)
            late = np.arange(2500) > 1500 if kind == "drifts" else 0
            values = np.exp(np.cumsum(steps + 0.003 * late))
        detector = DivergenceDetector()
        is_open, levels, lows = long_series.diverge(values)
        for i, value in enumerate(values.tolist()):
            assert detector.update(value) == is_open[i]
            told = (detector.level, detector.lowest)
            assert np.array_equal(told, (levels[i], lows[i]), equal_nan=True), (seed, i)
        found += int(is_open.sum())
    assert found > 0 or kind != "drifts"


def test_a_planted_spike_and_a_planted_drift_are_found_among_120_000_steps() -> None:
    draw = np.random.default_rng(7)
    loss = 2 + 0.02 * draw.standard_normal(120_000)
    loss[70_000:70_005] = 3.5
    loss[100_000:100_400] *= 1.003 ** np.arange(400)
    loss[100_400:] *= 1.003**400
    steps = np.arange(0, 240_000, 2)
    spikes = find_spikes(loss, steps=steps)
    assert 140_000 in [spike.onset for spike in spikes]
    assert len(spikes) <= 4  # the drift's end may be one
    (drift,) = find_divergences(loss, steps=steps)
    assert 199_900 <= drift.onset <= 200_200
    assert drift.height == pytest.approx(1.003**400, rel=0.03)


@pytest.mark.parametrize("width", [1, 5, 51])
def test_the_running_median_is_that_of_each_window_alone(width: int) -> None:
    draw = np.random.default_rng(width)
    values = np.round(draw.standard_normal(400), 1)
    values[draw.random(400) < 0.1] = np.nan
    values[100:180] = np.nan
    found = kernels.running_median(values, width)
    for i in range(400):
        window = values[max(i - width // 2, 0) : i + width // 2 + 1].tolist()
        known = [value for value in window if value == value]
        if known:
            assert found[i] == statistics.median(known)
        else:
            assert np.isnan(found[i])


def test_of_records_that_go_back_the_later_ones_count() -> None:
    draw = np.random.default_rng(3)
    for _ in range(200):
        steps = np.cumsum(draw.choice([1, 1, 1, 2, 0, -4], size=int(draw.integers(0, 40))))
        # The rule in words: a record drops all earlier ones from its step on.
        left: list[tuple[int, int]] = []
        for place, step in enumerate(steps.tolist()):
            left = [(at, where) for at, where in left if at < step] + [(step, place)]
        if len(steps) > 1 and all(np.diff(steps) < 0):
            left = [(step, place) for place, step in enumerate(steps.tolist())][::-1]
        at, places = last_records(steps.astype(np.int64))
        assert list(zip(at.tolist(), places.tolist(), strict=True)) == left


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_the_mean_over_ranks_is_that_of_the_ranks_that_recorded_the_step(ranks: int) -> None:
    draw = np.random.default_rng(ranks)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(ranks):
        steps = np.flatnonzero(draw.random(60) < 0.7)
        values = draw.standard_normal(len(steps))
        values[draw.random(len(steps)) < 0.05] = np.nan
        parts.append((steps, values))
    steps, means = means_over_ranks(parts)
    expected: dict[int, list[float]] = {}
    for at, values in parts:
        for step, value in zip(at.tolist(), values.tolist(), strict=True):
            expected.setdefault(step, []).append(value)
    assert steps.tolist() == sorted(expected)
    plain = [float(np.mean(expected[step])) for step in steps.tolist()]
    assert np.array_equal(means, plain, equal_nan=True)
    assert union([at for at, _ in parts]).tolist() == sorted(expected)


def _steps_of(groups: Sequence[str], asked: np.ndarray) -> None:
    activity = np.random.default_rng(1).random(500)
    onsets = np.array([40, 210, 333, 460])
    moves = (
        make_kind_shifts(onsets, activity, groups, limit=50, seed=0)
        if groups
        else make_shifts(onsets, activity, limit=50, seed=0)
    )
    every = moves.steps_before(slice(3, 40, 4))
    assert np.array_equal(moves.steps_before(slice(3, 40, 4), steps=asked), every[asked])


@pytest.mark.parametrize("groups", [[], ["a", "b", "b", "c", "a"] * 100], ids=["one kind", "three"])
def test_shifts_of_some_steps_are_those_of_all(groups: list[str]) -> None:
    asked = np.flatnonzero(np.random.default_rng(0).random(500) < 0.2)
    _steps_of(groups, asked)
    _steps_of(groups, np.array([], dtype=np.int64))


def test_the_curve_of_a_million_steps_is_short_and_no_spike_is_lost() -> None:
    draw = np.random.default_rng(5)
    loss = 2 + 0.02 * draw.standard_normal(1_000_000)
    planted = np.sort(draw.choice(1_000_000, 300, replace=False))
    planted = planted[np.append(True, np.diff(planted) > 4000)]  # one in a bucket
    loss[planted] = 9 + draw.random(len(planted))
    loss[123_456] = np.nan
    curve = _curve(np.arange(1_000_000), loss)
    drawn = dict(zip(curve.step, curve.value, strict=True))
    assert len(curve.step) <= 1.1 * MOST_POINTS
    assert all(drawn[step] == pytest.approx(loss[step], rel=1e-4) for step in planted.tolist())
    assert drawn[123_456] is None
    assert (curve.step[0], curve.step[-1]) == (0, 999_999)
