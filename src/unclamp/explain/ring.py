"""Snapshots of a training in memory, with the batches and losses that followed.

The newest lie close together and older ones at growing distances, each about twice as far back as
the next: a spike can be asked about from shortly before, and from long before, which few states
allow. What grows with the distance are the batches in between. Holds what may become a file; what
makes it one is `snapshots`.
"""

import math
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from unclamp.errors import ReplayError
from unclamp.explain.ranks import ALONE, Ranks
from unclamp.explain.snapshot import Snapshot, check_keepable
from unclamp.explain.training import Batch, State, Training, size_bytes, take_state

GIB = 2**30


class _Held(NamedTuple):
    state: State
    facts: dict[str, Any]
    size: int
    number: int


class Ring:
    """States before steps, newest last, and every batch and loss from the oldest of them on.

    With states taken every n steps, `keep` of them reach 2 ** (keep - 2) * n steps back at least,
    and less than twice as far: the two newest are held, then for 2, 4, 8, ... the last but one of
    the states whose number it divides, and the last, which will be the last but one.

    Args:
        keep: States to hold.
        budget_bytes: Bytes that states and batches may take together; where it does not suffice,
            the oldest state goes that is not needed, and the batches from before the rest. One is
            held in any case, and those that are needed.
        ranks: Who holds theirs. What stays has to be the same on all of them, so the largest size
            on any of them counts; they tell each other when a state is taken, and batches since
            then count for nothing until the next.
    """

    def __init__(self, *, keep: int, budget_bytes: float, ranks: Ranks = ALONE) -> None:
        self._keep, self._budget, self._ranks = keep, budget_bytes, ranks
        self._states: dict[int, _Held] = {}
        self._batches: dict[int, tuple[Batch, int]] = {}
        self._losses: dict[int, float] = {}
        self._taken = 0
        self._newest_size = 0
        self._agreed = -1
        self._needed: AbstractSet[int] = frozenset()

    @property
    def steps(self) -> list[int]:
        """The steps before which a state is held, oldest first."""
        return list(self._states)

    @property
    def size(self) -> int:
        """The bytes of all states and batches."""
        states = sum(held.size for held in self._states.values())
        return states + self._size_of_batches(0)

    def hold(self, needed: AbstractSet[int]) -> None:
        """Let the states before these steps stay, whatever the budget, until the next call."""
        self._needed = needed

    def has_room(self) -> bool:
        """Whether a state as large as the last one fits beside those that have to stay."""
        needed = [step for step in self._states if step in self._needed]
        if not needed:
            return True
        states = sum(self._states[step].size for step in needed) + self._newest_size
        return states + self._size_of_batches(needed[0]) <= self._budget

    def _size_of_batches(self, first: int, last: float = math.inf) -> int:
        """Return the bytes of the batches of some steps, as far as the ranks have agreed on it."""
        last = min(last, self._agreed)
        return sum(size for n, (_, size) in self._batches.items() if first <= n <= last)

    def take(self, step: int, training: Training, facts: dict[str, Any]) -> bool:
        """Hold the training's state before a step, and return whether it fits.

        It always does where no other is needed.

        Raises:
            ReplayError: One state does not fit the budget, or cannot be kept.
        """
        state = self._ranks.together(lambda: _keepable_state(training))
        size = self._agree(step, size_bytes(state))
        if size > self._budget:
            raise ReplayError(
                f"a snapshot takes {size:,} bytes and the budget is {int(self._budget):,}: "
                f"raise budget_gib to {size / GIB:.3g} or more"
            )
        self._newest_size = size
        self._states[step] = _Held(state, facts, size, self._taken)
        wanted = _spread_out(self._taken, self._keep)
        self._taken += 1
        for old, held in list(self._states.items()):
            if held.number not in wanted and old not in self._needed:
                del self._states[old]
        self._fit()
        return step in self._states

    def add_batch(self, step: int, batch: Any) -> None:
        """Hold the batch of a step; it may be changed afterwards.

        Raises:
            ReplayError: It holds what a snapshot cannot keep.
        """
        if not self._batches:
            check_keepable(batch, "a batch")
        kept = Batch.of(batch)
        self._batches[step] = (kept, size_bytes(kept.tree))
        if not self._ranks.are_several:
            self._agreed = step
            self._fit()

    def _agree(self, step: int, size: int) -> int:
        """Return the size of the largest state on any rank; count batches likewise from now on."""
        if not self._ranks.are_several:
            return size
        own = {n: bytes_ for n, (_, bytes_) in self._batches.items() if n > self._agreed}
        held = step, sorted(self._states), sorted(self._needed)
        everyone = self._ranks.gathered((*held, own, size))
        if any(one[:3] != everyone[0][:3] for one in everyone):
            raise ReplayError(
                "the ranks differ in what their snapshots are to hold: call before, after and "
                "keep with the same steps on every rank"
            )
        for n in own:
            largest = max(sizes.get(n, 0) for _, _, _, sizes, _ in everyone)
            self._batches[n] = (self._batches[n][0], largest)
        self._agreed = max(own, default=self._agreed)
        return max(one[-1] for one in everyone)

    def size_of(self, step: int, *, last: int) -> int:
        """Return the bytes of a snapshot, as far as the ranks have agreed on it."""
        return self._states[step].size + self._size_of_batches(step, last)

    def add_loss(self, step: int, loss: float) -> None:
        """Hold the loss of a step."""
        self._losses[step] = loss

    def snapshot(self, step: int, *, last: int) -> Snapshot:
        """Return the state before `step` with what followed, up to `last`."""
        held = self._states[step]
        span = range(step, last + 1)
        return Snapshot(
            step=step,
            state=held.state,
            batches={n: self._batches[n][0] for n in span if n in self._batches},
            losses={n: self._losses[n] for n in span if n in self._losses},
            facts=held.facts,
        )

    def before(self, onset: int, *, lead: int) -> int | None:
        """Return the newest step with a state at least `lead` before an onset; else the oldest."""
        held = [step for step in self._states if step <= onset]
        early = [step for step in held if step <= onset - lead]
        return early[-1] if early else (held[0] if held else None)

    def older(self, step: int) -> list[int]:
        """Return the steps with a state before `step`, newest first."""
        return [held for held in reversed(self._states) if held < step]

    def batches_from(self, step: int) -> dict[int, Batch]:
        """Return the batches from a step on."""
        return {n: batch for n, (batch, _) in self._batches.items() if n >= step}

    def emptied(self) -> "Ring":
        """Return a ring of the same size that holds nothing."""
        return Ring(keep=self._keep, budget_bytes=self._budget, ranks=self._ranks)

    def _fit(self) -> None:
        """Let the oldest states go until the rest fits, and what came before the oldest."""
        self._trim()
        while len(self._states) > 1 and self.size > self._budget:
            free = next((step for step in self._states if step not in self._needed), None)
            if free is None:
                return
            del self._states[free]
            self._trim()

    def _trim(self) -> None:
        if not self._states:
            return
        oldest = next(iter(self._states))
        for kept in (self._batches, self._losses):
            for n in [n for n in kept if n < oldest]:
                del kept[n]


def _keepable_state(training: Training) -> State:
    state = take_state(training)
    check_keepable(state, "the training's state")
    return state


def _spread_out(newest: int, keep: int) -> set[int]:
    """Return which numbers of states to hold: `keep` at most, at growing distances."""
    numbers = {newest}
    for level in range(keep - 1):
        multiple = newest >> level
        numbers |= {multiple << level, (multiple - 1) << level}
    return numbers
