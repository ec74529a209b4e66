"""What the casts of Transformer Engine did, from the histories and scales that it keeps.

Between two optimizer steps a state is updated once a pass: `k` passes of microbatches (and, where
it does not ask for gradients, of evaluations) roll `k` amaxes into the history. How many it were
is found by where the newest amaxes of last time lie now. The scale of the first pass is the one
that was there last time; those of the others follow from the amaxes by Transformer Engine's own
rule, and are believed if they lead to the scale that is there now. No torch is used here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a state makes scales of amaxes.

    Attributes:
        length: Rows of the history, with that of the pass under way.
        largest: Where an amax is to land: the format's largest value over 2**margin.
        reduce: "max", "most_recent", or None for a function of a user's own.
        timing: As `State.timing`.
    """

    length: int
    largest: float
    reduce: Literal["max", "most_recent"] | None
    timing: Literal["after", "before"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of a state at a step.

    Attributes:
        newest: Its newest amaxes, newest first, `[rows, n]`; fewer than the history's rows.
        scale: Its scales, `[n]`.
    """

    newest: Array
    scale: Array


@dataclass(frozen=True, kw_only=True)
class Casts:
    """The casts of one state between two steps, one entry a column.

    Attributes:
        casts: How many there were; a tensor of zeros looks like no cast, and is none.
        amax: Largest finite one; NaN without.
        scale: Smallest scale that was used; NaN where none is known.
        clamped: 1 where an element was clamped, 0 where none was, -1 where nobody knows.
        nonfinite: Whether an amax was Inf or NaN.
        age: Updates since the amax that the last cast's scale comes from; -1 where not known.
        updates: Updates of the state.
    """

    casts: NDArray[np.int32]
    amax: Array
    scale: Array
    clamped: NDArray[np.int8]
    nonfinite: NDArray[np.bool_]
    age: NDArray[np.int32]
    updates: int


class Tracker:
    """Follows one state from step to step.

    Args:
        rule: How it makes scales.
        before: The state before the first step: all rows, newest first, and scales.
    """

    def __init__(self, rule: Rule, before: Reading) -> None:
        self.rule = rule
        self._past = before
        self._ring = np.zeros((rule.length, before.scale.size), np.float32)
        self._ring[: len(before.newest)] = before.newest
        self._age = np.full(before.scale.size, -1, np.int32)
        self._found(before.scale)

    @property
    def columns(self) -> int:
        """How many tensors it scales."""
        return self._past.scale.size

    def candidates(self, now: Reading) -> set[int]:
        """Return how many updates would explain what is there now; empty: none that is seen."""
        if self.rule.length == 1:
            return {1}
        rows = min(len(now.newest), len(self._past.newest))
        # What ranks have not reduced yet will be another number.
        skipped = int(self.rule.timing == "before" and bool(self._past.newest[:1].any()))
        is_same = np.array_equal(now.newest[:skipped], self._past.newest[:skipped], equal_nan=True)
        # A history of two rows shows one update and no more; it is taken for one.
        most = rows - skipped + (self.rule.length <= 2)
        return {
            k
            for k in range(0 if is_same else 1, most)
            if np.array_equal(
                now.newest[k + skipped : rows],
                self._past.newest[skipped : rows - k],
                equal_nan=True,
            )
        }

    def start_again(self, now: Reading) -> None:
        """Take what is there as it is: how it came to be is not known."""
        self._ring[:] = 0
        self._ring[: len(now.newest)] = now.newest
        self._age[:] = -1
        self._past = now
        self._found(now.scale)

    def advance(self, now: Reading, updates: int, limit: float) -> Casts:
        """Return the casts of so many updates; `limit` is the format's overflow limit."""
        if self.rule.length == 1 and self.rule.timing == "after":
            amaxes = self._from_scales(now)
        else:
            amaxes = now.newest[:updates][::-1]  # oldest first
        if self.rule.timing == "before" and updates < len(now.newest):
            self._ring[0] = now.newest[updates]  # ranks have reduced it since
        used, ages = self._scales_used(amaxes, now)
        self._past = now
        return _casts(amaxes, used, ages, limit)

    def _scales_used(self, amaxes: Array, now: Reading) -> tuple[Array, NDArray[np.int32]]:
        """Return the scale and its age at each cast; NaN where they are not known."""
        used, ages = np.empty_like(amaxes), np.empty(amaxes.shape, np.int32)
        scale = self._past.scale
        for i, amax in enumerate(amaxes):
            if self.rule.timing == "before":
                scale = self._next(scale)
            used[i], ages[i] = scale, self._age
            self._ring = np.roll(self._ring, 1, 0)
            self._ring[0] = amax
            if self.rule.timing == "after":
                scale = self._next(scale)
        if not len(amaxes):
            return used, ages
        if self.rule.timing == "before":
            known, used[-1] = _equal(used[-1], now.scale), now.scale
            used[:-1, ~known] = np.nan
        else:
            known = _equal(scale, now.scale)
            used[1:, ~known] = np.nan
            used[0] = self._past.scale
        self._age[~known] = -1
        return used, ages

    def _next(self, scale: Array) -> Array:
        """Return the scales that follow from the ring, and note their ages."""
        if self.rule.reduce is None:
            self._age[:] = -1
            return np.full_like(scale, np.nan)
        rows = self._ring if self.rule.reduce == "max" else self._ring[:1]
        amax = np.fmax.reduce(rows, 0)  # as its kernel does, which lets a NaN pass by
        is_told = np.isfinite(amax) & (amax > 0)
        newest = np.argmax(rows == amax, 0).astype(np.int32) + 1
        kept = np.where(self._age >= 0, self._age + 1, -1)
        self._age = np.where(is_told, newest, kept).astype(np.int32)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            found = np.minimum(np.float32(self.rule.largest) / amax, np.float32(FLOAT32_MAX))
        return np.where(is_told, found, scale).astype(np.float32)

    def _found(self, scale: Array) -> None:
        """Note the ages of scales that were found, where the ring explains them."""
        known = _equal(self._next(scale), scale)
        is_of_ring = np.fmax.reduce(self._ring, 0) > 0
        self._age[~(known & is_of_ring)] = -1

    def _from_scales(self, now: Reading) -> Array:
        """Return the amaxes of a history of one row, which an update has set to 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.float32(self.rule.largest) / now.scale
        is_first = (now.scale == 1) & (self._past.scale == 1)
        return np.where(is_first, 0, found).astype(np.float32)[None]


def _equal(found: Array, there: Array) -> NDArray[np.bool_]:
    return np.isclose(found, there, rtol=1e-6, atol=0)


def _casts(amaxes: Array, used: Array, ages: NDArray[np.int32], limit: float) -> Casts:
    is_cast = ~(amaxes == 0)
    is_finite = is_cast & np.isfinite(amaxes)
    is_known = ~np.isnan(used)
    with np.errstate(over="ignore", invalid="ignore"):
        clamps = is_finite & is_known & (amaxes * used > np.float32(limit))
    doubtful = (is_cast & ~is_finite) | (is_finite & ~is_known)
    clamped = np.where(clamps.any(0), 1, np.where(doubtful.any(0), -1, 0))
    n = amaxes.shape[1]
    last = np.full(n, -1, np.int32)
    for i in range(len(amaxes)):
        last = np.where(is_cast[i] & is_known[i], ages[i], last)
    return Casts(
        casts=is_cast.sum(0).astype(np.int32),
        amax=_extreme(np.fmax.reduce, amaxes, is_finite),
        scale=_extreme(np.fmin.reduce, used, is_cast & is_known),
        clamped=clamped.astype(np.int8),
        nonfinite=(is_cast & ~is_finite).any(0),
        age=last.astype(np.int32),
        updates=len(amaxes),
    )


def _extreme(reduce: Callable[..., Any], values: Array, where: NDArray[np.bool_]) -> Array:
    kept = np.where(where, values, np.nan)
    if not len(kept):
        return np.full(values.shape[1], np.nan, np.float32)
    return reduce(kept, 0).astype(np.float32)


def updates_of(
    forward: Sequence[set[int]], backward: Sequence[set[int]]
) -> tuple[int | None, int | None]:
    """Return how many updates the states of each direction have had since last time.

    All states of a direction are updated together, so that numbers which explain one state and not
    another are none. Of several the smallest counts that is not below the other direction's: a
    history of equal amaxes, as of a frozen layer, is explained by any number.

    Args:
        forward: `Tracker.candidates` of each forward state.
        backward: Of each backward state.
    """
    common = [_common(forward), _common(backward)]
    least = max((min(numbers) for numbers in common if numbers), default=0)
    both = [min((k for k in own if k >= least), default=min(own, default=None)) for own in common]
    return both[0], both[1]


def _common(sets: Sequence[set[int]]) -> set[int]:
    return set.intersection(*sets) if sets else set()
