"""The planted trainings on two ranks, each with its own batches; the outlier is one rank's alone.

A rank's losses are those of its batches; the loss of a step is the mean over ranks.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import unclamp
from truths.trainings import SPIKE, STEPS, Batch, Case, batch
from truths.trainings import step as step
from unclamp.explain import Explanation, Limits, Snapshots, Training, explain_spike
from unclamp.names import SiteName

BAD_RANK = 1
"""Whose batch has the outlier."""
SLOW_STEP = "UNCLAMP_TEST_FAILS_ON"


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A case on several ranks.

    Attributes:
        case: What is planted.
        wrapper: "ddp" or "fsdp2".
        has_outlier: Whether the outlier is there; without it another cause is, `case.other`.
    """

    case: Case
    wrapper: str = "ddp"

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        """Make the training on this rank."""
        plain = self.case.build(recipe)
        wrapped = wrap(plain.model, self.wrapper)
        kind, settings = type(plain.optimizer), plain.optimizer.defaults
        optimizer = kind(wrapped.parameters(), lr=settings["lr"], weight_decay=0.0)
        scheduler = type(plain.scheduler)(optimizer, lambda n: 1.0)
        return Training(model=wrapped, optimizer=optimizer, scheduler=scheduler)

    def batches(self, rank: int) -> Iterator[Batch]:
        """Yield the batches of one rank."""
        return (batch_of(self.case, n, rank) for n in range(STEPS))


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Return a model as several ranks train it."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for path in model.paths:  # pyright: ignore
        fully_shard(path)
    return fully_shard(model)


def batch_of(case: Case, number: int, rank: int) -> Batch:
    """Return a rank's batch of a step: at the spike only one rank has the planted one."""
    if number == SPIKE and rank == BAD_RANK:
        return batch(case, SPIKE)
    x, target, rate = batch(case, 1000 + 10 * number + rank)
    return x, target, rate


def record(
    ranked: Ranked, run: Path, rank: int, functions: dict[str, Any] | None = None, **settings: Any
) -> list[float]:
    """Train into a run folder with snapshots, on one of the ranks; return its losses."""
    training = ranked.build()
    own = {"build": partial(ranked.build), "step": step} if functions is None else functions
    options = {"every": 5, "keep": 3, "after": 3, **own, **settings}
    losses = []
    with (
        unclamp.Recorder(training.model, run) as recorder,
        Snapshots(training, run, recorder=recorder, **options) as snapshots,
    ):
        for n, one in snapshots.follow(ranked.batches(rank)):
            loss = step(training, one)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)
            losses.append(loss.item())
    return losses


def losses_with(ranked: Ranked, unclamped: list[SiteName], rank: int) -> list[float]:
    """Train from the start with sites un-clamped by the recipe: the truth, by no replay."""
    recipe = ranked.case.recipe
    for fqn in dict.fromkeys(site.fqn for site in unclamped):
        roles = {site.role: unclamp.Guarded() for site in unclamped if site.fqn == fqn}
        recipe = recipe.override(f"^{fqn}", **roles)  # pyright: ignore
    training = ranked.build(recipe)
    return [step(training, one).item() for one in ranked.batches(rank)]


def explain(ranked: Ranked, run: Path, **limits: Any) -> Explanation:
    """Explain the spike, on each rank."""
    return explain_spike(run, build=partial(ranked.build), step=step, limits=Limits(**limits))


DEFAULT = Ranked(case=Case())


def default_build() -> Training:
    """The default case, for a command that finds it by name."""
    return DEFAULT.build()


def failing_step(training: Training, one: Batch) -> Tensor:
    """As `step`, until a file says on which rank it is to fail."""
    sign = os.environ.get(SLOW_STEP)
    if sign and dist.get_rank() == int(sign):
        raise RuntimeError("the disk of this rank is full")
    return step(training, one)
