"""Losses as they come: read without making a GPU wait, and watched for spikes."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from unclamp.analysis import Spike, SpikeDetector, find_spikes
from unclamp.analysis.robust import DELAY, SETTLED
from unclamp.errors import ReplayError

LEVEL_POINTS = 9
"""Calm losses whose median is the level that a spike rises from."""


def trains(spikes: Sequence[Spike]) -> list[list[Spike]]:
    """Return spikes in trains: those that follow closely on one another may have one cause.

    A spike belongs to the train of the one before it if that one ended at most `DELAY` steps
    earlier, or at most `SETTLED` and the loss had not come back meanwhile: the detector's own
    measures of what is still the same disturbance.
    """
    found: list[list[Spike]] = []
    for spike in spikes:
        before = found[-1][-1] if found else None
        if before is not None and spike.onset - before.end <= _reach(before, spike):
            found[-1].append(spike)
        else:
            found.append([spike])
    return found


def _reach(before: Spike, spike: Spike) -> int:
    is_back = before.recovery is not None and before.recovery < spike.onset
    return DELAY if is_back else SETTLED


class SpikeWatch:
    """Finds spikes in losses as they come: those that `find_spikes` finds afterwards."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._detector = SpikeDetector()
        self._is_open, self._number = False, -1

    def hear(self, step: int, value: float) -> int | None:
        """Return the onset if a spike begins with this loss, or is now certain; else None."""
        self._steps.append(step)
        self._values.append(value)
        return self._onset() if self._judge(value) else None

    def _onset(self) -> int:
        """Return where the spike at hand began; some steps prove it only together."""
        if not math.isfinite(self._values[-1]):
            return self._steps[-1]
        numbers = zip(reversed(self._steps), reversed(self._values), strict=True)
        finite = (step for step, value in numbers if math.isfinite(value))
        return next(itertools.islice(finite, self._detector.length - 1, None))

    def _judge(self, value: float) -> bool:
        """Return whether a spike begins with this value."""
        was_open, number = self._is_open, self._number
        self._is_open = self._detector.update(value)
        self._number = self._detector.spike
        return self._is_open and (not was_open or self._number > number >= 0)

    def spike_at(self, onset: int) -> Spike:
        """Return the spike that began at a step, as far as it is known."""
        spikes = find_spikes(self._values, steps=self._steps)
        return next(spike for spike in spikes if spike.onset <= onset <= spike.end)

    def level_before(self, onset: int) -> float:
        """Return the level that the spike rises from."""
        return level_before(self._steps, self._values, onset)

    def forget_from(self, step: int) -> None:
        """Drop losses from a step on: they will come again."""
        kept = [(n, value) for n, value in zip(self._steps, self._values, strict=True) if n < step]
        self._steps, self._values = [n for n, _ in kept], [value for _, value in kept]
        self._begin()
        for value in self._values:
            self._judge(value)


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
        """Take a loss; return the losses that can be read now.

        Raises:
            ReplayError: As `loss_number`.
        """
        _checked(loss)
        if not isinstance(loss, Tensor) or loss.device.type != "cuda":
            return [*self.rest(), (step, loss_number(loss))]
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


def loss_number(loss: object) -> float:
    """Return what a step function returned, or `Snapshots.after` was given, as a number.

    Raises:
        ReplayError: It is no number and no tensor of one element.
    """
    checked = _checked(loss)
    return float(checked.detach() if isinstance(checked, Tensor) else checked)


def _checked(loss: object) -> SupportsFloat:
    is_one = not isinstance(loss, bool | Tensor) or (isinstance(loss, Tensor) and loss.numel() == 1)
    if isinstance(loss, SupportsFloat) and is_one:
        return loss
    found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    hint = "; end the step function with `return loss`" if loss is None else ""
    raise ReplayError(
        "expected the step function to return its loss, a number or a tensor of one element, got "
        f"{found}{hint}"
    )
