"""What a tensor comes from, followed through views, casts and arithmetic by its storage.

A tensor is a *weight* if it is a parameter or a buffer, or was made of such alone: a cast under
autocast, a slice of a bank, the product of a weight norm. The *scores* of attention are what came
of a product of two activations, its *chances* what a softmax made of scores.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SOFTMAXES = ("_softmax", "_safe_softmax", "softmax")
LOOKUPS = ("embedding",)
"""What they return depends on the batch, whatever they read."""


@dataclass(frozen=True)
class Mark:
    """What a tensor comes from.

    Attributes:
        kind: Which of the three.
        names: Of a weight: the names that its parameter or buffer has; several if it is tied.
        source: Of scores and chances: the product they came of.
    """

    kind: Literal["weight", "scores", "chances"]
    names: tuple[str, ...] = ()
    source: Any = None


class Marks:
    """The marks of storages. A weak reference keeps a storage's address from another's use."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[StorageWeakRef, Mark]] = {}

    def put(self, tensor: Tensor, mark: Mark) -> None:
        """Mark a tensor's storage."""
        ref = _storage(tensor)
        if ref is not None:
            self._marks[ref.cdata] = (ref, mark)

    def of(self, tensor: Tensor) -> Mark | None:
        """Return a tensor's mark; None without one."""
        address = storage_of(tensor)
        found = None if address is None else self._marks.get(address)
        return None if found is None else found[1]

    def follow(self, name: str, inputs: Sequence[Tensor], outputs: Iterable[Tensor]) -> None:
        """Mark what an operator that is no product made, as its inputs are marked."""
        marks = [self.of(x) for x in inputs]
        attention = next((m for m in marks if m is not None and m.kind != "weight"), None)
        made: Mark | None = None
        if attention is not None:
            is_soft = name in SOFTMAXES or attention.kind == "chances"
            made = Mark("chances" if is_soft else "scores", source=attention.source)
        elif marks and name not in LOOKUPS:
            floats = [m for x, m in zip(inputs, marks, strict=True) if x.is_floating_point()]
            made = floats[0] if floats and all(floats) else None
        if made is not None:
            for output in outputs:
                if self.of(output) is None:
                    self.put(output, made)


def storage_of(tensor: Tensor) -> int | None:
    """Return what tells a tensor's storage from others that are alive; None if it has none."""
    ref = _storage(tensor)
    return None if ref is None else ref.cdata


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    local: Any = getattr(tensor, "_local_tensor", tensor)
    try:
        return StorageWeakRef(local.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse, nested
        return None
