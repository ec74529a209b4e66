"""A small model trained by a pipeline on several ranks, and by one process: what both have seen."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp.nn.convert import find_ledgers

WIDTH, MICROBATCHES, STEPS, JUNK = 16, 4, 3, 1e30
SCHEDULES = {
    "GPipe": (0, 1),
    "1F1B": (0, 1),
    "LoopedBFS": (0, 1, 0, 1),
    "Interleaved1F1B": (0, 1, 0, 1),
    "InterleavedZeroBubble": (0, 1, 0, 1),
    "ZBVZeroBubble": (0, 1, 1, 0),
    "DualPipeV": (0, 1, 1, 0),
}
"""The rank of each stage."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a model is trained.

    Attributes:
        schedule: Name of torch's schedule.
        recipe: What is converted.
        is_static: Whether stages are told their shapes, and need not run for them.
        checkpoints: Whether stages recompute their forward.
        evaluates: Whether there is an evaluation between two steps.
        imports_late: Whether pipelining is imported after the conversion.
        copies: How two ranks hold each stage, each with half of every microbatch: "ddp", "fsdp2",
            or "group", told by hand; without it there is one.
        is_reentrant: Whether a forward that is computed again is so by reentrant checkpointing.
        odd: What one of the two does that the other does not: "evaluates" before the first step,
            has twice the "microbatches", or makes the first "step" twice.
    """

    schedule: str
    recipe: unclamp.Recipe
    is_static: bool = False
    checkpoints: bool = False
    evaluates: bool = False
    imports_late: bool = False
    copies: str = ""
    is_reentrant: bool = False
    odd: str = ""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a site has seen: statistics of each update and of evaluations, history and scale."""

    updates: np.ndarray
    evaluated: np.ndarray
    history: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is left of a training, by name of site and of parameter.

    Attributes:
        inputs: Largest element that came into any product, rehearsals included.
    """

    sites: dict[str, Seen]
    updates: int
    weights: dict[str, np.ndarray]
    losses: list[float]
    inputs: float


class Stage(nn.Module):
    """Two layers, which may be computed again in backward."""

    def __init__(self, *, checkpoints: bool, is_reentrant: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.checkpoints, self.is_reentrant = checkpoints, is_reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Return `[tokens, WIDTH]`."""
        if not self.checkpoints:
            return self._run(x)
        # Of an input that wants no gradient, reentrant checkpointing gives none to weights either.
        return checkpoint(self._run, x, use_reentrant=self.is_reentrant and x.requires_grad)

    def _run(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def stages(case: Case) -> nn.ModuleDict:
    """Return all stages of a model, each with weights of its own."""
    torch.manual_seed(0)
    count = len(SCHEDULES[case.schedule])
    made = {"checkpoints": case.checkpoints, "is_reentrant": case.is_reentrant}
    return nn.ModuleDict({str(i): Stage(**made) for i in range(count)})


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return what goes in and what should come out at a step; each step is larger."""
    g = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8 * MICROBATCHES, WIDTH, generator=g) for _ in range(2))
    return x * (step + 1), y


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return (output - target).square().mean()


class Watch:
    """Listens to a model's ledger."""

    def __init__(self, model: nn.Module) -> None:
        (self.ledger,) = find_ledgers(model)
        self.model, self.stats, self.largest = model, [], 0.0
        self.ledger.subscribe(lambda update: self.stats.append(update.stats.clone()))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self._look)

    def _look(self, _layer: nn.Module, inputs: tuple[Tensor]) -> None:
        self.largest = max(self.largest, float(inputs[0].detach().abs().max()))

    def outcome(self, losses: list[float]) -> Outcome:
        """Return what there is to see now."""
        ledger = self.ledger
        sites = {
            str(site.name): Seen(
                updates=torch.stack([stats[i] for stats in self.stats]).numpy(),
                evaluated=ledger.evaluated.stats[i].clone().numpy(),
                history=ledger.history_of(i).numpy(),
                scale=ledger.scale_of(i).numpy(),
            )
            for i, site in enumerate(ledger.sites)
        }
        weights = {name: _whole(p).clone().numpy() for name, p in self.model.named_parameters()}
        return Outcome(
            sites=sites, updates=ledger.updates, weights=weights, losses=losses, inputs=self.largest
        )


def alone(case: Case) -> Outcome:
    """Train in one process: the whole batch, by the same microbatches."""
    model = stages(case)
    unclamp.convert(model, case.recipe)
    watch, optimizer, losses = Watch(model), AdamW(model.parameters(), lr=1e-2), []

    def run(x: Tensor) -> Tensor:
        return functools.reduce(lambda t, stage: stage(t), model.values(), x)

    for step in range(STEPS):
        x, y = batch(step)
        pairs = list(zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True))
        made = [loss_of(run(one), target) for one, target in pairs]
        # LoopedBFS takes the last microbatch first, and sums of gradients have an order.
        for loss in reversed(made) if case.schedule == "LoopedBFS" else made:
            loss.backward()
        losses.extend(loss.item() for loss in made)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(MICROBATCHES)
        optimizer.step()
        optimizer.zero_grad()
        if case.evaluates:
            with torch.no_grad():
                model.eval()
                for one, _ in pairs:
                    run(one)
                model.train()
    return watch.outcome(losses)


