"""Paired differences: against scipy's paired t-test, planted truths, and what is said of them."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from unclamp.analysis import paired_difference
from unclamp.analysis.paired import comparisons_in_words, difference_in_words
from unclamp.errors import AnalysisError

STUDIES = 2000
SAMPLING_ERROR = 4 * math.sqrt(0.05 * 0.95 / STUDIES)
BETWEEN_SEEDS, WITHIN_PAIRS = 0.09, 0.005
"""Spread of a final loss over seeds, and of its difference between two arms, as in the study."""


def said(own: list[float], other: list[float]) -> str:
    found = paired_difference(own, other)
    return difference_in_words(found, own="delayed", other="dynamic")


def planted_studies(gap: float, seeds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Studies of two arms whose losses truly differ by `gap`, and share what a seed does."""
    rng = np.random.default_rng(1234 + seeds)
    studies = []
    for _ in range(STUDIES):
        shared = 2.5 + BETWEEN_SEEDS * rng.standard_normal(seeds)
        studies.append((shared + gap + WITHIN_PAIRS * rng.standard_normal(seeds), shared))
    return studies


@pytest.mark.parametrize("seeds", [2, 3, 4, 10, 50, 1000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_mean_and_interval_are_those_of_scipy(seeds: int, level: float) -> None:
    rng = np.random.default_rng(seeds)
    for scale in (1e-6, 1.0, 1e6):
        own, other = scale * rng.standard_normal((2, seeds))
        found = paired_difference(list(own), list(other), level=level)
        oracle = ttest_rel(own, other)
        want = oracle.confidence_interval(level)
        assert found.interval == pytest.approx((want.low, want.high), rel=1e-9)
        assert found.mean == pytest.approx(np.mean(own - other), rel=1e-12)
        assert (found.verdict == "differs") == (oracle.pvalue < 1 - level)
        assert found.resolution == pytest.approx((want.high - want.low) / 2, rel=1e-9)
        assert found.pairs == seeds


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_of_2000_studies_95_percent_of_the_intervals_hold_the_truth(seeds: int) -> None:
    gap = 0.003
    held = 0
    for own, other in planted_studies(gap, seeds):
        interval = paired_difference(list(own), list(other)).interval
        assert interval is not None
        held += interval[0] <= gap <= interval[1]
    assert held / STUDIES == pytest.approx(0.95, abs=SAMPLING_ERROR)


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_equal_arms_are_said_to_differ_in_5_percent_of_studies_and_no_more(seeds: int) -> None:
    studies = planted_studies(0.0, seeds)
    differ = sum("differs" in said(list(own), list(other)) for own, other in studies)
    assert differ / STUDIES <= 0.05 + SAMPLING_ERROR


def test_arms_that_differ_by_far_more_than_their_pairs_vary_are_said_to_differ() -> None:
    """Ten times the spread of a pair, yet half of the spread between seeds: pairing is needed."""
    studies = planted_studies(10 * WITHIN_PAIRS, 5)
    differ = sum("differs" in said(list(own), list(other)) for own, other in studies)
    assert differ == STUDIES
    assert said([2.50, 2.61, 2.42], [2.40, 2.51, 2.31]).startswith(
        "+0.103 (95 %: +0.089 to +0.118)"
    )


def test_one_standard_deviation_over_three_seeds_is_no_evidence() -> None:
    """A mean of -0.0047 and a standard deviation of 0.0046; t(0.975, 2) is 4.3027."""
    other = [2.41, 2.44, 2.40]
    gaps = [-0.0047 - 0.0046, -0.0047, -0.0047 + 0.0046]
    text = said([loss + gap for loss, gap in zip(other, gaps, strict=True)], other)
    half = 4.3027 * 0.0046 / math.sqrt(3)
    assert text == (
        f"-0.0047 (95 %: {-0.0047 - half:+.3g} to {-0.0047 + half:+.3g}): not distinguishable "
        "with 3 seeds (a difference over 0.011 would show)"
    )


def test_what_a_seed_does_to_both_arms_changes_nothing() -> None:
    own, other, seed = np.random.default_rng(5).standard_normal((3, 6))
    want = paired_difference(list(own), list(other)).interval
    assert paired_difference(list(own + 9 * seed), list(other + 9 * seed)).interval == (
        pytest.approx(want, rel=1e-9)
    )


def test_one_seed_has_no_interval_and_says_so() -> None:
    found = paired_difference([2.5], [2.25])
    assert (found.mean, found.interval, found.verdict) == (0.25, None, "one pair")
    assert math.isnan(found.resolution)
    assert said([2.5], [2.25]).startswith("+0.25 (one seed: no interval")


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_seed_that_diverged_leaves_no_mean_and_is_counted(lost: float) -> None:
    found = paired_difference([2.5, lost, lost], [2.4, 2.4, lost])
    assert math.isnan(found.mean)
    assert (found.interval, found.verdict) == (None, "not finite")
    assert (found.own_nonfinite, found.other_nonfinite) == (2, 1)
    assert said([2.5, lost, lost], [2.4, 2.4, lost]) == (
        "unknown: of 3 seeds the loss is not finite, that of delayed with 2 and that of "
        "dynamic with 1"
    )
    assert said([lost], [2.4]) == ("unknown: with the only seed the loss of delayed is not finite")


def test_equal_losses_are_equal_and_have_no_interval() -> None:
    assert paired_difference([2.5, 2.4], [2.5, 2.4]).verdict == "equal"
    assert "equal in every digit" in said([2.5, 2.4], [2.5, 2.4])


def test_differences_that_vary_by_rounding_only_are_no_evidence() -> None:
    """Losses of two digits: 2.31 - 2.30 and 2.51 - 2.50 differ in their last bits alone."""
    own, other = [2.31, 2.51, 1.71], [2.30, 2.50, 1.70]
    assert len({a - b for a, b in zip(own, other, strict=True)}) > 1
    assert paired_difference(own, other).verdict == "constant"
    assert said(own, other) == (
        "+0.01 with each of 3 seeds: no spread between seeds, so no interval"
    )


def test_several_comparisons_say_how_many_there_were() -> None:
    (text,) = comparisons_in_words(2, "dynamic")
    assert text.startswith("2 comparisons with dynamic were made")
    assert "all of them counted" in text
    assert comparisons_in_words(1, "dynamic") == []


@pytest.mark.parametrize("shift", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("comparisons", [1, 2, 5, 40])
def test_a_difference_among_several_is_one_by_bonferroni(shift: float, comparisons: int) -> None:
    other = [2.4, 2.5, 2.3, 2.45]
    own = [x + shift + e for x, e in zip(other, (0.001, -0.004, 0.006, 0.002), strict=True)]
    want = ttest_rel(own, other).pvalue <= 0.05 / comparisons
    found = paired_difference(own, other)
    assert found.differs_among(comparisons) == want
    words = difference_in_words(found, own="a", other="b", comparisons=comparisons)
    assert ("a differs from b" in words) == want
    assert ("may be chance" in words) == (found.verdict == "differs" and not want)


def test_what_is_no_pair_and_no_level_is_refused() -> None:
    for own, other in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(AnalysisError, match="expected pairs"):
            paired_difference(own, other)
    for level in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(AnalysisError, match="between 0 and 1"):
            paired_difference([1.0, 2.0], [1.0, 2.5], level=level)
