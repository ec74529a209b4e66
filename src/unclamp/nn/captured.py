"""What a ledger keeps of updates that a CUDA graph replays.

A graph replays kernels and no Python: an update that was captured runs at each replay, and no
listener is called, no number on the host goes up. So the captured update writes what listeners
want into tensors that stay, and counts on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unclamp.nn.turns import Turn


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
        self._seen: dict[Turn, list[Tensor | None]] = {}

    def keep(self, turn: Turn, seen: Sequence[Tensor | None], *, counts: bool = True) -> None:
        """Write what an update sees where `seen` finds it; to be captured.

        A graph may hold several updates, each for a turn of its own. One that `counts` is a step.
        """
        self.is_in_graph = True
        kept = self._seen.get(turn) or [None] * len(seen)
        self._seen[turn] = [
            given if given is None or old is None else old.copy_(given)
            for given, old in zip(seen, kept, strict=True)
        ]
        self._replays += counts

    def seen(self) -> list[list[Tensor | None]]:
        """Return copies of what the updates of the last replay saw, in their order."""
        return [[None if t is None else t.clone() for t in seen] for seen in self._seen.values()]

    def count(self) -> int:
        """Return the number of replays; waits for the device if an update was captured."""
        return int(self._replays) if self._seen else 0

    def forget_count(self) -> None:
        """Start counting anew."""
        self._replays.zero_()