def all_on_rank(rank: int, cases: list[Case]) -> list[Outcome]:
    """Train the stages of one rank in every way: processes cost more than the training."""
    return [on_rank(rank, case) for case in cases]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is: which stages of a pipeline it has, and which part of each microbatch."""

    stage: int
    part: int | None
    mesh: Any

    @classmethod
    def of(cls, rank: int, case: Case) -> "Place":
        """Return that of a rank: of two, or of four that hold each stage twice."""
        if not case.copies:
            return cls(stage=rank, part=None, mesh=None)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        return cls(stage=mesh.get_local_rank("pp"), part=mesh.get_local_rank("dp"), mesh=mesh)

    def rows(self, t: Tensor) -> Tensor:
        """Return this rank's half of each microbatch."""
        if self.part is None:
            return t
        return t.view(MICROBATCHES, 2, -1, t.shape[1])[:, self.part].flatten(0, 1)

    def group(self, dimension: str) -> Any:
        """Return the ranks of a pipeline, or those that hold the same stages."""
        return None if self.mesh is None else self.mesh.get_group(dimension)


def on_rank(rank: int, case: Case) -> Outcome:
    """Train the stages of one rank."""
    if not case.imports_late:
        importlib.import_module("torch.distributed.pipelining")
    everything, places, place = stages(case), SCHEDULES[case.schedule], Place.of(rank, case)
    own = [i for i, one in enumerate(places) if one == place.stage]
    model = nn.ModuleDict({str(i): everything[str(i)] for i in own})
    assert not case.imports_late or "torch.distributed.pipelining" not in sys.modules
    unclamp.convert(model, case.recipe, group=place.group("dp") if case.copies == "group" else None)
    called = [_held_twice(case, model[str(i)], place) for i in own]
    watch, optimizer, losses = Watch(model), AdamW(model.parameters(), lr=1e-2), []
    with junk_in_memory():
        schedule = _schedule(case, called, own, places, place)
        for step in range(STEPS):
            x, y = map(place.rows, batch(step))
            if step == 0 and place.part == 0 and case.odd == "evaluates":
                schedule.eval(*([x] if 0 in own else []), target=y)  # with gradients, in train()
            for _ in range(2 if step == 0 and place.part == 1 and case.odd == "step" else 1):
                _step(schedule, own, len(places), x, y, losses)
            if case.copies == "group":
                _average_gradients(model, place.group("dp"))
            optimizer.step()
            optimizer.zero_grad()
            if case.evaluates:
                with torch.no_grad():
                    model.eval()
                    schedule.eval(*([x] if 0 in own else []), target=y)
                    model.train()
    return watch.outcome(losses)


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _held_twice(case: Case, stage: nn.Module, place: Place) -> nn.Module:
    """Return a stage as it is called."""
    if case.copies == "ddp":
        return DistributedDataParallel(stage, process_group=place.group("dp"))
    if case.copies == "fsdp2":
        fully_shard(stage, mesh=place.mesh["dp"])
    return stage


def _average_gradients(model: nn.Module, group: Any) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(2)


def _schedule(
    case: Case, called: list[nn.Module], own: list[int], places: tuple[int, ...], place: Place
) -> Any:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    group, cpu = place.group("pp"), torch.device("cpu")
    made = [
        PipelineStage(stage, i, len(places), cpu, group=group, **_known(case, i))
        for i, stage in zip(own, called, strict=True)
    ]
    kind = get_schedule_class(case.schedule)
    is_single = len(places) == 2
    count = MICROBATCHES * (2 if case.odd == "microbatches" and place.part == 1 else 1)
    return kind(made[0] if is_single else made, count, loss_fn=loss_of)  # pyright: ignore


def _known(case: Case, stage: int) -> dict[str, Any]:
    """Return what a stage is told of its shapes; what it gets from another wants a gradient."""
    if not case.is_static:
        return {}
    rows = 4 if case.copies else 8
    comes, goes = torch.zeros(rows, WIDTH), torch.zeros(rows, WIDTH, requires_grad=True)
    return {"input_args": comes.requires_grad_(stage > 0), "output_args": goes}


def _step(
    schedule: Any, own: list[int], count: int, x: Tensor, y: Tensor, losses: list[float]
) -> None:
    found: list[Tensor] = []
    last = {"target": y, "losses": found} if count - 1 in own else {}
    schedule.step(*([x] if 0 in own else []), **last)
    losses.extend(loss.item() for loss in found)


@contextmanager
def junk_in_memory() -> Iterator[None]:
    """Have the tensors that a stage makes up to learn its shapes hold what memory may hold."""
    from torch.distributed.pipelining import _utils

    make: Callable[..., Tensor] | None = getattr(_utils, "_make_tensor_from_meta", None)
    if make is None:  # torch 2.11 makes zeros
        yield
        return
    _utils._make_tensor_from_meta = lambda *args: make(*args).fill_(JUNK)  # pyright: ignore
    try:
        yield
    finally:
        _utils._make_tensor_from_meta = make  # pyright: ignore
