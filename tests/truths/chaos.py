"""Tiny trainings at the edge of stability: a change of one bit moves the loss some steps later.

Beside the paths of `trainings` some parameters lie in double wells, and are trained at a rate that
throws them to and fro: a cubic map, x - RATE (x**3 - x), which is chaotic, and doubles a small
difference at about each step. The outputs of the paths push them a little, so that a change of one
bit anywhere comes through. Their part of the loss makes it rise and fall by `amount`; where all of
them are far out at once it jumps by itself, by chance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import unclamp
from truths.trainings import LR, SPIKE, STEPS, Batch, Case, Paths, batch
from unclamp.explain import Training
from unclamp.names import SiteName

RATE = 1.9
WELLS = 6
PUSH = 0.02


@dataclass(frozen=True, kw_only=True)
class ChaosCase(Case):
    """What is planted beside the chaos: as in `Case`.

    `jump` is how far the loss jumps by chance, where the wells' parameters are far out at once,
    and `outlier` the step whose batch has outliers: not that of the spike, if that is chance.
    """

    amount: float = 0.1
    jump: float = 0.0
    outlier: int = SPIKE

    @property
    def culprits(self) -> list[SiteName]:
        """The planted sites."""
        if self.other or self.jump:
            return []
        return [SiteName(f"paths.{site.fqn}", site.role) for site in super().culprits]

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        model = Chaotic(self)
        unclamp.convert(model, recipe or self.recipe)
        groups = [
            {"params": list(model.paths.parameters()), "lr": LR},
            {"params": [model.wells], "lr": RATE},
        ]
        return Training(model=model, optimizer=torch.optim.SGD(groups))

    def step(self, training: Training, batch: Batch) -> Tensor:
        x, target, rate = batch
        training.optimizer.param_groups[0]["lr"] = LR * float(rate)
        training.optimizer.zero_grad()
        model = training.model
        assert isinstance(model, Chaotic)
        output, wells = model.paths(x), model.wells
        error = (output - target).square().mean()
        # Its gradient is x**3 - x and a push that every bit of the output has a part in.
        deep = (wells.square() - 1).square().sum() / 4
        push = (1e3 * output.detach().mean()).sin() * wells.sum()
        (error + deep + PUSH * push).backward()
        training.optimizer.step()
        return error.detach() + self._shown(wells.detach())

    def _shown(self, wells: Tensor) -> Tensor:
        usual = self.amount * (wells.square() - 1).mean()
        return usual + self.jump * (wells.mean() - 0.85).relu()

    def batches(self) -> Iterator[Batch]:
        numbers = list(range(STEPS))
        numbers[self.outlier], numbers[SPIKE] = SPIKE, self.outlier
        return (batch(self, number) for number in numbers)


class Chaotic(nn.Module):
    """Paths, and parameters in double wells."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.paths = Paths(case)
        generator = torch.Generator().manual_seed(case.seed)
        self.wells = nn.Parameter(2 * torch.rand(WELLS, generator=generator) - 1)


def losses_of_many(case: ChaosCase, *, free: bool, repeats: int) -> list[list[float]]:
    """Train a case from its start with weights changed by a hair, over and over: the truth.

    With `free` nothing can clamp: every site is guarded.
    """
    recipe = unclamp.Recipe.uniform(unclamp.Guarded(history_len=16, margin=0)) if free else None
    found: list[list[float]] = []
    for repeat in range(repeats):
        training = case.build(recipe)
        generator = torch.Generator().manual_seed(repeat)
        with torch.no_grad():
            for parameter in training.model.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + 2.0**-20 * signs)
        found.append([case.step(training, one).item() for one in case.batches()])
    return found
