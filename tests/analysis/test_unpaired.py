"""Welch's interval against scipy and against its own promise; when there is none, and why."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

from unclamp.analysis.unpaired import unpaired_difference, unpaired_in_words
from unclamp.errors import AnalysisError

OWN, OTHER = [2.50, 2.61, 2.42, 2.55], [2.31, 2.37, 2.29]


def test_the_interval_is_that_of_scipy() -> None:
    found = unpaired_difference(OWN, OTHER)
    want = ttest_ind(OWN, OTHER, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((want.low, want.high), rel=1e-12)
    assert found.mean == pytest.approx(np.mean(OWN) - np.mean(OTHER))
    assert (found.own_spread, found.other_spread) == pytest.approx(
        (np.std(OWN, ddof=1), np.std(OTHER, ddof=1))
    )
    assert found.verdict == "differs"


def test_95_percent_of_the_intervals_contain_the_planted_difference() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        own = generator.normal(0.3, 1.0, 4).tolist()
        interval = unpaired_difference(own, generator.normal(0.0, 3.0, 5).tolist()).interval
        assert interval is not None
        inside += interval[0] <= 0.3 <= interval[1]
    assert 930 <= inside <= 975


def test_a_single_run_on_either_side_has_no_interval_and_no_claim() -> None:
    for own, other in (([2.5], OTHER), (OWN, [2.3]), ([2.5], [2.3])):
        found = unpaired_difference(own, other)
        assert (found.verdict, found.interval) == ("single run", None)
        assert "cannot be told" in unpaired_in_words(found, own="a", other="b")


def test_a_value_that_is_not_finite_leaves_no_mean() -> None:
    found = unpaired_difference([2.5, math.nan], OTHER)
    assert (found.verdict, found.interval) == ("not finite", None)
    assert math.isnan(found.mean)
    said = unpaired_in_words(found, own="a", other="b")
    assert said == "unknown: the loss is not finite in 1 run of a"


def test_values_that_vary_by_rounding_alone_have_no_interval() -> None:
    found = unpaired_difference([0.1 + 0.2, 0.3], [0.5, 0.5])
    assert (found.verdict, found.interval) == ("constant", None)


def test_one_side_that_does_not_vary_is_no_reason_for_a_warning() -> None:
    found = unpaired_difference([2.5, 2.5, 2.5], OTHER)
    assert found.verdict == "differs"


def test_words_say_what_would_show() -> None:
    found = unpaired_difference([2.5, 2.6], [2.4, 2.7, 2.5])
    said = unpaired_in_words(found, own="a", other="b")
    assert "not distinguishable with 2 and 3 runs" in said
    assert f"(a difference over {found.resolution:.2g} would show)" in said


@pytest.mark.parametrize(("own", "level"), [([], 0.95), ([1.0], 1.0), ([1.0], 0.0)])
def test_nonsense_is_an_error(own: list[float], level: float) -> None:
    with pytest.raises(AnalysisError):
        unpaired_difference(own, [1.0, 2.0], level=level)


@pytest.mark.parametrize("shift", [0.01, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("comparisons", [1, 2, 10])
def test_a_difference_among_several_is_one_by_bonferroni(shift: float, comparisons: int) -> None:
    other = [2.4, 2.5, 2.3, 2.45]
    own = [2.41 + shift, 2.48 + shift, 2.36 + shift]
    welch: Any = ttest_ind(own, other, equal_var=False)
    want = welch.pvalue <= 0.05 / comparisons
    found = unpaired_difference(own, other)
    assert found.differs_among(comparisons) == want
    words = unpaired_in_words(found, own="a", other="b", comparisons=comparisons)
    assert ("a differs from b" in words) == want
    assert ("may be chance" in words) == (found.verdict == "differs" and not want)
