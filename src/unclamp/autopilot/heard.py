"""What an autopilot hears from one ledger: the shared amaxes of each update, on the host.

On a device that computes on its own nobody waits for the amaxes: they are on their way to the host
while the next step runs, and are read with that, one step late.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclamp.nn.ledger import Ledger
from unclamp.nn.update import Update

MOST_WAITING = 64
"""Updates that are kept for an autopilot that is not asked; older ones are forgotten."""


class _Sent(NamedTuple):
    """Amaxes on their way to the host; they are there when the event has happened."""

    amaxes: Tensor
    arrived: torch.cuda.Event | None


class Heard:
    """The amaxes of some sites of a ledger, an update at a time.

    Args:
        ledger: Whose updates.
        sites: Which sites, in the order in which amaxes are returned.
        is_late: Whether amaxes are read one step after they were measured.
    """

    def __init__(self, ledger: Ledger, sites: Sequence[int], *, is_late: bool) -> None:
        self.ledger, self.sites, self.is_late = ledger, list(sites), is_late
        self._waiting: deque[_Sent] = deque(maxlen=MOST_WAITING)
        self._before: tuple[int, Sequence[_Sent]] = (0, ())
        self._rows: tuple[object, Tensor] | None = None
        self._end = ledger.subscribe(self._hear)

    def take(self, step: int) -> list[tuple[int, np.ndarray]]:
        """Return step and amaxes of each update since the last call, oldest first.

        Amaxes are float32 `[sites]`. Where they come late, those of the call before are returned.

        Args:
            step: The number of the step that was just made.
        """
        newest, self._waiting = (step, self._waiting), deque(maxlen=MOST_WAITING)
        ready = newest
        if self.is_late:
            ready, self._before = self._before, newest
        found = []
        for amaxes, arrived in ready[1]:
            if arrived is not None:
                arrived.synchronize()  # of the step before: it is there
            found.append((ready[0], amaxes.numpy()))
        return found

    def close(self) -> None:
        """Hear no more."""
        self._end()

    @torch.no_grad()
    def _hear(self, update: Update) -> None:
        assert update.newest is not None
        amaxes = update.newest.index_select(0, self._rows_now())
        if amaxes.device.type == "cpu":
            self._waiting.append(_Sent(amaxes, None))
            return
        is_cuda = amaxes.device.type == "cuda"
        here = torch.empty(amaxes.shape, dtype=amaxes.dtype, pin_memory=is_cuda)
        here.copy_(amaxes, non_blocking=is_cuda)
        event = torch.cuda.Event() if is_cuda else None
        if event is not None:
            event.record()
        self._waiting.append(_Sent(here, event))

    def _rows_now(self) -> Tensor:
        """Return the row of each site; a switch may have moved them."""
        layout = self.ledger.layout
        if self._rows is None or self._rows[0] is not layout:
            rows = torch.tensor([layout.first_row[i] for i in self.sites], dtype=torch.int64)
            self._rows = (layout, rows.to(self.ledger.scale.device))
        return self._rows[1]
