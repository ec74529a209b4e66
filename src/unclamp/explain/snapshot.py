"""A snapshot in memory, and as plain data beside its tensors.

The plain data hold dicts, lists and numbers with the names of tensors in their places, so that
reading them back runs no code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclamp.errors import ReplayError
from unclamp.explain.training import Batch, State, size_bytes

_TENSOR, _ARRAY = "unclamp tensor", "unclamp array"
_PLAIN = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training before a step, and what followed.

    Attributes:
        step: The step that comes next.
        state: `training.take_state`.
        batches: The batches of the steps from `step` on.
        losses: The losses of those steps.
        facts: What must be alike for a replay, as plain data: code, recipe, machine.
        path: Where it was read from.
    """

    step: int
    state: State
    batches: Mapping[int, Batch] = field(default_factory=dict)
    losses: Mapping[int, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def size(self) -> int:
        """The bytes of the state and of all batches."""
        batches = sum(size_bytes(batch.tree) for batch in self.batches.values())
        return size_bytes(self.state) + batches

    @property
    def last_step(self) -> int:
        """The last step that can be replayed: its batch and all before it are here."""
        last = self.step
        while last in self.batches and last in self.losses:
            last += 1
        return last - 1


def check_keepable(tree: Any, what: str) -> None:
    """Raise unless a tree can be written and read back.

    Raises:
        ReplayError: It holds an object of another kind than tensors, arrays, numbers and text in
            dicts, lists and tuples.
    """
    encode(tree, what, {})


def encode(tree: Any, what: str, tensors: dict[str, Tensor]) -> Any:
    """Return the tree with its tensors moved to `tensors`; `decode` brings them back.

    Raises:
        ReplayError: As `check_keepable`.
    """
    if isinstance(tree, Tensor):
        key = f"t{len(tensors):06d}"
        tensors[key] = tree.detach().contiguous()
        return {_TENSOR: key}
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
        return {_ARRAY: encode(torch.from_numpy(tree), what, tensors)}
    if isinstance(tree, dict):
        return {key: encode(v, f"{what}, {key!r}", tensors) for key, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([encode(v, what, tensors) for v in tree])
    if type(tree) in _PLAIN:
        return tree
    if isinstance(tree, np.generic):
        return tree.item()
    raise ReplayError(
        f"expected tensors, arrays, numbers and text in dicts, lists and tuples for {what}, got "
        f"{type(tree).__name__}: a snapshot cannot keep it, give it as plain data"
    )


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree with its tensors in place."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _ARRAY in tree:
            return decode(tree[_ARRAY], tensors).numpy()
        return {key: decode(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(decode(value, tensors) for value in tree)
    return tree
