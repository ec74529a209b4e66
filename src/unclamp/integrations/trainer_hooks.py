"""Methods of one trainer that something stands in front of, and what a trainer says of a step.

Nothing here imports transformers: a trainer is anything with its attributes.
"""

import functools
from collections.abc import Callable
from typing import Any


class Replaced:
    """Methods of one object that others stand in front of; the class stays as it is.

    Args:
        owner: The object whose methods these are, unless another is named.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, name: str, front: Callable[..., Any], *, on: Any = None) -> None:
        """Have `front(plain, *args)` called in place of a method, which it gets as `plain`."""
        owner = self._owner if on is None else on
        plain = getattr(owner, name)
        self._before.append((owner, name, owner.__dict__.get(name)))

        @functools.wraps(plain)
        def called(*args: Any, **named: Any) -> Any:
            return front(plain, *args, **named)

        setattr(owner, name, called)

    def restore(self) -> None:
        """Put back what was there."""
        while self._before:
            owner, name, before = self._before.pop()
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class Said:
    """The scalars of one step that a trainer of TRL collects for its next log.

    They are means over the micro-batches, as TRL logs them. TRL's trainers keep lists in
    `_metrics["train"]`, which they empty when they log; other trainers have none.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._seen: dict[str, tuple[list[Any], int]] = {}

    def begin(self) -> None:
        """Be before a step's first micro-batch: what is there by now is of earlier steps."""
        self._seen = {name: (values, len(values)) for name, values in self._lists().items()}

    def take(self) -> dict[str, float]:
        """Return what was added since."""
        found: dict[str, float] = {}
        for name, values in self._lists().items():
            before, count = self._seen.get(name, (values, 0))
            new = values[count:] if before is values else values  # or a new list in its place
            if new and all(isinstance(each, int | float) for each in new):
                found[name] = sum(new) / len(new)
        return found

    def _lists(self) -> dict[str, list[Any]]:
        metrics = getattr(self._trainer, "_metrics", None)
        lists = metrics.get("train") if isinstance(metrics, dict) else None
        if not isinstance(lists, dict):
            return {}
        return {name: values for name, values in lists.items() if isinstance(values, list)}


def learning_rate(trainer: Any) -> float | None:
    """Return the learning rate of the step that was just made, as Trainer logs it."""
    try:
        return float(trainer._get_learning_rate())
    except AttributeError:
        return None
