"""Thinned curves keep what a reader looks for."""

import numpy as np
import pytest

from unclamp.report.thinning import MOST_POINTS, kept_places


def test_short_curves_are_kept_whole() -> None:
    assert kept_places([3.0, 1.0, 2.0]) == [0, 1, 2]
    assert kept_places([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_planted_peak_and_trough_of_a_long_curve_is_kept(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = np.cumsum(generator.standard_normal(100_003))
    planted = 5_000 * np.arange(20) + generator.integers(500, 4_500, 20)
    values[planted] += 1e4 * np.sign(generator.standard_normal(20))
    kept = kept_places(values)
    assert len(kept) <= MOST_POINTS + 1
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1, *planted.tolist()} <= set(kept)
    assert max(np.diff(kept)) <= 2 * len(values) / (MOST_POINTS // 3)


def test_a_nan_and_a_missing_value_stay_gaps() -> None:
    values: list[float | None] = [1.0] * 10_000
    values[5_001], values[7_003] = float("nan"), None
    assert {5_001, 7_003} <= set(kept_places(values))


def test_series_drawn_together_keep_each_others_peaks() -> None:
    low, high = np.zeros(9_000), np.ones(9_000)
    low[4_321], high[1_234] = -5.0, 7.0
    assert {4_321, 1_234} <= set(kept_places(low, high))
