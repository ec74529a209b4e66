"""Shifts within kinds of batches: a loss moves only to steps whose batch is of its own kind.

A site may clamp in one kind only, and that kind may spike, or be followed by a raised loss, for
reasons of its own. Moved to steps of other kinds, its losses would make any such site stand out.
Moved among its own, only that counts in which clamped batches differ from others of their kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.groups import Group, split_places
from unclamp.analysis.shifts import Shifts, make_shifts


@dataclass(frozen=True, kw_only=True)
class KindShifts:
    """The shifts of a run whose batches are of several kinds; to be used as `Shifts` are.

    Attributes:
        kinds: Of each kind the steps, rising, and its own shifts over these.
        kind: Of each step, the place of its kind.
        place: Of each step, its place among those of its kind.
        offsets: 0, 1, ..., a number a shift; 0 is what happened. A kind that has fewer shifts
            repeats them, what happened too, so that less is told of it.
    """

    kinds: tuple[tuple[NDArray[np.int64], Shifts], ...]
    kind: NDArray[np.int64]
    place: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def distinct(self) -> int:
        """How many shifts differ, in the kind in which most do."""
        return max(shifts.distinct for _, shifts in self.kinds)

    @property
    def period(self) -> int | None:
        """The rhythm of the spikes of a kind, in batches of the kind; None without any."""
        periods = [shifts.period for _, shifts in self.kinds if shifts.period is not None]
        return periods[0] if len(self.kinds) == 1 and periods else None

    def move(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where `positions` (any shape) are after each shift: an axis more, the last."""
        moved = np.empty((*positions.shape, len(self.offsets)), dtype=np.int64)
        for number, (steps, shifts) in enumerate(self.kinds):
            own = self.kind[positions] == number
            places = shifts.move(self.place[positions[own]])
            moved[own] = steps[places[..., self._used(shifts)]]
        return moved

    def steps_before(
        self, which: slice = slice(None), *, steps: NDArray[np.int64] | None = None
    ) -> NDArray[np.int32]:
        """Return, steps by shifts, which step of its kind each shift moves to a step.

        Args:
            which: Shifts to return.
            steps: Steps to return; all without it.
        """
        asked = np.arange(len(self.kind)) if steps is None else steps
        before = np.empty((len(asked), len(self.offsets[which])), dtype=np.int32)
        for number, (every, shifts) in enumerate(self.kinds):
            own = self.kind[asked] == number
            places = self.place[asked[own]]
            before[own] = every[shifts.steps_before(self._used(shifts)[which], steps=places)]
        return before

    def _used(self, shifts: Shifts) -> NDArray[np.int64]:
        return self.offsets % len(shifts.offsets)


def make_kind_shifts(
    onsets: NDArray[np.int64],
    activity: NDArray[np.float64],
    groups: Sequence[Group],
    *,
    limit: int,
    seed: int,
) -> KindShifts:
    """Return the shifts for a run with batches of several kinds; arguments as of `make_shifts`.

    Args:
        onsets: Indices of steps at which spikes begin, rising.
        activity: How much was clamped at each step.
        groups: The kind of each step's batch.
        limit: At most so many shifts.
        seed: Of their draw.
    """
    kind = np.empty(len(groups), dtype=np.int64)
    place = np.empty(len(groups), dtype=np.int64)
    kinds = []
    for number, own in enumerate(split_places(groups).values()):
        steps = np.array(own, dtype=np.int64)
        kind[steps], place[steps] = number, np.arange(len(steps))
        within = place[onsets[np.isin(onsets, steps)]]
        kinds.append((steps, make_shifts(within, activity[steps], limit=limit, seed=seed + number)))
    count = max(len(shifts.offsets) for _, shifts in kinds)
    return KindShifts(kinds=tuple(kinds), kind=kind, place=place, offsets=np.arange(count))
