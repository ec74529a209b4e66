"""How fast losses fell: planted slopes, the intervals' coverage, and what cannot be told."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.analysis.falls import compare_falls, measure_fall, pace_in_words

Rng = np.random.Generator


def falling(rng: Rng, steps: np.ndarray, *, share: float, noise: float = 0.03) -> list[float]:
    """Return a loss that loses a share of itself over steps 0 to 1000, in a straight line."""
    logs = math.log(3) + math.log(1 - share) * steps / 1000
    return np.exp(logs + noise * rng.standard_normal(len(steps))).tolist()


def autocorrelated(rng: Rng, count: int, phi: float) -> np.ndarray:
    shocks = rng.standard_normal(count)
    noise = np.empty(count)
    noise[0] = shocks[0]
    for i in range(1, count):
        noise[i] = phi * noise[i - 1] + math.sqrt(1 - phi * phi) * shocks[i]
    return noise


def test_the_slope_is_that_of_least_squares() -> None:
    steps = np.arange(0, 1000, 20)
    losses = falling(np.random.default_rng(0), steps, share=0.4)
    fall = measure_fall(steps.tolist(), losses)
    assert fall is not None
    assert fall.slope == pytest.approx(np.polyfit(steps, np.log(losses), 1)[0], rel=1e-9)
    assert fall.share == pytest.approx(0.4, abs=0.05)
    assert (fall.batches, fall.first, fall.last) == (50, 0, 980)


def test_a_loss_that_fell_half_as_fast_is_called_slower() -> None:
    steps, slower = np.arange(0, 1000, 20), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        own = falling(rng, steps, share=1 - math.sqrt(0.6))
        pace = compare_falls(steps.tolist(), own, falling(rng, steps, share=0.4))
        assert pace is not None
        assert pace.ratio == pytest.approx(0.5, abs=0.2)
        slower += pace.verdict == "slower"
    assert slower == 20


@pytest.mark.parametrize(
    ("count", "phi", "least"), [(23, 0.0, 0.93), (23, 0.5, 0.86), (200, 0.0, 0.92), (200, 0.5, 0.9)]
)
def test_the_interval_holds_the_planted_ratio(count: int, phi: float, least: float) -> None:
    steps = np.linspace(0, 1000, count).round()
    rng, inside, runs = np.random.default_rng([count, round(10 * phi)]), 0, 300
    for _ in range(runs):
        own = 1 - 0.3 * steps / 1000 + 0.03 * autocorrelated(rng, count, phi)
        other = 1 - 0.5 * steps / 1000 + 0.03 * autocorrelated(rng, count, phi)
        pace = compare_falls(steps.tolist(), np.exp(own), np.exp(other))
        assert pace is not None
        assert pace.interval is not None
        inside += pace.interval[0] <= 0.6 <= pace.interval[1]
    assert inside / runs >= least


def random_steps(rng: Rng, share: np.ndarray) -> np.ndarray:
    return np.flatnonzero(rng.random(1000) < share)


@pytest.mark.parametrize(
    "sampling", ["random 5 %", "every 20th", "fewer and fewer", "more and more", "half"]
)
def test_two_runs_on_one_curve_are_not_told_apart_wherever_the_steps_lie(sampling: str) -> None:
    time = np.arange(1000)
    share = {
        "random 5 %": np.full(1000, 0.05),
        "every 20th": (time % 20 == 0) * 1.0,
        "fewer and fewer": 0.15 * (1 - time / 1000) ** 2,
        "more and more": 0.15 * (time / 1000) ** 2,
        "half": np.full(1000, 0.5),
    }[sampling]
    curve = np.log(1.5 + 3 * (1 + time / 20) ** -0.7)
    apart = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        steps = random_steps(rng, share)
        # The second run's batches are noisier: slopes alike, their errors not.
        one, other = (
            np.exp(curve[steps] + noise * rng.standard_normal(len(steps))) for noise in (0.03, 0.05)
        )
        pace = compare_falls(steps.tolist(), one, other)
        assert pace is not None
        apart += pace.verdict in ("slower", "faster")
    assert apart <= 14  # 7 % of 200; 5 % are meant


def test_noise_that_both_runs_have_falls_out() -> None:
    steps, rng = np.arange(100), np.random.default_rng(0)
    noise, another = 0.3 * rng.standard_normal((2, 100))
    little = 0.001 * rng.standard_normal((2, 100))
    own = np.exp(-0.9 * steps / 100 + noise + little[0])
    same, others = (np.exp(-steps / 100 + each + little[1]) for each in (noise, another))
    paired = compare_falls(steps.tolist(), own, same)
    apart = compare_falls(steps.tolist(), own, others)
    assert paired is not None
    assert apart is not None
    assert paired.verdict == "slower"
    assert apart.verdict == "not distinguishable"


def test_against_a_loss_that_did_not_fall_nothing_is_claimed() -> None:
    steps, rng = np.arange(100), np.random.default_rng(0)
    flat = np.exp(0.05 * rng.standard_normal(100)).tolist()
    pace = compare_falls(steps.tolist(), falling(rng, steps, share=0.9), flat)
    assert pace is not None
    assert (pace.verdict, pace.interval) == ("cannot tell", None)
    assert math.isnan(pace.ratio)
    assert "cannot be told" in pace_in_words(pace, own="a", other="b")


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, -1.0])
def test_a_loss_without_a_logarithm_has_no_slope(broken: float) -> None:
    losses = [2.0 - 0.01 * i for i in range(50)]
    losses[20] = broken
    assert measure_fall(list(range(50)), losses) is None


def test_fewer_than_twenty_batches_have_no_slope() -> None:
    losses = [2.0 - 0.01 * i for i in range(20)]
    assert measure_fall(list(range(19)), losses[:19]) is None
    assert measure_fall(list(range(20)), losses) is not None


def test_the_words_say_how_fast_with_its_interval() -> None:
    steps, rng = np.arange(0, 1000, 20), np.random.default_rng(1)
    own = falling(rng, steps, share=1 - math.sqrt(0.6), noise=0.005)
    other = falling(rng, steps, share=0.4, noise=0.005)
    pace = compare_falls(steps.tolist(), own, other)
    assert pace is not None
    words = pace_in_words(pace, own="answers in a", other="the same in b")
    assert words.startswith("the loss of answers in a fell 0.5")
    assert "as fast as that of the same in b (95 %: 0." in words
    assert "over 50 batches; by 2" in words


@given(scale=st.floats(0.01, 100), stride=st.integers(1, 50))
def test_neither_the_unit_of_the_loss_nor_that_of_steps_changes_the_ratio(
    scale: float, stride: int
) -> None:
    rng, steps = np.random.default_rng(0), np.arange(40)
    own, other = (np.array(falling(rng, 25 * steps, share=share)) for share in (0.3, 0.5))
    pace = compare_falls(steps.tolist(), own, other)
    scaled = compare_falls((steps * stride).tolist(), scale * own, scale * other)
    assert pace is not None
    assert scaled is not None
    assert scaled.ratio == pytest.approx(pace.ratio, rel=1e-6)
    assert scaled.interval == pytest.approx(pace.interval, rel=1e-6)
