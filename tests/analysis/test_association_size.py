"""Long runs fit in memory, and losses that repeat themselves divide by no zero."""

import tracemalloc

import numpy as np
import pytest

from unclamp.analysis.evidence import Clamping, weigh
from unclamp.analysis.response import CHUNK_ELEMENTS, SPREAD_STEPS, make_response
from unclamp.analysis.shifts import make_shifts


def test_moves_of_a_part_of_the_shifts_are_those_of_all() -> None:
    shifts = make_shifts(np.array([5, 1700, 3999]), np.ones(4000), limit=50, seed=0)
    every = shifts.steps_before()
    assert np.array_equal(shifts.steps_before(slice(8, 40, 4)), every[:, 8:40:4])
    steps = np.arange(4000)[:, None]
    low = np.clip(steps - shifts.reach // 2, 0, 4000 - shifts.reach)
    offsets = shifts.offsets * shifts.reach // shifts.width
    assert np.array_equal(every, low + (steps - low - offsets) % shifts.reach)


def test_the_level_of_a_long_loss_is_that_of_its_parts() -> None:
    loss = np.exp(np.random.default_rng(0).standard_normal(2 * CHUNK_ELEMENTS // SPREAD_STEPS))
    response = make_response(loss, np.zeros(len(loss), dtype=bool))
    assert response is not None
    for step in (0, 30, CHUNK_ELEMENTS // SPREAD_STEPS, 15_000, len(loss) - 1):
        level = np.median(np.log(loss[max(0, step - 25) : step + 26]))
        assert response.excess[step] == pytest.approx(np.log(loss[step]) - level)


@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0, 1e-300])
def test_a_loss_that_mostly_repeats_itself_is_scored(offset: float) -> None:
    loss = np.full(600, offset)
    loss[::7] += 2.0 + np.arange(86)
    response = make_response(loss, np.zeros(600, dtype=bool))
    assert response is not None
    assert np.all(np.isfinite(response.scores))
    assert response.scores[::7].min() > np.delete(response.scores, np.s_[::7]).max()


@pytest.mark.slow
def test_200_000_steps_stay_under_600_megabytes() -> None:
    steps, sites = 200_000, 20
    generator = np.random.default_rng(0)
    loss = 2 + 0.02 * generator.standard_normal(steps)
    site, step = np.nonzero(generator.random((sites, steps)) < 0.01)
    clamping = Clamping(
        starts=np.searchsorted(site, np.arange(sites + 1)),
        steps=step,
        errors=generator.random(len(step)),
        first_lags=np.arange(sites) % 2,
        length=steps,
    )
    onsets = np.sort(generator.choice(steps, 40, replace=False))
    tracemalloc.start()
    response = make_response(loss, np.zeros(steps, dtype=bool))
    shifts = make_shifts(onsets, clamping.activity(), limit=501, seed=0)
    weights = weigh(clamping, onsets, response, shifts, max_lag=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.all(np.isfinite(weights.highest()))
    assert peak < 600e6
