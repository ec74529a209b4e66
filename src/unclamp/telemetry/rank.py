"""Which rank this process is, and the id that all ranks of its run share.

No collective is called: a recorder on rank 0 alone must neither wait for the other ranks nor
disturb the order of their collectives. Ranks agree through the store that torch.distributed met
in, or from what the launcher told them all.
"""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

_KEY = "unclamp/run_id"
_LAUNCHER = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
)
"""Variables that torchrun sets alike for all ranks of an attempt, and differently for others."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a process in its run.

    `run_id` is the same for all ranks of a launch, and for all runs that it records; None where
    ranks have no way to agree on it.
    """

    rank: int = 0
    world_size: int = 1
    run_id: str | None


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return this process's place: from torch.distributed, else the launcher, else alone.

    The launcher's variables count when RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all
    there and make sense.
    """
    if dist.is_available() and dist.is_initialized():
        return Place(rank=dist.get_rank(), world_size=dist.get_world_size(), run_id=_agree())
    return _launched(environment) or Place(run_id=str(uuid.uuid4()))


def _agree() -> str | None:
    """Return the id that the first rank to ask has put into the store."""
    try:
        store = dist.distributed_c10d._get_default_store()
        # torchrun's store outlives the workers that it restarts.
        key = f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        return store.compare_set(key, "", str(uuid.uuid4())).decode()
    except (AttributeError, RuntimeError, ValueError):
        return None  # a backend without a store


def _launched(environment: Mapping[str, str]) -> Place | None:
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        shared = [environment["MASTER_ADDR"], environment["MASTER_PORT"]]
    except (KeyError, ValueError):
        return None
    if not 0 <= rank < world_size:
        return None
    shared = [environment.get(name, "") for name in _LAUNCHER]
    run_id = str(uuid.uuid5(uuid.NAMESPACE_URL, "unclamp:" + " ".join(shared)))
    return Place(rank=rank, world_size=world_size, run_id=run_id)
