"""Move one series in time against the others: the null distribution of an association.

Clamping and loss are both autocorrelated, so that a p-value which takes steps for independent is
wrong. Moving the loss and its spikes against the clamping of *all* sites by one and the same
shift keeps everything else as it was: the bursts of each site, the likeness of the sites, the
distances between spikes. What only time links is then broken, and nothing more.

Moves stay local. Early in training both clamping and spikes are dense; a shift over the whole
run would take early spikes into quiet times and call the rest evidence. Each step moves within
a neighbourhood of its own, and where that meets an end of the run it turns around inside it.
Spikes move by a clock that ticks with the clamping of all sites, so that they stay in times as
busy as their own.

The shift by 0 counts, and so do small ones, although true evidence shows in them as well:
leaving them out would make the test name too many.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

REACH_STEPS = 400
REACH_SHARE = 0.05
"""Shifts reach this many steps or this share of the run to either side, whichever is more."""
ACTIVITY_STEPS = 101
"""The clock follows clamping over so many steps: its trend, not single steps."""
TICKS = 10
"""Ticks of a step of average activity; a quiet one has at least 1."""
MIN_REGULAR = 3
"""Fewer spikes than this have no rhythm that could be told from chance."""
CHANCE_OF_RHYTHM = 0.01
MIN_PERIOD = 10
"""A shorter rhythm is no rhythm to a window of some lags."""


class Moves(Protocol):
    """What an association needs of shifts; the first one is what happened."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """One a shift."""
        ...

    def move(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where `positions` are after each shift."""
        ...

    def steps_before(
        self, which: slice = ..., *, steps: NDArray[np.int64] | None = None
    ) -> NDArray[np.int32]:
        """Return which step each shift moves to a step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shifts:
    """The shifts of one run.

    Attributes:
        offsets: In ticks of the clock; the first is 0, what happened.
        clock: The tick at which each step begins, strictly increasing.
        width: Ticks of a neighbourhood, within which steps move.
        reach: The same in steps, where they move evenly.
        distinct: How many steps a neighbourhood has, at the median spike: so many shifts differ.
        period: Distance of which all spikes are multiples apart; None without such a rhythm.
    """

    offsets: NDArray[np.int64]
    clock: NDArray[np.int64]
    width: int
    reach: int
    distinct: int
    period: int | None

    def move(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where `positions` (any shape) are after each shift: an axis more, the last."""
        ticks = self.clock[positions]
        low = _lowest(ticks, self.width, self.clock)[..., None]
        return _step_at(low + (ticks[..., None] - low + self.offsets) % self.width, self.clock)

    def steps_before(
        self,
        which: slice | NDArray[np.int64] = slice(None),
        *,
        steps: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int32]:
        """Return, steps by shifts, which step each shift moves to a step: evenly, in steps.

        For a series that is even by itself. The clock would stretch it where little is clamped
        and so take likeness from neighbours, which makes what happened look special.

        Args:
            which: Shifts to return; all of a long run fill gigabytes.
            steps: Steps to return; all without it.
        """
        count = len(self.clock) - 1
        positions = (np.arange(count) if steps is None else steps).astype(np.int32)[:, None]
        low = np.clip(positions - self.reach // 2, 0, count - self.reach).astype(np.int32)
        offsets = (self.offsets[which] * self.reach // self.width).astype(np.int32)
        before = (positions - low) - offsets
        before += np.int32(self.reach) * (before < 0)  # both are below reach: % in less memory
        before += low
        return before


def make_shifts(
    onsets: NDArray[np.int64], activity: NDArray[np.float64], *, limit: int, seed: int
) -> Shifts:
    """Return the shifts for a run with spikes at the indices `onsets`.

    Args:
        onsets: In increasing order; may be empty.
        activity: How much was clamped at each step, over all sites, in any unit.
        limit: At most so many shifts, drawn without replacement.
        seed: Of that draw.

    Spikes with a rhythm move within one period: beyond it the same comes again, and a long
    train that meets another rhythm by chance would look like evidence.
    """
    steps = len(activity)
    period = find_period(onsets)
    if period is None:
        clock, reach = _make_clock(activity), _wanted(steps)
        middle = onsets if len(onsets) else np.arange(steps)
        width = _find_width(clock, middle)
        distinct = int(np.median(_spans(clock, middle, width)))
    else:
        clock, width = np.arange(steps + 1), min(period, steps)
        distinct = reach = width
    others = np.arange(1, width)
    if width > limit:
        generator = np.random.default_rng(seed)
        others = np.sort(generator.choice(others, size=limit - 1, replace=False))
    offsets = np.concatenate([[0], others]).astype(np.int64)
    return Shifts(
        offsets=offsets, clock=clock, width=width, reach=reach, distinct=distinct, period=period
    )


def _wanted(steps: int) -> int:
    return min(steps, 2 * max(REACH_STEPS, round(REACH_SHARE * steps)) + 1)


def _make_clock(activity: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the tick at which each step begins, and last the end; busy steps take more."""
    half = ACTIVITY_STEPS // 2
    total = np.concatenate([[0.0], np.cumsum(activity)])
    ends = np.arange(len(activity))
    low, high = np.maximum(ends - half, 0), np.minimum(ends + half + 1, len(activity))
    smooth = (total[high] - total[low]) / (high - low)
    mean = smooth.mean() or 1.0
    ticks = np.maximum(1, np.round(TICKS * smooth / mean)).astype(np.int64)
    return np.concatenate([[0], np.cumsum(ticks)])


def _find_width(clock: NDArray[np.int64], middle: NDArray[np.int64]) -> int:
    """Return the least width that gives the median spike's neighbourhood enough steps."""
    wanted, ticks = _wanted(len(clock) - 1), int(clock[-1])
    width = min(ticks, wanted * TICKS)
    while width < ticks and np.median(_spans(clock, middle, width)) < wanted:
        width = min(ticks, width * 5 // 4)
    return width


def _spans(clock: NDArray[np.int64], positions: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    low = _lowest(clock[positions], width, clock)
    return _step_at(low + width - 1, clock) - _step_at(low, clock) + 1


def _lowest(ticks: NDArray[np.int64], width: int, clock: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the neighbourhoods of `ticks` begin: centred, but within the run."""
    return np.clip(ticks - width // 2, 0, clock[-1] - width)


def _step_at(ticks: NDArray[np.int64], clock: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(clock, ticks, side="right") - 1


def find_period(onsets: NDArray[np.int64]) -> int | None:
    """Return the largest distance of which all gaps between `onsets` are multiples, give or take 1.

    None where so many spikes would share such a distance by chance more often than one time in
    a hundred, and for fewer than three. Three at exactly equal gaps have a rhythm in any case:
    chance makes such gaps more often, but taking them for a rhythm only costs power.
    """
    if len(onsets) < MIN_REGULAR:
        return None
    gaps = np.diff(onsets)
    if len(gaps) + 1 == MIN_REGULAR and gaps[0] == gaps[1] >= MIN_PERIOD:
        return int(gaps[0])
    for divisor in range(1, int(gaps[0]) // MIN_PERIOD + 1):
        period = gaps[0] / divisor
        for slack in (0, 1):
            near = (2 * slack + 1) / period
            chance = divisor * near ** (len(gaps) - 1)
            off = np.abs(gaps - period * np.round(gaps / period))
            if chance < CHANCE_OF_RHYTHM and np.all(off <= slack + 0.5):
                return round(period)
    return None
