"""A tiny training in which two clamped sites both must clamp for a spike: either mends it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import unclamp
from truths.trainings import LR, SPIKE, Batch, Case, Paths, batch
from unclamp.explain import Training


@dataclass(frozen=True, kw_only=True)
class RedundantCase(Case):
    """Two paths with the same outlier, of which the larger output counts."""

    paths: tuple[tuple[float, ...], ...] = ((1.0,), (1.0,))

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        model = Larger(self)
        unclamp.convert(model, recipe or self.recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
        return Training(model=model, optimizer=optimizer, scheduler=scheduler)

    def batches(self) -> Iterator[Batch]:
        """Targets are those of the larger path."""
        for number in range(SPIKE + 5):
            x, target, rate = batch(self, number)
            paths = _teacher(self)
            target = (target[:, 0] - paths[0](x) + _larger(paths, x)).detach()
            yield x, target, rate


class Larger(nn.Module):
    """The larger output of two paths."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        made = Paths(case)
        self.paths = nn.ModuleList(made.paths[i] for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return _larger(self.paths, x)


def _larger(paths: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.maximum(paths[0](x), paths[1](x))


@lru_cache(maxsize=2)
def _teacher(case: Case) -> nn.ModuleList:
    with torch.random.fork_rng():
        return Larger(case).eval().paths
