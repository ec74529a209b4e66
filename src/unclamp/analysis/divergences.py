"""Where a loss rises slowly: divergences, apart from spikes, which are fast.

A spike is judged against the steps just before it, and a rise by 0.3 % a step is never far above
those. Here the level, the median of `LEVEL_POINTS` values, is compared with the lowest level so
far. Training lowers a loss; a level `RISE` above the lowest is a divergence.

What healthy runs do is left alone: noise (the limit is higher where levels differ much from one
block of values to the next), and a step to a new level, as of other data (a rise of which most
came within `STEP_POINTS` values is for `spikes`, and the level after it is the new lowest).

Causal, as `robust` is: nothing at a step depends on later ones.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from unclamp.analysis.curves import run_losses
from unclamp.analysis.groups import Group, has_kinds, kind_in_words, split_places
from unclamp.analysis.resolution import Resolution
from unclamp.analysis.robust import LONG, NORMAL_IQR, RunningWindow
from unclamp.files import strict
from unclamp.runlog import RunLog
from unclamp.written import times

LEVEL_POINTS = 31
RISE = 1.35
LEAST_RISE = math.log(RISE)
STEP_POINTS = 11
STEP_SHARE = 0.6
"""A rise of which so much, in logarithms, came at once is a step to a new level."""
BLOCKS = 32
FEWEST_BLOCKS = 4
SIGMAS = 8.0
"""The limit in standard deviations of the difference of two blocks' levels."""
GRID_STEPS = 4.0
END_SHARE = 0.5
START_SHARE = 0.15
"""The onset is where the level was last within so much of the limit above the lowest."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A slow rise of a series above the lowest level that it had reached.

    Levels are medians of the last `LEVEL_POINTS` values, so `peak`, `end` and `recovery` are late
    by about half as many.

    Attributes:
        onset: Last step at which the level was near the lowest, and half of `LEVEL_POINTS` values
            before, as a median is late.
        found: First step at which the rise could be told from noise and from a step.
        peak: Step of the highest level.
        end: Last step above; that of the data if the level never came back.
        recovery: First step after the end; None if it is not in the data.
        height: Highest level over lowest, a ratio.
        level: Lowest level before the onset, in the unit of the series.
        rate: Mean relative rise a step from the onset to where it was found: 0.003 is 0.3 %.
        series: "loss", or what the caller named it.
        group: The kind of batches that it is of; None for batches without a group.
    """

    onset: int
    found: int
    peak: int
    end: int
    recovery: int | None
    height: float
    level: float
    rate: float
    series: str = "loss"
    kind: Literal["drift"] = "drift"
    group: Group = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for strict JSON, with all keys of a spike; `number` is None.

        A divergence is no spike, so it has no number by which `unclamp explain` knows it.
        """
        return strict(asdict(self) | {"sigmas": None, "number": None})


def divergence_in_words(
    found: Divergence, *, name: str = "", at: Callable[[int], str] = lambda step: f"step {step:,}"
) -> str:
    """Say a slow rise in sentences: from where on, how fast, how far, and whether it came back.

    Args:
        found: The rise.
        name: Of the series; its own without it.
        at: Returns what people call a step.
    """
    back = "It did not come back" if found.recovery is None else f"Back at {at(found.recovery)}"
    among = "" if found.group is None else f" among {kind_in_words(found.group)}"
    return (
        f"{name or found.series}{among}: slow divergence from {at(found.onset)} on, by "
        f"{100 * found.rate:.2g} % a step: from {found.level:.4g} to {times(found.height)} that at "
        f"{at(found.peak)}. Found at {at(found.found)}. {back}."
    )


class DivergenceDetector:
    """Judges a series while it arrives: `update` once a value.

    Attributes:
        is_open: Whether a divergence goes on.
        level: Median of the last values; NaN before there are enough, and for a series that has
            been zero or below.
        lowest: The level that the rise is measured from; NaN likewise.
    """

    def __init__(self) -> None:
        """Start with an empty past."""
        self.is_open = False
        self.level = self.lowest = math.nan
        self._resolution = Resolution()
        self._has_ratios = True
        self._latest = RunningWindow(LEVEL_POINTS)
        self._new = RunningWindow(STEP_POINTS)
        self._old = RunningWindow(STEP_POINTS)
        self._passing: deque[float] = deque()
        self._largest_step = 0.0
        self._count = 0
        self._block_level = math.nan
        self._changes = RunningWindow(BLOCKS)

    def update(self, value: float) -> bool:
        """Return whether the series diverges at this value.

        Numerics: NaN and Inf change nothing. From a value of zero or below on, there is no ratio
        and nothing is found; a zero that was written with two decimals or more is half a step.
        """
        if not math.isfinite(value) or not self._has_ratios:
            return self.is_open
        self._resolution.add(value)
        value = self._resolution.unrounded(value)
        if value <= 0:
            self._has_ratios = self.is_open = False
            self.level = self.lowest = math.nan
            return False
        self._take(math.log(value))
        if self._count < LEVEL_POINTS:
            return False
        level = self._latest.median()
        self._judge(level)
        self.level, self.lowest = math.exp(level), math.exp(self._low)
        return self.is_open

    def _take(self, number: float) -> None:
        self._count += 1
        self._latest.add(number)
        self._new.add(number)
        self._passing.append(number)
        if len(self._passing) > STEP_POINTS:
            self._old.add(self._passing.popleft())
            if len(self._old.sorted) == STEP_POINTS:
                step = self._new.median() - self._old.median()
                self._largest_step = max(self._largest_step, step)
        if self._count % LEVEL_POINTS == 0:
            level = self._latest.median()
            if not math.isnan(self._block_level):
                self._changes.add(level - self._block_level)
            self._block_level = level

    def _judge(self, level: float) -> None:
        if self._count == LEVEL_POINTS or level <= self._low:
            self._restart(level)
            return
        limit = self._limit()
        if self.is_open:
            self.is_open = level - self._low > END_SHARE * self._open_limit
        elif level - self._low > limit:
            if self._largest_step > STEP_SHARE * (level - self._low):
                self._restart(level)
            else:
                self.is_open, self._open_limit = True, limit

    def _restart(self, level: float) -> None:
        self._low, self._largest_step, self.is_open = level, 0.0, False

    def _limit(self) -> float:
        changes = self._changes.sorted
        if len(changes) < FEWEST_BLOCKS:
            return math.inf
        count = len(changes)
        spread = (changes[(3 * count) // 4] - changes[count // 4]) / NORMAL_IQR
        grid = GRID_STEPS * self._resolution.grid / max(math.exp(self._low), 1e-300)
        return max(LEAST_RISE, SIGMAS * spread, math.log1p(grid))


def find_divergences(
    values: Sequence[float | None] | np.ndarray,
    *,
    steps: Sequence[int] | np.ndarray | None = None,
    groups: Sequence[Group] = (),
    series: str = "loss",
) -> list[Divergence]:
    """Return the slow rises of a positive series, in the order of their onsets.

    They are no spikes: `find_spikes` counts none of them, and a rise that both find is told by
    both, each in its own way. Meant for a loss: a healthy gradient norm may rise slowly.

    Args:
        values: One a step, such as losses. None is a missing value and left out.
        steps: Their step numbers, in order; 0, 1, ... without them.
        groups: The kind of each step's batch; each kind is judged as a series of its own. Without
            them all are of one kind.
        series: Name written into the divergences.

    Raises:
        ValueError: `steps` or `groups` and `values` differ in length.

    Numerics: NaN and Inf are left out. Series, or kinds, of fewer than 160 values, and what
    follows a value of zero or below, have none.

    Example:
        >>> loss = [2.0 + 0.01 * (i % 7) for i in range(600)]
        >>> loss += [2.0 * 1.003**i for i in range(400)]
        >>> [(d.kind, round(d.height, 1)) for d in find_divergences(loss)]
        [('drift', 3.1)]
    """
    at = np.arange(len(values)) if steps is None else np.asarray(steps, dtype=np.int64)
    if len(at) != len(values):
        raise ValueError(f"expected a step a value, got {len(at)} steps, {len(values)} values")
    if groups and len(groups) != len(values):
        raise ValueError(
            f"expected a group a value, got {len(groups)} groups, {len(values)} values"
        )
    if not has_kinds(groups):
        return _find(at, values, series)
    found = [
        replace(each, group=group)
        for group, places in split_places(groups).items()
        for each in _find(at[places], [values[i] for i in places], series)
    ]
    return sorted(found, key=lambda each: each.onset)


def _find(
    steps: np.ndarray, values: Sequence[float | None] | np.ndarray, series: str
) -> list[Divergence]:
    """Return the slow rises of batches of one kind."""
    there = np.array([value is not None for value in values], dtype=bool)
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    finite = np.isfinite(numbers)
    numbers, at = numbers[finite], np.asarray(steps, dtype=np.int64)[there][finite]
    is_open, levels, lows = _watch(numbers)
    inside = np.flatnonzero(is_open)
    if not len(inside):
        return []
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    return [_divergence(run, at.tolist(), levels, lows, series) for run in runs]


def _watch(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a detector says after each value: whether it is open, its level, its lowest."""
    if len(numbers) >= LONG:
        from unclamp.analysis import long_series  # noqa: PLC0415 - numba is slow to import

        return long_series.diverge(numbers)
    detector = DivergenceDetector()
    is_open = np.zeros(len(numbers), dtype=bool)
    levels, lows = np.empty((2, len(numbers)))
    for i, value in enumerate(numbers.tolist()):
        is_open[i] = detector.update(value)
        levels[i], lows[i] = detector.level, detector.lowest
    return is_open, levels, lows


def run_divergences(log: RunLog) -> list[Divergence]:
    """Return the slow rises of a run's loss, in order.

    Raises:
        AnalysisError: The run recorded neither loss nor gradient norm.
    """
    losses = run_losses(log)
    return find_divergences(losses.values, steps=losses.steps, groups=losses.groups)


def _divergence(
    run: np.ndarray, steps: list[int], levels: np.ndarray, lows: np.ndarray, series: str
) -> Divergence:
    found, stop = int(run[0]), int(run[-1]) + 1
    low = float(lows[found])
    near = low * (levels[found] / low) ** START_SHARE
    onset = int(np.flatnonzero(levels[:found] <= near)[-1])
    peak = found + int(np.argmax(levels[found:stop]))
    rise = math.log(levels[found] / levels[onset])
    return Divergence(
        onset=steps[max(0, onset - LEVEL_POINTS // 2)],
        found=steps[found],
        peak=steps[peak],
        end=steps[stop - 1],
        recovery=steps[stop] if stop < len(steps) else None,
        height=float(levels[peak]) / low,
        level=low,
        rate=math.expm1(rise / (steps[found] - steps[onset])),
        series=series,
    )
