"""The newest snapshots of a training in memory, with the batches and losses that followed.

Holds what may become a file; what makes it one is `snapshots`.
"""

from typing import Any

from unclamp.errors import ReplayError
from unclamp.explain.snapshot import Snapshot, check_keepable
from unclamp.explain.training import Batch, State, Training, size_bytes, take_state

GIB = 2**30


class Ring:
    """States before steps, newest last, and every batch and loss from the oldest of them on.

    Args:
        keep: States to hold.
        budget_bytes: Bytes that states and batches may take; fewer states are held, at least one.
    """

    def __init__(self, *, keep: int, budget_bytes: float) -> None:
        self._keep, self._budget = keep, budget_bytes
        self._states: dict[int, tuple[State, dict[str, Any]]] = {}
        self._batches: dict[int, Batch] = {}
        self._losses: dict[int, float] = {}

    @property
    def steps(self) -> list[int]:
        """The steps before which a state is held, oldest first."""
        return list(self._states)

    def take(self, step: int, training: Training, facts: dict[str, Any]) -> None:
        """Hold the training's state before a step.

        Raises:
            ReplayError: One state does not fit the budget, or cannot be kept.
        """
        state = take_state(training)
        check_keepable(state, "the training's state")
        needed = size_bytes(state)
        if needed > self._budget:
            raise ReplayError(
                f"a snapshot takes {needed:,} bytes and the budget is {int(self._budget):,}: "
                f"raise budget_gib to {needed / GIB:.3g} or more"
            )
        self._states[step] = (state, facts)
        fits = int((self._budget - self._batch_bytes) // needed)
        while len(self._states) > max(1, min(self._keep, fits)):
            self._states.pop(next(iter(self._states)))
        self._trim()

    @property
    def _batch_bytes(self) -> int:
        return sum(size_bytes(batch.tree) for batch in self._batches.values())

    def add_batch(self, step: int, batch: Any) -> None:
        """Hold the batch of a step; it may be changed afterwards.

        Raises:
            ReplayError: It holds what a snapshot cannot keep.
        """
        if not self._batches:
            check_keepable(batch, "a batch")
        self._batches[step] = Batch.of(batch)

    def add_loss(self, step: int, loss: float) -> None:
        """Hold the loss of a step."""
        self._losses[step] = loss

    def snapshot(self, step: int, *, last: int) -> Snapshot:
        """Return the state before `step` with what followed, up to `last`."""
        state, facts = self._states[step]
        span = range(step, last + 1)
        return Snapshot(
            step=step,
            state=state,
            batches={n: self._batches[n] for n in span if n in self._batches},
            losses={n: self._losses[n] for n in span if n in self._losses},
            facts=facts,
        )

    def before(self, onset: int, *, lead: int) -> int | None:
        """Return the newest step with a state at least `lead` before an onset; else the oldest."""
        held = [step for step in self._states if step <= onset]
        early = [step for step in held if step <= onset - lead]
        return early[-1] if early else (held[0] if held else None)

    def batches_from(self, step: int) -> dict[int, Batch]:
        """Return the batches from a step on."""
        return {n: batch for n, batch in self._batches.items() if n >= step}

    def emptied(self) -> "Ring":
        """Return a ring of the same size that holds nothing."""
        return Ring(keep=self._keep, budget_bytes=self._budget)

    def _trim(self) -> None:
        oldest = min(self._states)
        self._batches = {n: batch for n, batch in self._batches.items() if n >= oldest}
        self._losses = {n: loss for n, loss in self._losses.items() if n >= oldest}
