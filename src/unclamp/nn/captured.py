"""What a ledger keeps of updates that a CUDA graph replays.

A graph replays kernels and no Python: an update that was captured runs at each replay, and no
listener is called, no number on the host goes up. So the captured update writes what listeners
want into tensors that stay, and counts on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Captured:
    """Statistics of the last replay, and the number of replays.

    Attributes:
        is_in_graph: Whether commits or updates are part of a graph; the host then cannot know
            whether something is pending.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device) -> None:
        self.is_in_graph = False
        self._replays = torch.zeros((), dtype=torch.int64, device=device)
        self._seen: list[Tensor | None] | None = None

    def keep(self, seen: Sequence[Tensor | None]) -> None:
        """Write what an update sees where `seen` finds it, and count; to be captured."""
        self.is_in_graph = True
        kept = self._seen or [None] * len(seen)
        self._seen = [
            given if given is None or old is None else old.copy_(given)
            for given, old in zip(seen, kept, strict=True)
        ]
        self._replays += 1

    def seen(self) -> list[Tensor | None] | None:
        """Return copies of what the last replay saw; None where no update was captured."""
        if self._seen is None:
            return None
        return [None if t is None else t.clone() for t in self._seen]

    def count(self) -> int:
        """Return the number of replays; waits for the device if an update was captured."""
        return 0 if self._seen is None else int(self._replays)

    def forget_count(self) -> None:
        """Start counting anew."""
        self._replays.zero_()
