"""Is a weight still the one that its scale is of?

A scale follows the weight from step to step. What something else writes (an average, an adapter
that is merged) shows in the version that torch counts for a tensor, which costs nothing to ask.
What is written through `.data` leaves no version; where it matters, a few elements show it.
"""

import weakref
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Doubt = Literal["guard", "own"] | None
"""How a weight is cast whose scale may be another weight's: with its own scale if it would clamp,
or in any case. None: by its scale."""

ELEMENTS = 256
"""How many elements of a weight are looked at."""
NO_VERSION = -1
"""Stands for a version that no tensor has."""


class Noted(NamedTuple):
    """A weight as its scale knows it: the tensor, None for a new copy of it, and its version."""

    weight: weakref.ref[Tensor] | None
    version: int


def noted(weight: Tensor) -> Noted | None:
    """Return what is known of a weight as it is now; None where its version says nothing."""
    own = parameter_of(weight)
    return None if own is None else Noted(weakref.ref(own), own._version)


def noted_in_a_copy(note: Noted | None) -> Noted:
    """Return what is known of the copy of a weight: a copied parameter has no past.

    Where the weight was written before it was copied, the scale is not the copy's either.
    """
    own = None if note is None or note.weight is None else note.weight()
    is_written = note is not None and (
        note.version == NO_VERSION
        or (note.weight is not None and (own is None or own._version != note.version))
    )
    return Noted(None, NO_VERSION if is_written else 0)


def is_other(note: Noted | None, weight: Tensor) -> bool:
    """Whether a weight is another one than was noted, or was written since; unknown: False."""
    own = parameter_of(weight)
    if note is None or own is None:
        return False
    is_held = note.weight is None or note.weight() is own
    return not is_held or own._version != note.version


def parameter_of(weight: Tensor) -> Tensor | None:
    """Return the parameter that a weight is; None for a shard, a view of several, a subclass.

    Their identity changes from forward to step, and no version says anything.
    """
    own = weight if weight._base is None else weight._base  # Conv1D's is turned
    return own if type(own) is nn.Parameter and not own.is_inference() else None


@torch.no_grad()
def some_of(weight: Tensor) -> Tensor:
    """Return a copy of some elements of a weight, spread evenly, for a device to compare.

    Selective checkpointing counts the operations of a forward, and refuses one that its second run
    alone has; a look at a weight is no part of either.
    """
    with _disable_current_modes():
        # A DTensor's own shard.
        local: Callable[[], Tensor] | None = getattr(weight, "to_local", None)
        flat = (weight if local is None else local()).detach().reshape(-1)
        return flat[:: max(len(flat) // ELEMENTS, 1)].clone()


class Origin:
    """The weight beside which scales came from elsewhere: in a copy, a load, a `refresh`.

    A copy that is meant to be old (the best model so far, a target network) is not written after
    that; an average is.
    """

    def __init__(self, note: Noted | None = None) -> None:
        self._note = note
        self._elements: Tensor | None = None

    def is_other(self, weight: Tensor) -> bool:
        """Whether the weight was written since, as far as its version says."""
        return is_other(self._note, weight)

    def is_written(self, weight: Tensor) -> bool:
        """Whether the weight was written since; waits for the device.

        What was written through `.data` shows if it is written again between two questions.
        """
        if is_other(self._note, weight):
            return True
        before, self._elements = self._elements, some_of(weight)
        return before is not None and not torch.equal(before, self._elements)
