"""What the tests of the one-byte all-gather train: a model, and what each of its steps gives."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import unclamp
from unclamp import Delayed, Dynamic, Guarded, PerBlock, Recipe, Scaling, Static

SCALINGS: dict[str, Scaling] = {
    "static": Static(16.0),
    "delayed": Delayed(3),
    "guarded": Guarded(3),
    "dynamic": Dynamic(),
    "dynamic powers": Dynamic(power_of_two=True),
}
BLOCKS: dict[str, Scaling] = {
    "dynamic": Dynamic(PerBlock(16, 16)),
    "delayed": Delayed(3, granularity=PerBlock(16, 16)),
    "guarded": Guarded(3, granularity=PerBlock(16, 16)),
}
SIZES = (32, 63, 64, 1)
"""63 rows are not divisible by 2 ranks, and 1 row leaves a rank without any."""


def net(sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    """Return blocks of a linear layer and a tanh, the same on each rank."""
    torch.manual_seed(0)
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairs))


def batch(step: int, rank: int) -> Tensor:
    """Return a rank's batch of a step."""
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 32, generator=g)


def shard(model: nn.Sequential, **how: Any) -> nn.Sequential:
    """Shard each block, and the rest."""
    for block in model:
        fully_shard(block, **how)
    fully_shard(model, **how)
    return model


def converted(scaling: Scaling, sizes: tuple[int, ...] = SIZES, **how: Any) -> nn.Sequential:
    """Return a model in FP8, sharded."""
    model = net(sizes)
    unclamp.convert(model, Recipe.uniform(Dynamic()).override("*", weight=scaling))
    return shard(model, **how)


@dataclass
class Seen:
    """What a training gave.

    Attributes:
        losses: Of each step, and the output of an evaluation after it.
        weights: What this rank holds of each parameter in the end.
        scales: All scales in the end.
        norms: Of the gradients of each step.
    """

    losses: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    rank: int,
    *,
    steps: int = 5,
    between: Callable[[int], None] = lambda _: None,
    microsteps: int = 1,
    how: str = "",
) -> Seen:
    """Train with large steps, so that weights outrun their histories."""
    seen = Seen()
    ways: dict[str, Any] = {how: True} if how in ("fused", "foreach") else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, **ways)
    for step in range(steps):
        total = 0.0
        for microstep in range(microsteps):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(microstep == microsteps - 1)
            loss = model(batch(10 * step + microstep, rank)).float().square().mean()
            loss.backward()
            total += loss.item()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
        between(step)
        model.eval()
        with torch.no_grad():
            seen.losses += [total, model(batch(step, rank)).float().sum().item()]
        model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    seen.weights = [local(p).flatten().tolist() for p in model.parameters()]
    for ledger in unclamp.nn.find_ledgers(model):  # pyright: ignore[reportAttributeAccessIssue]
        seen.scales += ledger.scale.tolist()
    return seen


def local(x: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    to_local: Callable[[], Tensor] | None = getattr(x, "to_local", None)
    return (x if to_local is None else to_local()).detach()


@dataclass
class Wire:
    """What went to other ranks: bytes of each all-gather's input and each all-reduce."""

    gathered: list[int] = field(default_factory=list)
    reduced: list[int] = field(default_factory=list)


class _Listen(TorchDispatchMode):
    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            assert args[1].dtype == torch.uint8
            self._wire.gathered.append(args[1].nbytes)
        if name == "c10d::allreduce_":
            self._wire.reduced.append(sum(x.nbytes for x in args[0]))
        return func(*args, **(kwargs or {}))


@contextmanager
def listening() -> Iterator[Wire]:
    """Count what goes to other ranks."""
    wire = Wire()
    with _Listen(wire):
        yield wire
