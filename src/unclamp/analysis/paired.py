"""Do two arms differ, given the same seeds and batches? A paired Student t-interval. Torch-free.

Two arms of a study start from the same weights and see the same batches, so most of what makes
one seed's loss higher than another's is in both and falls out of their difference. What is left
varies from seed to seed. One standard deviation of it, however, says little about its mean: over
three seeds the 95 % interval reaches 2.48 standard deviations to either side, and a mean that is
just outside of one comes up in almost every fourth study of two equal arms.

Which runs make a pair, and which arms are compared, is for the caller.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from unclamp.errors import AnalysisError
from unclamp.written import signed

LEVEL = 0.95
ROUNDING = 4 * float(np.finfo(np.float64).eps)
"""Differences whose spread is below this share of the values do not vary: it is rounding."""

Verdict = Literal["differs", "not distinguishable", "one pair", "not finite", "equal", "constant"]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean of own minus other over pairs, and what so many pairs can show of it.

    Attributes:
        pairs: Pairs that were given, count.
        own_nonfinite: Pairs whose own value is NaN or Inf, count.
        other_nonfinite: Pairs whose other value is, count.
        mean: Mean difference, in the unit of the values; NaN if any value is not finite.
        interval: Ends of the t-interval of the mean; None where there is none.
        level: Share of intervals that hold the true mean, if differences are normal.
        verdict: `differs` where the interval leaves out 0, else `not distinguishable`. Where
            there is no interval, why: `one pair`; `not finite`, for a mean over the others would
            favour the arm that diverges; `equal`, every difference is 0; `constant`, every one
            is the same other number, as of values with few digits, whose spread says nothing.
    """

    pairs: int
    own_nonfinite: int
    other_nonfinite: int
    mean: float
    interval: tuple[float, float] | None
    level: float
    verdict: Verdict

    @property
    def resolution(self) -> float:
        """Half the interval: a mean beyond it would be told from 0; NaN without an interval.

        This is for the spread that was seen. Of true differences of that very size about half
        show; smaller ones may still be there.
        """
        if self.interval is None:
            return math.nan
        return (self.interval[1] - self.interval[0]) / 2

    def differs_among(self, comparisons: int) -> bool:
        """Return whether the mean is told from 0 with so many comparisons counted (Bonferroni).

        Any of several intervals may leave out 0 by chance, so each must do so at its level's
        share of the error, `(1 - level) / comparisons`.

        Example:
            >>> found = paired_difference([2.5, 2.61, 2.42], [2.4, 2.5, 2.33])
            >>> found.differs_among(1), found.differs_among(100)
            (True, False)
        """
        if self.interval is None or self.verdict != "differs":
            return False
        from scipy.special import stdtr, stdtrit  # noqa: PLC0415  # slow to load, seldom needed

        free = self.pairs - 1
        statistic = abs(self.mean) / self.resolution * float(stdtrit(free, (1 + self.level) / 2))
        return 2 * float(stdtr(free, -statistic)) * comparisons <= 1 - self.level


def paired_difference(
    own: Sequence[float], other: Sequence[float], *, level: float = LEVEL
) -> PairedDifference:
    """Return the mean of `own - other` with its paired t-interval.

    Args:
        own: A value for each pair, such as an arm's final loss for each seed.
        other: What it is compared with, in the same order.
        level: Of the interval, a fraction; for several comparisons each has this level.

    Raises:
        AnalysisError: No pair, values without a partner, or a level that is none.

    Numerics: NaN and Inf are counted, and then there is no mean and no interval.
    """
    if not 0 < level < 1:
        raise AnalysisError(f"the level of an interval is between 0 and 1, got {level!r}")
    if len(own) != len(other) or not own:
        raise AnalysisError(f"expected pairs of values, got {len(own)} and {len(other)} values")
    mine, theirs = np.array(own, np.float64), np.array(other, np.float64)
    lost_own, lost_other = (int(np.sum(~np.isfinite(side))) for side in (mine, theirs))
    mean, interval, verdict = math.nan, None, "not finite"
    if not lost_own and not lost_other:
        differences = mine - theirs
        mean = float(differences.mean())
        verdict = _without_interval(differences, float(np.abs([mine, theirs]).max()))
        if verdict is None:
            interval = _t_interval(differences, level)
            verdict = "not distinguishable" if interval[0] <= 0 <= interval[1] else "differs"
    return PairedDifference(
        pairs=len(own),
        own_nonfinite=lost_own,
        other_nonfinite=lost_other,
        mean=mean,
        interval=interval,
        level=level,
        verdict=verdict,
    )


