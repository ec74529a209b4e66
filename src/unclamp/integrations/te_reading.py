"""Reading Transformer Engine's states at a step: one copy on the device, and nothing waited for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unclamp.integrations.te_histories import Reading
from unclamp.integrations.te_layouts import State


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What was copied of some states on one device, to be read on another thread."""

    states: list[State]
    rows: list[int]
    values: Tensor
    event: torch.cuda.Event | None = None

    def readings(self) -> list[tuple[State, Reading]]:
        """Return what was copied, on the host; this is where the device is waited for."""
        if self.event is not None:
            self.event.synchronize()
        flat, at, found = self.values.cpu().numpy(), 0, []
        for state, rows in zip(self.states, self.rows, strict=True):
            n = state.scale.numel()
            part = flat[at : at + (rows + 1) * n].reshape(rows + 1, n).astype(np.float32)
            # From old to new in memory; row 0 is the newest where updates come before a pass.
            newest = part[:rows]
            if state.timing == "before":
                newest = np.concatenate([newest[:1], newest[1:][::-1]])
            else:
                newest = newest[::-1]
            found.append((state, Reading(newest=newest, scale=part[rows])))
            at += (rows + 1) * n
        return found


@dataclass
class Reader:
    """Copies histories' newest rows and the scales of all states.

    Attributes:
        most: Newest amaxes that are copied of each history.
    """

    most: int
    _views: dict[int, tuple[Tensor, Tensor, list[Tensor], int]] = field(default_factory=dict)

    def read(self, states: Sequence[State], *, whole: bool = False) -> list[Copied]:
        """Return copies of the states, one a device; of all rows if `whole`."""
        devices: dict[torch.device, list[State]] = {}
        for state in states:
            devices.setdefault(state.history.device, []).append(state)
        return [self._read(own, whole=whole) for own in devices.values()]

    def _read(self, states: list[State], *, whole: bool) -> Copied:
        views, rows = [], []
        for state in states:
            own, count = self._view(state, whole=whole)
            views += own
            rows.append(count)
        with torch.no_grad():
            values = torch.cat(views)  # on the stream that trains, after what it has queued
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return Copied(states=states, rows=rows, values=values, event=event)

    def _view(self, state: State, *, whole: bool) -> tuple[list[Tensor], int]:
        """Return flat views of the newest rows and of the scales, and how many rows they are.

        They are kept as long as the state has the same tensors: early 1.x makes others.
        """
        history, scale = state.history, state.scale
        known = self._views.get(id(state.tensors))
        if known is not None and not whole and known[0] is history and known[1] is scale:
            return known[2], known[3]
        views, rows = _newest(state, None if whole else self.most)
        if not whole:
            self._views[id(state.tensors)] = (history, scale, views, rows)
        return views, rows


def _newest(state: State, most: int | None) -> tuple[list[Tensor], int]:
    history, length = state.history.detach(), len(state.history)
    scale = state.scale.detach().reshape(-1)
    count = length - 1 if most is None else min(most, length - 1)
    tail = history[length - count :].reshape(-1)
    if state.timing == "before":
        return [history[0].reshape(-1), tail, scale], count + 1
    return [tail, scale], count
