"""Do two groups of runs differ that have no batches in common? Welch's t-interval. Torch-free.

Without pairs, what varies from seed to seed stays in both means, so the interval is wide; of a
group of one run nothing is known of that, and there is no interval. Pairs are for `paired`.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unclamp.analysis.paired import LEVEL, ROUNDING, interval_in_words
from unclamp.errors import AnalysisError
from unclamp.written import counted, signed

Verdict = Literal["differs", "not distinguishable", "single run", "not finite", "constant"]


@dataclass(frozen=True, kw_only=True)
class UnpairedDifference:
    """The mean of own minus that of other, and what so many runs can show of it.

    Attributes:
        own_runs: Values of its own, count.
        other_runs: Of the other, count.
        own_nonfinite: Values of its own that are NaN or Inf, count.
        other_nonfinite: Of the other, count.
        own_mean: Mean of its own; NaN if any is not finite.
        other_mean: Of the other, likewise.
        own_spread: Standard deviation; None of a single value, or where one is not finite.
        other_spread: Of the other, likewise.
        mean: Difference of the means.
        interval: Ends of Welch's t-interval of the difference; None where there is none.
        level: Share of intervals that hold the true difference, if values are normal.
        verdict: `differs` where the interval leaves out 0, else `not distinguishable`; where
            there is no interval, why: a `single run` on either side, a value that is `not
            finite`, or values that are `constant` on both sides.
    """

    own_runs: int
    other_runs: int
    own_nonfinite: int
    other_nonfinite: int
    own_mean: float
    other_mean: float
    own_spread: float | None
    other_spread: float | None
    mean: float
    interval: tuple[float, float] | None
    level: float
    verdict: Verdict

    @property
    def resolution(self) -> float:
        """Half the interval: a difference beyond it would be told from 0; NaN without one."""
        if self.interval is None:
            return math.nan
        return (self.interval[1] - self.interval[0]) / 2

    def differs_among(self, comparisons: int) -> bool:
        """Return whether the difference holds with so many comparisons counted (Bonferroni)."""
        if self.verdict != "differs":
            return False
        from scipy.stats import ttest_ind_from_stats  # noqa: PLC0415  # slow to load, seldom needed

        found = ttest_ind_from_stats(
            self.own_mean,
            self.own_spread or 0.0,
            self.own_runs,
            self.other_mean,
            self.other_spread or 0.0,
            self.other_runs,
            equal_var=False,
        )
        return float(found.pvalue) * comparisons <= 1 - self.level


def unpaired_difference(
    own: Sequence[float], other: Sequence[float], *, level: float = LEVEL
) -> UnpairedDifference:
    """Return the difference of two means with Welch's t-interval, for unequal variances.

    Args:
        own: A value for each run, such as its final loss.
        other: Those it is compared with; they need not be as many.
        level: Of the interval, a fraction.

    Raises:
        AnalysisError: A side without a value, or a level that is none.

    Numerics: NaN and Inf are counted, and then there is no difference and no interval.
    """
    if not 0 < level < 1:
        raise AnalysisError(f"the level of an interval is between 0 and 1, got {level!r}")
    if not own or not other:
        raise AnalysisError(f"expected values on both sides, got {len(own)} and {len(other)}")
    sides = np.array(own, np.float64), np.array(other, np.float64)
    lost = [int(np.sum(~np.isfinite(side))) for side in sides]
    means = [math.nan if n else float(side.mean()) for n, side in zip(lost, sides, strict=True)]
    spreads = [
        None if n or len(side) < 2 else float(side.std(ddof=1))
        for n, side in zip(lost, sides, strict=True)
    ]
    interval, verdict = None, _without_interval(sides, spreads, is_finite=not any(lost))
    if verdict is None:
        interval = _welch(*sides, level)
        verdict = "not distinguishable" if interval[0] <= 0 <= interval[1] else "differs"
    return UnpairedDifference(
        own_runs=len(own),
        other_runs=len(other),
        own_nonfinite=lost[0],
        other_nonfinite=lost[1],
        own_mean=means[0],
        other_mean=means[1],
        own_spread=spreads[0],
        other_spread=spreads[1],
        mean=means[0] - means[1],
        interval=interval,
        level=level,
        verdict=verdict,
    )


def _without_interval(
    sides: tuple[np.ndarray, np.ndarray], spreads: Sequence[float | None], *, is_finite: bool
) -> Verdict | None:
    """Return why there is no interval, or None."""
    if not is_finite:
        return "not finite"
    known = [spread for spread in spreads if spread is not None]
    if len(known) < 2:
        return "single run"
    largest = max(float(np.abs(side).max()) for side in sides)
    return "constant" if max(known) <= ROUNDING * largest else None


def _welch(own: np.ndarray, other: np.ndarray, level: float) -> tuple[float, float]:
    from scipy.stats import ttest_ind  # noqa: PLC0415  # half a second, and seldom needed

    with warnings.catch_warnings():
        # One side that hardly varies is no reason to doubt the interval: the other side does.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        found = ttest_ind(own, other, equal_var=False).confidence_interval(level)
    return float(found.low), float(found.high)


def unpaired_in_words(
    found: UnpairedDifference, *, own: str, other: str, comparisons: int = 1
) -> str:
    """Say a difference of means, and what so many runs can show; no full stop at its end.

    With `comparisons`, how many were made in all, it is called one only if it remains one with
    all of them counted.
    """
    if found.verdict == "not finite":
        counts = ((own, found.own_nonfinite), (other, found.other_nonfinite))
        lost = " and ".join(f"{counted(n, 'run')} of {name}" for name, n in counts if n)
        return f"unknown: the loss is not finite in {lost}"
    mean = signed(found.mean)
    runs = f"{found.own_runs} and {found.other_runs} runs"
    if found.verdict == "single run":
        few = "one run each" if found.own_runs == found.other_runs else runs
        return (
            f"{mean} ({few}, without common batches: no interval, so whether that is chance "
            "cannot be told)"
        )
    if found.interval is None:
        return f"{mean} ({runs}): no spread between seeds, so no interval"
    return interval_in_words(found, own=own, other=other, of=runs, comparisons=comparisons)