def _without_interval(differences: np.ndarray, largest: float) -> Verdict | None:
    """Return why finite differences of values up to `largest` have no interval, or None."""
    if len(differences) == 1:
        return "one pair"
    if not differences.any():
        return "equal"
    return "constant" if differences.std(ddof=1) <= ROUNDING * largest else None


def _t_interval(differences: np.ndarray, level: float) -> tuple[float, float]:
    from scipy.special import stdtrit  # noqa: PLC0415  # a third of a second, and seldom needed

    count = len(differences)
    quantile = float(stdtrit(count - 1, (1 + level) / 2))
    half = quantile * float(differences.std(ddof=1)) / math.sqrt(count)
    mean = float(differences.mean())
    return mean - half, mean + half


def difference_in_words(
    found: PairedDifference, *, own: str, other: str, comparisons: int = 1
) -> str:
    """Say a difference over seeds, and what so many seeds can show; no full stop at its end.

    With `comparisons`, how many were made in all, it is called one only if it remains one with
    all of them counted.

    Example:
        >>> found = paired_difference([2.50, 2.61, 2.42], [2.51, 2.61, 2.43])
        >>> difference_in_words(found, own="delayed", other="dynamic")
        '-0.00667 (95 %: -0.021 to +0.00768): not distinguishable with 3 seeds (a difference over \
0.014 would show)'
    """
    seeds = f"{found.pairs} seeds"
    if found.verdict == "not finite":
        return f"unknown: {_diverged(found, own, other)}"
    if found.verdict == "equal":
        return f"0 with each of {seeds}: equal in every digit"
    mean = signed(found.mean)
    if found.verdict == "one pair":
        return f"{mean} (one seed: no interval, so whether that is chance cannot be told)"
    if found.interval is None:
        return f"{mean} with each of {seeds}: no spread between seeds, so no interval"
    return interval_in_words(found, own=own, other=other, of=seeds, comparisons=comparisons)


class _Difference(Protocol):
    """A mean difference with its interval, of pairs or of groups."""

    @property
    def mean(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float] | None: ...
    @property
    def level(self) -> float: ...
    @property
    def verdict(self) -> str: ...
    @property
    def resolution(self) -> float: ...
    def differs_among(self, comparisons: int) -> bool: ...


def interval_in_words(
    found: _Difference,
    *,
    own: str,
    other: str,
    of: str,
    comparisons: int,
) -> str:
    """Say a difference that has an interval, and what `of` so many runs it is; no full stop."""
    assert found.interval is not None
    low, high = map(signed, found.interval)
    said = f"{signed(found.mean)} ({100 * found.level:g} %: {low} to {high}): "
    if found.differs_among(comparisons):
        return f"{said}{own} differs from {other}, as far as {of} can show"
    if found.verdict == "differs":
        return f"{said}apart, which among {comparisons} comparisons may be chance"
    would_show = f"a difference over {found.resolution:.2g} would show"
    return f"{said}not distinguishable with {of} ({would_show})"


def _diverged(found: PairedDifference, own: str, other: str) -> str:
    counts = ((own, found.own_nonfinite), (other, found.other_nonfinite))
    if found.pairs == 1:
        lost = " and ".join(name for name, count in counts if count)
        return f"with the only seed the loss of {lost} is not finite"
    lost = " and ".join(f"that of {name} with {count}" for name, count in counts if count)
    return f"of {found.pairs} seeds the loss is not finite, {lost}"


def comparisons_in_words(made: int, other: str) -> list[str]:
    """Say how many intervals were looked at, if several: what is claimed counts all of them."""
    if made < 2:
        return []
    return [
        f"{made} comparisons with {other} were made; what is called a difference here remains one "
        f"with all of them counted (Bonferroni, {100 * LEVEL:g} %)."
    ]
