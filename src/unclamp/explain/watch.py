"""Losses as they come: read without making a GPU wait, and watched for spikes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from unclamp.analysis import Spike, SpikeDetector, find_spikes
from unclamp.analysis.groups import Group, has_kinds, kind_in_words
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


class _KindWatch:
    """Watches the losses of one kind of batches."""

    def __init__(self) -> None:
        self._detector = SpikeDetector()
        self._is_open, self._number = False, -1
        self._finite: list[int] = []

    def hear(self, step: int, value: float) -> int | None:
        """Return the onset if a spike begins with this loss, or is now certain; else None."""
        is_finite = math.isfinite(value)
        if is_finite:
            self._finite.append(step)
        if not self._judge(value):
            return None
        # Some steps prove a spike only together: it began at the first of them.
        return self._finite[-self._detector.length] if is_finite else step

    def _judge(self, value: float) -> bool:
        """Return whether a spike begins with this value."""
        was_open, number = self._is_open, self._number
        self._is_open = self._detector.update(value)
        self._number = self._detector.spike
        return self._is_open and (not was_open or self._number > number >= 0)


class SpikeWatch:
    """Finds spikes in losses as they come: those that `find_spikes` finds afterwards."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[float] = []
        self._groups: list[Group] = []
        self._kinds: dict[Group, _KindWatch] = {}
        self._named: dict[int, Group] = {}

    def name(self, step: int, group: Group) -> None:
        """Take the kind of a step's batch, before its loss is heard."""
        self._named[step] = group

    def hear(self, step: int, value: float) -> int | None:
        """Return the onset if a spike begins with this loss, or is now certain; else None."""
        group = self._named.pop(step, None)
        self._steps.append(step)
        self._values.append(value)
        self._groups.append(group)
        return self._kinds.setdefault(group, _KindWatch()).hear(step, value)

    @property
    def spikes(self) -> list[Spike]:
        """All spikes, as far as they are known."""
        return find_spikes(self._values, steps=self._steps, groups=self._groups)

    def spike_at(self, onset: int) -> Spike:
        """Return the spike that began at a step, as far as it is known."""
        group = self._groups[self._steps.index(onset)]
        return next(s for s in self.spikes if s.group == group and s.onset <= onset <= s.end)

    def level_before(self, onset: int) -> float:
        """Return the level that the spike rises from."""
        return level_before(self._steps, self._values, onset, self._groups)

    def kin_of(self, spike: Spike) -> frozenset[int] | None:
        """Return the steps of the spike's kind, as `kin_of`."""
        return kin_of(spike.group, self._steps, self._groups)

    def forget_from(self, step: int) -> None:
        """Drop losses from a step on: they will come again."""
        heard = list(zip(self._steps, self._values, self._groups, strict=True))
        self._steps, self._values, self._groups, self._kinds = [], [], [], {}
        for n, value, group in heard:
            if n < step:
                self.name(n, group)
                self.hear(n, value)


def calm_steps(steps: Iterable[int], spikes: Sequence[Spike]) -> list[int]:
    """Return the latest of steps that lie in no spike: `LEVEL_POINTS` at most.

    A spike that has lasted `SETTLED` steps is the new level, to the detector and here.
    """
    calm = [
        step
        for step in steps
        if not any(s.onset <= step <= min(s.end, s.onset + SETTLED - 1) for s in spikes)
    ]
    return calm[-LEVEL_POINTS:]


def level_before(
    steps: Sequence[int], values: Sequence[float], onset: int, groups: Sequence[Group] = ()
) -> float:
    """Return the median of the latest calm losses of the same kind before an onset.

    NaN where there is none. Without groups all losses are of one kind.
    """
    kinds = list(groups) if has_kinds(groups) else [None] * len(steps)
    own = next((kind for step, kind in zip(steps, kinds, strict=True) if step == onset), None)
    of_kind = [i for i, kind in enumerate(kinds) if kind == own]
    steps, values = [steps[i] for i in of_kind], [values[i] for i in of_kind]
    before = {n: loss for n, loss in zip(steps, values, strict=True) if n < onset}
    calm = [before[step] for step in calm_steps(before, find_spikes(values, steps=steps))]
    return float(np.median(calm)) if calm else float("nan")


def kin_of(group: Group, steps: Sequence[int], groups: Sequence[Group]) -> frozenset[int] | None:
    """Return the steps whose batch is of a kind; None where all are of one."""
    if not has_kinds(groups):
        return None
    return frozenset(n for n, kind in zip(steps, groups, strict=True) if kind == group)


def about_kind(spike: Spike, kin: frozenset[int] | None) -> tuple[str, ...]:
    """Say what a spike is compared with where batches are of several kinds."""
    if kin is None:
        return ()
    return (
        f"It is a spike among {kind_in_words(spike.group)}: its level is that of such batches "
        "before it, and steps of other kinds count neither for the level nor for the spike.",
    )


class Late:
    """Reads tensors when that makes nobody wait: at once on a CPU, a step later on a GPU."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor, Any]] = []

    def put(self, step: int, tensor: Tensor) -> list[tuple[int, Tensor]]:
        """Take a step's tensor; return those that can be read now, on the host."""
        if tensor.device.type != "cuda":
            return [*self.rest(), (step, tensor)]
        ready = self.rest()
        copy = tensor.detach().to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((step, copy, event))
        return ready

    def rest(self) -> list[tuple[int, Tensor]]:
        """Return all that were not read yet."""
        ready = []
        for step, copy, event in self._waiting:
            event.synchronize()
            ready.append((step, copy))
        self._waiting.clear()
        return ready


class LateLoss:
    """Reads losses as they come, as `Late` does."""

    def __init__(self) -> None:
        self._late = Late()

    def put(self, step: int, loss: Tensor | float) -> list[tuple[int, float]]:
        """Take a loss; return the losses that can be read now.

        Raises:
            ReplayError: As `loss_number`.
        """
        checked = checked_loss(loss)
        if not isinstance(checked, Tensor):
            return [*self.rest(), (step, float(checked))]
        return [(n, float(one.detach())) for n, one in self._late.put(step, checked)]

    def rest(self) -> list[tuple[int, float]]:
        """Return all losses that were not read yet."""
        return [(n, float(one)) for n, one in self._late.rest()]


def loss_number(loss: object) -> float:
    """Return what a step function returned, or `Snapshots.after` was given, as a number.

    Raises:
        ReplayError: It is no number and no tensor of one element.
    """
    checked = checked_loss(loss)
    return float(checked.detach() if isinstance(checked, Tensor) else checked)


def checked_loss(loss: object) -> SupportsFloat:
    """Return a loss as it came.

    Raises:
        ReplayError: As `loss_number`.
    """
    is_one = not isinstance(loss, bool | Tensor) or (isinstance(loss, Tensor) and loss.numel() == 1)
    if isinstance(loss, SupportsFloat) and is_one:
        return loss
    found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    hint = "; end the step function with `return loss`" if loss is None else ""
    raise ReplayError(
        "expected the step function to return its loss, a number or a tensor of one element, got "
        f"{found}{hint}"
    )
