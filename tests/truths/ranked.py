"""The planted trainings on two ranks, each with its own batches; the outlier is one rank's alone.

A rank's losses are those of its batches; the loss of a step is the mean over ranks.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import unclamp
from truths.trainings import LR, SPIKE, STEPS, Batch, Case, Paths, batch
from truths.trainings import step as step
from unclamp.explain import Explanation, Limits, Snapshots, Training, explain_spike
from unclamp.names import SiteName
from unclamp.nn import groups

RISE, GROWTH, PART = 10, 1.4, 0.25
"""Steps in which outliers grow, by how much each, and how large they end beside the planted one."""
BAD_RANK = 1
"""Whose batch has the outlier."""
SLOW, FAILS = "UNCLAMP_TEST_SLOW_S", "UNCLAMP_TEST_FAILS"
"""Variables for `odd_step`: seconds a step, and "RANK:FILE"."""
JOINS = "UNCLAMP_TEST_JOINS"
"""A variable for `default_build`: that it makes the process group itself."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A case on several ranks.

    Attributes:
        case: What is planted.
        wrapper: "ddp" or "fsdp2".
        rises: Whether the other rank's outliers grow up to a part of the planted one before it, so
            that shared histories know of them, and those of the bad rank alone do not.
    """

    case: Case
    wrapper: str = "ddp"
    rises: bool = False

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        """Make the training on this rank."""
        plain = self.case.build(recipe)
        wrapped = wrap(plain.model, self.wrapper)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LR, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
        return Training(model=wrapped, optimizer=optimizer, scheduler=scheduler)

    def batches(self, rank: int) -> Iterator[Batch]:
        """Yield the batches of one rank."""
        return (batch_of(self, n, rank) for n in range(STEPS))


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Return a model as several ranks train it."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    assert isinstance(model, Paths)
    for path in model.paths:
        fully_shard(path)
    fully_shard(model)
    return model


def batch_of(ranked: Ranked, number: int, rank: int) -> Batch:
    """Return a rank's batch of a step: at the spike only one rank has the planted one."""
    case = ranked.case
    if number == SPIKE and rank == BAD_RANK:
        return batch(case, SPIKE)
    if ranked.rises and rank != BAD_RANK and SPIKE - RISE <= number < SPIKE:
        size = case.size * PART * GROWTH ** (number - SPIKE + 1)
        return batch(replace(case, size=size, other=""), SPIKE)
    return batch(case, 1000 + 10 * number + rank)


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


def losses_with(
    ranked: Ranked, rank: int, *, unclamped: list[SiteName] | None = None, alone_from: int = STEPS
) -> list[float]:
    """Train from the start with sites un-clamped by the recipe: the truth, by no replay.

    From a step on each rank may go on alone: it is said to hold its layers by itself.
    """
    recipe = ranked.case.recipe
    for fqn in dict.fromkeys(site.fqn for site in unclamped or []):
        roles = {site.role: unclamp.Guarded() for site in unclamped or [] if site.fqn == fqn}
        recipe = recipe.override(f"^{fqn}", **roles)  # pyright: ignore
    training = ranked.build(recipe)
    losses = []
    for n, one in enumerate(ranked.batches(rank)):
        if n == alone_from:
            groups.give(dict(training.model.named_modules()), ())
        losses.append(step(training, one).item())
    return losses


def explain(ranked: Ranked, run: Path, **limits: Any) -> Explanation:
    """Explain the spike, on each rank."""
    return explain_spike(run, build=partial(ranked.build), step=step, limits=Limits(**limits))


DEFAULT = Ranked(case=Case())


def default_build() -> Training:
    """The default case, for a command that finds it by name; as told, with the group it needs."""
    if JOINS in os.environ:
        dist.init_process_group("gloo")
    return DEFAULT.build()


def odd_step(training: Training, one: Batch) -> Tensor:
    """As `step`, and as the environment says: slower, or failing on a rank once a file is there."""
    time.sleep(float(os.environ.get(SLOW, "0")))
    rank, _, path = os.environ.get(FAILS, "").partition(":")
    if path and dist.get_rank() == int(rank) and Path(path).exists():
        raise RuntimeError("the disk of this rank is full")
    return step(training, one)
