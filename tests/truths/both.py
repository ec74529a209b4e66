"""Tiny trainings in which clamping and underflow both raise the loss: two branches, one each.

The branches of `underflows`, where an outlier that nobody reads makes what comes after it
underflow, and beside them one more. Between its two layers channel 0 of some tokens is `clamped`
at the step after the outlier, more than its history knows but not by so much that anything
underflows; the second layer reads it. Training anew with either undone tells what each did.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import unclamp
from truths.underflows import LR, OUTLIER, STEPS, TOKENS, WIDTH, Branch, Branches, UnderflowCase
from unclamp.explain import Training
from unclamp.names import SiteName

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class BothCase(UnderflowCase):
    """What is planted beside the branches of `UnderflowCase`.

    `clamped` is the size of what clamps, and `weight` what the second layer reads it with.
    """

    clamped: float = 100.0
    weight: float = 1.5

    @property
    def clamping(self) -> SiteName:
        """The planted site that clamps."""
        return SiteName("clamping.second", "input")

    @property
    def underflowing(self) -> list[SiteName]:
        """The planted sites that underflow."""
        return [SiteName(f"under.{site.fqn}", site.role) for site in super().culprits]

    @property
    def culprits(self) -> list[SiteName]:
        """The planted sites."""
        return [self.clamping, *self.underflowing]

    @property
    def spike(self) -> int:
        return OUTLIER + 1

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        model = Both(self)
        unclamp.convert(model, recipe or self.recipe)
        return Training(model=model, optimizer=torch.optim.Adam(model.parameters(), lr=LR))

    def step(self, training: Training, batch: Batch) -> Tensor:
        training.optimizer.zero_grad()
        output = training.model(batch["x"], batch["outlier"], batch["clamped"])
        loss = (output - batch["target"]).square().mean()
        loss.backward()
        training.optimizer.step()
        return loss

    def batches(self) -> Iterator[Batch]:
        teacher = Both(self)
        return (self._one(teacher, number) for number in range(STEPS))

    def _one(self, teacher: "Both", number: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        outlier, clamped = torch.zeros(2, TOKENS, 1)
        if number == OUTLIER + 1:
            clamped[:2] = self.clamped
        with torch.no_grad():
            target = teacher(x, outlier, clamped)
        target += 0.3 * torch.randn(target.shape, generator=generator)
        if number == OUTLIER:
            outlier[:2] = self.size
        return {"x": x, "outlier": outlier, "clamped": clamped, "target": target}


class Both(nn.Module):
    """The branches of `underflows`, and one that clamps."""

    def __init__(self, case: BothCase) -> None:
        super().__init__()
        self.under = Branches(case)
        generator = torch.Generator().manual_seed(case.seed + 500)
        self.clamping = Branch(case, generator, is_hit=True)
        with torch.no_grad():
            self.clamping.second.weight[0, 0] = case.weight

    def forward(self, x: Tensor, outlier: Tensor, clamped: Tensor) -> Tensor:
        under = self.under(x, outlier)
        return torch.cat([under, self.clamping(x, clamped)[:, None]], 1)
