"""Shifts keep what they should: the identity, distances, neighbourhoods; a rhythm is found."""

import math

import numpy as np
import pytest

from unclamp.analysis.evidence import MIN_HITS, normal_weights, tail_weights
from unclamp.analysis.shifts import REACH_STEPS, find_period, make_shifts

FLAT = np.ones(4000)


def test_the_first_shift_is_what_happened() -> None:
    for activity in (FLAT, np.exp(-np.arange(4000) / 300), np.zeros(4000)):
        steps = np.arange(len(activity))
        shifts = make_shifts(np.array([5, 1700, 3999]), activity, limit=50, seed=0)
        assert np.array_equal(shifts.move(steps)[:, 0], steps)
        assert np.array_equal(shifts.steps_before()[:, 0], steps)


def test_moves_stay_in_the_run_and_near() -> None:
    onsets = np.array([3, 2000, 3990])
    shifts = make_shifts(onsets, FLAT, limit=400, seed=0)
    moved = shifts.move(onsets)
    assert moved.min() >= 0
    assert moved.max() < 4000
    assert np.abs(moved - onsets[:, None]).max() <= shifts.distinct
    assert shifts.distinct == 2 * REACH_STEPS + 1


def test_spikes_keep_their_distances() -> None:
    onsets = np.array([1500, 1507, 2600])
    moved = make_shifts(onsets, FLAT, limit=400, seed=0).move(onsets)
    assert np.all(moved[1] - moved[0] == 7)
    assert np.all(moved[2] - moved[0] == 1100)


def test_moves_from_a_busy_time_mostly_stay_in_it() -> None:
    activity = np.where(np.arange(5000) < 500, 10.0, 0.0)
    onsets = np.array([100, 250, 400])
    moved = make_shifts(onsets, activity, limit=400, seed=0).move(onsets)
    assert np.mean(moved < 500) > 0.8


def test_a_clock_without_activity_is_even() -> None:
    shifts = make_shifts(np.array([2000]), np.zeros(4000), limit=4000, seed=0)
    assert np.all(np.diff(shifts.clock) == shifts.clock[1])


@pytest.mark.parametrize(
    ("onsets", "period"),
    [
        ([40, 60, 80, 100], 20),
        ([10, 110, 311, 410, 610], 100),
        ([5, 500, 1700, 1990], None),
        ([40, 60, 80], 20),
        ([40, 60, 81], None),
        ([40, 45, 50], None),
        ([100, 200], None),
        ([], None),
    ],
)
def test_a_rhythm_is_found_where_chance_would_not_make_one(
    onsets: list[int], period: int | None
) -> None:
    assert find_period(np.array(onsets, dtype=np.int64)) == period


def test_random_spikes_rarely_seem_to_have_a_rhythm() -> None:
    generator = np.random.default_rng(0)
    draws = [np.sort(generator.choice(5000, k, replace=False)) for k in (4, 6, 10, 100) * 100]
    assert sum(find_period(draw) is not None for draw in draws) <= 12


def test_weights_are_logarithms_of_binomial_tails() -> None:
    trials, chance = 9, 0.13
    weights = tail_weights(np.array([chance]), trials)[0]
    for hits in range(MIN_HITS, trials + 1):
        tail = sum(
            math.comb(trials, h) * chance**h * (1 - chance) ** (trials - h)
            for h in range(hits, trials + 1)
        )
        assert weights[hits] == pytest.approx(-math.log(tail))
    assert np.all(weights[:MIN_HITS] == 0)


def test_weights_are_logarithms_of_normal_tails() -> None:
    z = np.linspace(0.1, 8, 50)
    exact = [-math.log(math.erfc(x / math.sqrt(2)) / 2) for x in z]
    assert normal_weights(z) == pytest.approx(exact, rel=0.05)
    assert normal_weights(np.array([-1.0]))[0] == 0
