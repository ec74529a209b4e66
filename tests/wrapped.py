"""One small training, on one process or on several, under each way to wrap a model.

A step's batch is `[microsteps, ranks, rows, features]`: a process alone takes all of a microstep,
one of several its own part of it. Each sums its losses, so that the elements of every gradient are
those of the process alone, and only the mean that wrappers make of gradients is another: the
learning rate takes it out, by a power of two.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp.nn import find_ledgers

FEATURES, HIDDEN, OUTPUTS = 16, 24, 8
ROWS = 6


class Net(nn.Module):
    """Three layers and a spare one, which takes part in some steps."""

    def __init__(self, *, reentrant: bool | None = None, has_spare: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.middle = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.last = nn.Linear(HIDDEN, OUTPUTS)
        self.spare = nn.Linear(OUTPUTS, OUTPUTS) if has_spare else None

    def forward(self, x: Tensor, *, spare: bool = False) -> Tensor:
        """Return the output, through the spare layer too if told so."""
        x = torch.relu(self.first(x))
        if self.reentrant is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        x = self.last(x)
        return x if self.spare is None or not spare else self.spare(x)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a model is wrapped and trained.

    Attributes:
        wrapper: "none", "ddp", "fsdp1", "fsdp2", "hsdp", or "root": FSDP2 around the whole alone.
        after: Whether the model is converted after it was wrapped.
        reshard: Whether FSDP2 lets whole weights go after a forward.
        offload: Whether FSDP2 keeps shards on the host.
        microsteps: Forwards a step; with several there is a warm-up of one step, since ranks agree
            on the first scale in the first of them alone.
        reentrant: Kind of activation checkpointing; None: none.
        bf16: Whether FSDP2 computes in bfloat16.
        unused: Whether a layer takes part in every other step only.
        static: Whether DDP takes the graph for one that never changes.
        flat: Whether FSDP1 keeps parameters in a flat one only.
        by_hand: Whether the step is made on whole weights (`unshard`, step, `reshard`).
        scaling: Of all roles.
    """

    wrapper: str
    after: bool = False
    reshard: bool = True
    offload: bool = False
    microsteps: int = 1
    reentrant: bool | None = None
    bf16: bool = False
    unused: bool = False
    static: bool = False
    flat: bool = False
    by_hand: bool = False
    scaling: str = "delayed"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to: after each step the loss, and the ledger's scales and histories."""

    losses: list[float]
    scales: list[list[float]]
    histories: list[list[list[float]]]
    updates: int


def recipe(scaling: str, warmup_steps: int = 0) -> unclamp.Recipe:
    """Return a recipe whose histories are short, so that scales move."""
    kinds = {"delayed": unclamp.Delayed, "guarded": unclamp.Guarded}
    one = kinds[scaling](history_len=2) if scaling in kinds else unclamp.Static(scale=64.0)
    return replace(unclamp.Recipe.uniform(one), warmup_steps=warmup_steps)


def batches(steps: int, microsteps: int, ranks: int) -> Tensor:
    """Return inputs, `[steps, microsteps, ranks, rows, features]`; ranks differ in size."""
    generator = torch.Generator().manual_seed(1)
    shape = (steps, microsteps, ranks, ROWS, FEATURES)
    x = torch.randn(shape, generator=generator)
    size = torch.rand((steps, microsteps, ranks, 1, 1), generator=generator)
    return x * torch.exp2(2 * size)


def wrap(net: Net, case: Case) -> nn.Module:
    """Wrap a model for all ranks."""
    ranks = dist.get_world_size()
    if case.wrapper == "ddp":
        return DistributedDataParallel(
            net, find_unused_parameters=case.unused, static_graph=case.static
        )
    if case.wrapper == "fsdp1":
        parts = {"first": net.first, "last": net.last}
        how: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": not case.flat}
        for name, part in parts.items():
            setattr(net, name, FullyShardedDataParallel(part, **how))
        return FullyShardedDataParallel(net, **how)
    if case.wrapper == "none":
        return net
    is_hybrid = case.wrapper == "hsdp"
    shape, names = ((2, ranks // 2), ("dp", "fsdp")) if is_hybrid else ((ranks,), ("fsdp",))
    kept: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", shape, mesh_dim_names=names),
        "reshard_after_forward": case.reshard,
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if case.offload else OffloadPolicy(),
    }
    if case.bf16:
        kept["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for part in [] if case.wrapper == "root" else [net.first, net.middle, net.last]:
        fully_shard(part, **kept)
    fully_shard(net, **kept)
    return net


@contextlib.contextmanager
def _synced(model: Any, *, last: bool) -> Iterator[None]:
    """Have gradients reduced in a step's last backward only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        yield
    elif hasattr(model, "no_sync") and not last:
        with model.no_sync():
            yield
    else:
        yield


def train(rank: int, case: Case, ranks: int, steps: int = 4) -> Trained:
    """Train on one's own part of `ranks`; on all of it where the world is of one process."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    net = Net(reentrant=case.reentrant, has_spare=case.unused)
    made = recipe(case.scaling, warmup_steps=int(case.microsteps > 1))
    if not case.after:
        unclamp.convert(net, made)
    model: Any = wrap(net, case)
    if case.after:
        unclamp.convert(model, made)
    (ledger,) = find_ledgers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25 * world)
    losses, scales, histories = [], [], []
    for step, batch in enumerate(batches(steps, case.microsteps, ranks)):
        total = 0.0
        for number, whole in enumerate(batch):
            x = whole[rank] if world > 1 else whole.flatten(0, 1)
            # In bfloat16 FSDP's policy says what goes in, and the sum is in float32 all the same.
            with _synced(model, last=number == len(batch) - 1):
                y = model(x, spare=True) if case.unused and step % 2 else model(x)
                loss = y.float().square().sum() / (ranks * ROWS * OUTPUTS * len(batch))
                loss.backward()
            total += float(loss.detach())
        if case.by_hand:
            _step_on_whole(model, optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        scales.append(ledger.scale.tolist())
        histories.append(ledger.amax_history.tolist())
    return Trained(losses=losses, scales=scales, histories=histories, updates=ledger.updates)


def _step_on_whole(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Step where the module has its weights whole; the optimizer holds the shards."""
    model.unshard()
    optimizer.step()
    model.reshard()
