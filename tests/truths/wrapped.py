"""A small model in each of the ways in which torch lays one out on several ranks, and its steps."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from unclamp import Guarded, Recipe, convert
from unclamp.nn import find_ledgers

P = ParamSpec("P")
R = TypeVar("R")
SAYINGS = (
    "FSDP2-wrapped module",  # a Linear's output is a view
    "`_get_pg_default_device`",  # FSDP1 calls what torch deprecates
    "Multiple backends are registered",
    "torch.distributed is disabled",  # a distributed checkpoint of one process
    "Please use DTensor instead",
    "FSDP.state_dict_type",
)
"""How those warnings of torch begin that no caller of it can avoid."""
Kind = Literal["plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2+tp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RECIPE = Recipe.uniform(Guarded(history_len=4))


def net(seed: int = 0, recipe: Recipe = RECIPE, *, is_alone: bool = False) -> nn.Sequential:
    """Return a converted model, of 12 to 10 to 6 features, which may share with no rank."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6, bias=False))
    convert(model, recipe, group=() if is_alone else None)
    return model


def wrapped(model: nn.Sequential, kind: Kind) -> nn.Module:
    """Return the model, laid out on the ranks that there are."""
    if kind == "plain":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    count = dist.get_world_size()
    if kind in ("tp", "fsdp2+tp"):
        mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if kind == "fsdp2+tp":
            _shard(model, mesh["data"])
    if kind == "hsdp":
        _shard(model, init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("copy", "shard")))
    if kind == "fsdp2":
        _shard(model, init_device_mesh("cpu", (count,)))
    return model


def _shard(model: nn.Sequential, mesh: Any) -> None:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def batch(step: int, kind: Kind) -> Tensor:
    """Return a rank's part of a step's batch, `[rows, 12]`."""
    generator = torch.Generator().manual_seed(100 + step)
    whole = torch.randn(8, 12, generator=generator) * (1 + step % 3)
    if kind in ("plain", "tp"):
        return whole
    parts, part = dist.get_world_size(), dist.get_rank()
    if kind == "fsdp2+tp":
        parts, part = parts // 2, part // 2
    return whole.chunk(parts)[part]


def train(model: nn.Module, optimizer: Optimizer, kind: Kind, steps: range) -> list[float]:
    """Take some steps; return this rank's loss of each."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step, kind)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(model: nn.Module) -> list[list[float]]:
    """Return all histories and scales that this rank knows."""
    (ledger,) = find_ledgers(model)
    return [*ledger.amax_history.tolist(), ledger.scale.tolist(), [ledger.count()]]


def quiet(work: Callable[P, R]) -> Callable[P, R]:
    """Have a function not stop at warnings that torch gives about itself."""

    @functools.wraps(work)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            for saying in SAYINGS:
                warnings.filterwarnings("ignore", message=saying)
            return work(*args, **kwargs)

    return quietly
