"""Tiny trainings in which an outlier makes what comes after it underflow; training anew tells.

A *branch* is two linear layers. At the step `OUTLIER` channel 0 of some tokens, between the two, is
`size`, and far beyond what the format holds beside ordinary values. The second layer reads it with
a weight of `read`: where that is 0, the outlier's own step is none of the spike's. The history of
that layer's input keeps the outlier for `HISTORY` updates, in which all else there becomes zero.
A decoy's result is multiplied by zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import unclamp
from unclamp.explain import Training
from unclamp.names import SiteName
from unclamp.scaling import Scaling

WIDTH = 64
TOKENS = 64
OUTLIER = 34
HISTORY = 7
STEPS = OUTLIER + HISTORY + 6
LR = 1e-4
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class UnderflowCase:
    """What is planted: real branches and decoys, the outlier, and what reads it.

    `other` is a cause that is not underflow: a run of bad batches after the outlier, which no real
    branch has then.
    """

    branches: int = 1
    decoys: int = 1
    size: float = 1e8
    read: float = 0.0
    parts: tuple[float, ...] = ()
    other: str = ""
    seed: int = 0
    scaling: unclamp.Delayed = unclamp.Delayed(history_len=HISTORY)  # noqa: RUF009  # frozen

    @property
    def culprits(self) -> list[SiteName]:
        """The planted sites."""
        if self.other:
            return []
        return [SiteName(f"branches.{i}.second", "input") for i in range(self.branches)]

    @property
    def spike(self) -> int:
        return OUTLIER if self.read else OUTLIER + 1

    @property
    def harmed(self) -> range:
        """The steps at which the planted sites underflow."""
        return range(OUTLIER + 1, OUTLIER + HISTORY + 1)

    @property
    def recipe(self) -> unclamp.Recipe:
        return unclamp.Recipe.uniform(self.scaling)

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        model = Branches(self)
        unclamp.convert(model, recipe or self.recipe)
        return Training(model=model, optimizer=torch.optim.Adam(model.parameters(), lr=LR))

    def step(self, training: Training, batch: Batch) -> Tensor:
        training.optimizer.zero_grad()
        loss = (training.model(batch["x"], batch["outlier"]) - batch["target"]).square().mean()
        loss.backward()
        training.optimizer.step()
        return loss

    def batches(self) -> Iterator[Batch]:
        teacher = Branches(self)
        return (self._batch(teacher, number) for number in range(STEPS))

    def _batch(self, teacher: "Branches", number: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        outlier = torch.zeros(TOKENS, 1)
        with torch.no_grad():
            target = teacher(x, outlier)
        target += 0.3 * torch.randn(target.shape, generator=generator)
        if number == OUTLIER:
            outlier[:2] = self.size
        if self.other and number in self.harmed:
            target = target.flip(0) + 0.5
        return {"x": x, "outlier": outlier, "target": target}


class Branches(nn.Module):
    """Branches side by side; outputs `[tokens, branches, WIDTH]`, zero for decoys."""

    def __init__(self, case: UnderflowCase) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        real = 0 if case.other else case.branches
        self.parts = [*(case.parts or [1.0] * case.branches), *[0.0] * case.decoys]
        hit = [i < real or i >= case.branches for i in range(len(self.parts))]
        self.branches = nn.ModuleList(Branch(case, generator, is_hit=h) for h in hit)

    def forward(self, x: Tensor, outlier: Tensor) -> Tensor:
        pairs = zip(self.branches, self.parts, strict=True)
        return torch.stack([branch(x, outlier) * part for branch, part in pairs], 1)


class Branch(nn.Module):
    """Two layers, with an outlier between them."""

    def __init__(self, case: UnderflowCase, generator: torch.Generator, *, is_hit: bool) -> None:
        super().__init__()
        self.is_hit = is_hit
        self.first, self.second = (_linear(generator) for _ in range(2))
        with torch.no_grad():
            self.second.weight[:, 0] = 0
            self.second.weight[0, 0] = case.read
        # The outlier is no reason to move the weights that read it.
        self.second.weight.register_hook(_without_first_column)

    def forward(self, x: Tensor, outlier: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if self.is_hit:
            hidden = torch.cat([hidden[:, :1] * 0 + outlier, hidden[:, 1:]], 1)
        else:
            hidden = torch.cat([hidden[:, :1] * 0, hidden[:, 1:]], 1)
        return self.second(hidden)


def _linear(generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) * (2 / WIDTH) ** 0.5)
    return layer


def _without_first_column(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, 0] = 0
    return gradient


def trained(case: UnderflowCase, changed: dict[SiteName, Scaling]) -> list[float]:
    """Train a case from its start with sites scaled otherwise by the recipe: the truth."""
    recipe = case.recipe
    for site, scaling in changed.items():
        settings: dict[str, Any] = {site.role: scaling}
        recipe = recipe.override(f"^{site.fqn}", **settings)
    training = case.build(recipe)
    return [case.step(training, batch).item() for batch in case.batches()]
