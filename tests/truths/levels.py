"""The trainings of `trainings`, whose loss is reported otherwise, or whose remedy does harm too.

What is reported changes nothing of the training, so who is to blame for the spike stays known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from truths.trainings import GAIN, SPIKE, Batch, Case, batch, direction
from unclamp.explain import Training

CALM = 1.5
"""A loss above all calm ones of the case, and far below its spike."""

EARLY = SPIKE - 3

Reported = Literal["zero", "tiny", "below zero", "around zero", "falling", "broken at once"]


@dataclass(frozen=True, kw_only=True)
class LevelCase(Case):
    """A spike by a clamp, of a loss that is reported as `reported` says."""

    reported: Reported = "zero"

    def step(self, training: Training, batch: Any) -> Tensor:
        loss = super().step(training, batch[:3])
        match self.reported:
            case "zero":
                return (loss - CALM).clamp(min=0)
            case "tiny":
                return (loss - CALM).clamp(min=0) + 1e-9
            case "below zero":
                return loss - 40
            case "around zero":
                return loss - loss.new_tensor(1.0)
            case _:
                return loss * batch[3]

    def batches(self) -> Iterator[Any]:
        for n, one in enumerate(super().batches()):
            if self.reported == "broken at once":
                yield *one, torch.tensor(float("nan") if n < 2 else 1.0)
            else:
                yield *one, torch.tensor(0.7**n)


@dataclass(frozen=True, kw_only=True)
class ProtectedCase(Case):
    """A clamp that harms, three steps after one of the same tensor that protects.

    At `EARLY` a few tokens lie out there as well, and their targets are those of the tokens that
    they were: un-clamped, they are far off.
    """

    early: float = 64.0
    size: float = 128.0

    def batches(self) -> Iterator[Batch]:
        for n in range(SPIKE + 5):
            x, target, rate = batch(self, n)
            if n == EARLY:
                x = x.clone()
                x[:4] += self.early / GAIN * direction()
            yield x, target, rate
