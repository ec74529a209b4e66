"""The loss of a step on several ranks: the mean over them, the same on all.

What decides whether there is a spike has to be equal on all ranks, to the bit, for each of them
writes its part of a snapshot. So they meet once a step: of each rank its loss, the kind of its
batch and how many snapshots it failed to write go to all. Where losses are averaged already that
changes nothing. On a GPU they meet there, and it is read a step later.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unclamp.explain.ranks import Ranks, mean_of
from unclamp.explain.watch import Late, checked_loss

_LOSS, _KIND, _FAILURES = range(3)


class Told(NamedTuple):
    """What was heard of a step: this rank's loss, whether kinds are alike, and who failed anew."""

    own: float
    is_one_kind: bool
    failed: tuple[int, ...]


class SharedLoss:
    """Reads the losses of all ranks, as `LateLoss` does those of one.

    Args:
        ranks: Who meets; each of them at every step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._late = ranks, Late()
        self._kind, self._failures = 0, 0
        self._known = [0] * ranks.count
        self._told: dict[int, Told] = {}

    def say(self, *, kind: str | None, failures: int) -> None:
        """Set what the next meeting tells besides: the batch's kind, and failures so far."""
        self._kind, self._failures = _number_of(kind), failures

    def put(self, step: int, loss: Tensor | float) -> list[tuple[int, float]]:
        """Take this rank's loss; return the mean losses that can be read now.

        Raises:
            ReplayError: As `loss_number`.
        """
        checked = checked_loss(loss)
        if isinstance(checked, Tensor) and _meets_on(checked.device):
            own = checked.detach().reshape(()).double()
            rest = own.new_tensor([self._kind, self._failures])
            row = torch.cat([own.reshape(1), rest])
            table = row.new_empty(self._ranks.count, len(row))
            dist.all_gather_into_tensor(table, row)
            return self._heard(self._late.put(step, table))
        number = float(checked.detach()) if isinstance(checked, Tensor) else float(checked)
        row = torch.tensor([number, self._kind, self._failures], dtype=torch.float64)
        return [*self.rest(), *self._heard([(step, self._ranks.table(row))])]

    def rest(self) -> list[tuple[int, float]]:
        """Return all mean losses that were not read yet; nobody meets for that."""
        return self._heard(self._late.rest())

    def told(self, step: int) -> Told:
        """Return what else was heard of a step whose loss was returned; once."""
        return self._told.pop(step)

    def _heard(self, tables: list[tuple[int, Tensor]]) -> list[tuple[int, float]]:
        means = []
        for step, table in tables:
            losses, kinds, failures = table.t().tolist()
            failed = [r for r, n in enumerate(failures) if n > self._known[r]]
            self._known = [int(n) for n in failures]
            self._told[step] = Told(losses[self._ranks.rank], len(set(kinds)) == 1, tuple(failed))
            means.append((step, mean_of(losses)))
        return means


def _meets_on(device: torch.device) -> bool:
    """Whether the training's own process group can carry a device's tensors without the host."""
    return device.type == "cuda" and "cuda:nccl" in str(dist.get_backend_config())


def _number_of(kind: str | None) -> int:
    """Return a whole number that float64 holds, another for each kind."""
    if kind is None:
        return 0
    return int.from_bytes(hashlib.blake2b(kind.encode(), digest_size=6).digest(), "little")
