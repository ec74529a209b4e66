"""Ways to train a small model on several ranks, and the same training in one process."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import unclamp
from bench.experts import loss_of, mixture
from unclamp.nn import find_ledgers
from unclamp.nn.operands import Operands
from unclamp.nn.rehearsal import rehearses

WIDTH, STAGES, BATCH, LENGTH, MICROBATCHES, STEPS, LR = 32, 2, 8, 8, 2, 10, 1e-2
SCALINGS: dict[str, unclamp.Scaling] = {
    "delayed": unclamp.Delayed(history_len=2),
    "guarded": unclamp.Guarded(history_len=2),
    "dynamic": unclamp.Dynamic(),
    "dynamic shared": unclamp.Dynamic(shared=True),
}
HAS_HISTORY = ("delayed", "guarded")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train.

    Attributes:
        kind: What wraps the model.
        ranks: Processes.
        parts: Into how many the batch is split between ranks that each average a loss.
        shares: Whether ranks share their scales.
        warmup: Steps without casts: then ranks meet in updates only.
        accumulates: Whether a step makes several microbatches where it is no pipeline.
    """

    kind: str
    ranks: int = 2
    parts: int = 1
    shares: bool = True
    warmup: int = 0
    accumulates: bool = False

    @property
    def microbatches(self) -> int:
        """How many a step makes, one after the other."""
        return MICROBATCHES if self.accumulates or self.kind.startswith("pp") else 1


WAYS = {
    "DDP": Way(kind="ddp", parts=2),
    "FSDP2": Way(kind="fsdp2", parts=2),
    "HSDP": Way(kind="hsdp", ranks=4, parts=4),
    "TP": Way(kind="tp"),
    "SP": Way(kind="sp"),
    "FSDP2 + TP": Way(kind="fsdp2 tp", ranks=4, parts=2),
    "PP": Way(kind="pp"),
    "PP + FSDP2": Way(kind="pp fsdp2", ranks=4, parts=2),
    "EP": Way(kind="ep"),
    "DDP, two microbatches": Way(kind="ddp", parts=2, accumulates=True),
    "the same, `warmup_steps=1`": Way(kind="ddp", parts=2, accumulates=True, warmup=1),
    "DDP, each rank its own scales": Way(kind="ddp", parts=2, shares=False),
    "TP, each rank its own scales": Way(kind="tp", shares=False),
}


class Stage(nn.Module):
    """Norm, up, down: what is parallel in a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.ModuleDict):
    """All stages, or those of one rank."""

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda t, stage: stage(t), self.values(), x)


def whole_model() -> Model:
    torch.manual_seed(0)
    return Model({str(i): Stage() for i in range(STAGES)})


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, `[BATCH, LENGTH, WIDTH]`; examples and steps differ in size."""
    made = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, LENGTH, WIDTH, generator=made) for _ in range(2))
    size = torch.exp2(3 * torch.rand(BATCH, 1, 1, generator=made))
    size = size * (8 if step % 4 == 3 else 1)  # more than any scale has foreseen
    return x * size, y * size


# ---- what is seen -----------------------------------------------------------------------------

Site = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a training came to on one rank.

    Attributes:
        scales: By site, of each cast in order: the predicted scale where there is a history, else
            the one it was cast by. (A guarded cast that is repeated keeps to its own tensor.)
        codes: By site, of each cast in order, how often each of the 256 codes came.
        histories: By site, of each step.
        losses: Of each step, the mean over microbatches; empty where no loss is computed.
    """

    scales: dict[Site, list[float]] = field(default_factory=lambda: defaultdict(list))
    codes: dict[Site, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    histories: dict[Site, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    losses: list[float] = field(default_factory=list)


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Listen to all casts of this process."""
    original = Operands.seen

    def look(self: Operands, role: Any, hat: Any) -> Any:
        if hat.casts and not rehearses():
            site = (self.fqn, role)
            q, predicted = hat.casts[1], self.scales[role, 1]
            # Before anything was measured a prediction is 0.
            seen.scales[site].append(float(predicted or 0) or 1 / float(q.scale_inv))
            codes = q.codes.view(torch.uint8).flatten().to(torch.int64)
            seen.codes[site].append(torch.bincount(codes, minlength=256))
        return original(self, role, hat)

    Operands.seen = look
    try:
        yield
    finally:
        Operands.seen = original


def note_histories(model: nn.Module, seen: Seen) -> None:
    (ledger,) = find_ledgers(model)
    for i, site in enumerate(ledger.sites):
        seen.histories[site.name.fqn, site.name.role].append(ledger.history_of(i).tolist())


# ---- training ----------------------------------------------------------------------------------


def alone(way: Way, scaling: unclamp.Scaling) -> Seen:
    """Train on the whole batch in this process."""
    recipe, seen = replace(unclamp.Recipe.uniform(scaling), warmup_steps=way.warmup), Seen()
    model = mixture(None) if way.kind == "ep" else whole_model()
    unclamp.convert(model, recipe, skip=["router"] if way.kind == "ep" else [])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    with watched(seen):
        for step in range(STEPS):
            x, y = batch(step)
            if way.kind == "ep":
                losses = [loss_of(model, x, y)]
            else:
                pairs = zip(*(_microbatches(way, t) for t in (x, y)), strict=True)
                losses = [(model(one) - target).square().mean() for one, target in pairs]
            for loss in losses:
                (loss / len(losses) if way.microbatches == 1 else loss).backward()
            _end_step(way, model, optimizer, losses, seen, divides=way.microbatches > 1)
    return seen


