"""Losses as they come: read without making a GPU wait, and watched for spikes."""

import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclamp.analysis.spikes import LEVEL_POINTS, SPREAD_POINTS, Spike, find_spikes

MIN_HEIGHT = 1.1
"""Least ratio of a spike to the level, as in `find_spikes`."""
HISTORY = LEVEL_POINTS + SPREAD_POINTS + 51
"""Losses that the search for a spike looks at: its own windows, and room for spikes in them."""


class SpikeWatch:
    """Finds spikes in losses as they come; the definition is that of `find_spikes`."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=HISTORY)
        self._values: deque[float] = deque(maxlen=HISTORY)

    def hear(self, step: int, value: float) -> int | None:
        """Return the onset if a spike begins with this loss; None otherwise."""
        recent = [v for v in list(self._values)[-LEVEL_POINTS:] if math.isfinite(v)]
        self._steps.append(step)
        self._values.append(value)
        # Cheap first: no spike is lower than this.
        if math.isfinite(value) and (not recent or value <= MIN_HEIGHT * float(np.median(recent))):
            return None
        spikes = self._find()
        return step if spikes and spikes[-1].onset == step else None

    def spike_at(self, onset: int) -> Spike:
        """Return the spike that began at a step, as far as it is known."""
        return next(spike for spike in self._find() if spike.onset == onset)

    def level_before(self, onset: int) -> float:
        """Return the level that the spike rises from."""
        return level_before(list(self._steps), list(self._values), onset)

    def forget_from(self, step: int) -> None:
        """Drop losses from a step on: they will come again."""
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._values.pop()

    def _find(self) -> list[Spike]:
        return find_spikes(list(self._values), steps=list(self._steps))


def level_before(steps: list[int], values: list[float], onset: int) -> float:
    """Return the median of the latest calm losses before an onset; NaN where there is none."""
    spikes = find_spikes(values, steps=steps)
    calm = [
        value
        for step, value in zip(steps, values, strict=True)
        if step < onset and not any(spike.onset <= step <= spike.end for spike in spikes)
    ]
    return float(np.median(calm[-LEVEL_POINTS:])) if calm else float("nan")


class LateLoss:
    """Reads losses when that makes nobody wait: at once on a CPU, a step later on a GPU."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor, Any]] = []

    def put(self, step: int, loss: Tensor | float) -> list[tuple[int, float]]:
        """Take a loss; return the losses that can be read now."""
        if not isinstance(loss, Tensor) or loss.device.type != "cuda":
            return [*self.rest(), (step, _number(loss))]
        ready = self.rest()
        copy = loss.detach().to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((step, copy, event))
        return ready

    def rest(self) -> list[tuple[int, float]]:
        """Return all losses that were not read yet."""
        ready = []
        for step, copy, event in self._waiting:
            event.synchronize()
            ready.append((step, float(copy)))
        self._waiting.clear()
        return ready


def _number(loss: Tensor | float) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