def _microbatches(way: Way, t: Tensor) -> list[Tensor]:
    """Return the whole batch in microbatches: of each, the parts that ranks have at one time."""
    parts = [part.chunk(way.microbatches) for part in t.chunk(way.parts)]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def _end_step(
    way: Way,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[Tensor],
    seen: Seen,
    *,
    divides: bool = False,
) -> None:
    if divides:  # as a pipeline's schedule does after the last microbatch
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(way.microbatches)
    optimizer.step()
    optimizer.zero_grad()
    note_histories(model, seen)
    if losses:
        seen.losses.append(math.fsum(float(loss.detach()) for loss in losses) / len(losses))


def on_rank(way: Way, scaling: unclamp.Scaling) -> Seen:
    """Train on this rank's part."""
    recipe = replace(unclamp.Recipe.uniform(scaling), warmup_steps=way.warmup)
    rank = dist.get_rank()
    group = None if way.shares else ()
    if way.kind == "ep":
        model: Any = mixture(rank)
        unclamp.convert(model, recipe, skip=["router"], group=())
        return _train(way, model, model, part=rank, of=way.ranks)
    if way.kind.startswith("pp"):
        return _pipeline(way, recipe)
    model = whole_model()
    unclamp.convert(model, recipe, group=group)
    wrapped, place = _wrapped(way, model)
    return _train(way, model, wrapped, part=place, of=way.parts)


def _wrapped(way: Way, model: Model) -> tuple[Any, int]:
    """Return the model as it is called, and which part of the batch is this rank's."""
    rank = dist.get_rank()
    if way.kind == "ddp":
        return DistributedDataParallel(model), rank
    if way.kind == "fsdp2":
        return _fully_sharded(model, init_device_mesh("cpu", (2,))), rank
    if way.kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return _fully_sharded(model, mesh), rank
    if way.kind == "fsdp2 tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        _tensor_parallel(model, mesh["tp"], "tp")
        return _fully_sharded(model, mesh["dp"]), mesh["dp"].get_local_rank()
    _tensor_parallel(model, init_device_mesh("cpu", (2,)), way.kind)
    return model, 0


def _fully_sharded(model: Model, mesh: Any) -> Model:
    for stage in model.values():
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _tensor_parallel(model: Model, mesh: Any, kind: str) -> None:
    for stage in model.values():
        if kind == "tp":
            parallelize_module(stage, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            continue
        styles: dict[str, Any] = {
            "norm": SequenceParallel(use_local_output=False),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(stage, mesh, styles)
        tokens = (Shard(1),)
        comes = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=tokens, use_local_output=False
        )
        parallelize_module(stage, mesh, comes)
        goes = PrepareModuleOutput(output_layouts=tokens, desired_output_layouts=(Replicate(),))
        parallelize_module(stage, mesh, goes)


def _train(way: Way, model: nn.Module, wrapped: Any, *, part: int, of: int) -> Seen:
    seen = Seen()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    with watched(seen):
        for step in range(STEPS):
            x, y = (t.chunk(of)[part] for t in batch(step))
            if way.kind == "ep":
                # A rank's part of the whole's mean: experts' gradients are added up, not averaged.
                loss = loss_of(wrapped, x, y) / of
                loss.backward()
                losses = [loss * of]
            else:
                losses = _backward(way, wrapped, x, y)
            _end_step(way, model, optimizer, losses, seen, divides=way.accumulates)
    return seen


def _backward(way: Way, wrapped: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """Make a step's microbatches, and average gradients over ranks after the last one."""
    losses = []
    pairs = zip(x.chunk(way.microbatches), y.chunk(way.microbatches), strict=True)
    for number, (one, target) in enumerate(pairs, start=1):
        with nullcontext() if number == way.microbatches else wrapped.no_sync():
            losses.append((wrapped(one) - target).square().mean())
            losses[-1].backward()
    return losses


def _pipeline(way: Way, recipe: unclamp.Recipe) -> Seen:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe  # noqa: PLC0415

    shape = (STAGES, way.ranks // STAGES)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    place, part = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    everything = whole_model()
    model, seen = Model({str(place): everything[str(place)]}), Seen()
    unclamp.convert(model, recipe)
    if "fsdp2" in way.kind:
        fully_shard(model[str(place)], mesh=mesh["dp"])
    cpu, group = torch.device("cpu"), mesh.get_group("pp")
    stage = PipelineStage(model[str(place)], place, STAGES, cpu, group=group)
    schedule = ScheduleGPipe(
        stage, MICROBATCHES, loss_fn=lambda output, y: (output - y).square().mean()
    )
    optimizer, is_last = torch.optim.Adam(model.parameters(), lr=LR), place == STAGES - 1
    with watched(seen):
        for step in range(STEPS):
            x, y = (t.chunk(way.parts)[part] for t in batch(step))
            losses: list[Tensor] = []
            last: dict[str, Any] = {"target": y, "losses": losses} if is_last else {}
            schedule.step(*([] if place else [x]), **last)
            _end_step(way, model, optimizer, losses, seen)
    return seen
