"""Where ranks come from: those of a training that takes snapshots, and those that torchrun started.

`unclamp explain` under torchrun meets the others by itself: a build function expects to be called
where its run called it, with the process group there. One that makes the group itself is let.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from unclamp.errors import ReplayError
from unclamp.explain.facts import sites_of
from unclamp.explain.parts import Part
from unclamp.explain.ranks import Ranks, all_ranks, are_several
from unclamp.explain.shards import check_takeable
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Step, Training, as_training
from unclamp.telemetry.rank import find_place

_TWICE = "initialize the default process group twice"


def check_several(model: nn.Module, *, explains: bool) -> None:
    """Raise unless snapshots of several ranks can be taken as asked.

    Raises:
        ReplayError: They are to be explained in place, or states are not each rank's own.
    """
    if explains:
        raise ReplayError(
            f'on_spike="explain" is for one process, and these are {dist.get_world_size()} ranks: '
            'use on_spike="keep", and afterwards torchrun ... -m unclamp explain RUN'
        )
    check_takeable(model)


def own_part(ranks: Ranks) -> Part:
    """Return which part of each snapshot this rank writes."""
    if not ranks.are_several:
        return Part(rank=0, count=1)
    return Part(rank=ranks.rank, count=ranks.count, launch=find_place().run_id)


@contextmanager
def meeting() -> Iterator[Ranks]:
    """Give the ranks that explain together: of the process group, or those that torchrun started.

    A process group that is made here, gloo for the host and NCCL for GPUs, is gone afterwards.

    Raises:
        ReplayError: Not all of them come.
    """
    is_ours = _joins()
    ranks = all_ranks()
    yield ranks
    if is_ours and dist.is_initialized():
        dist.destroy_process_group()


def _joins() -> bool:
    """Make the process group if torchrun started several ranks and nobody has; return whether."""
    if not dist.is_available() or dist.is_initialized() or find_place().world_size == 1:
        return False
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, count = next(rendezvous("env://"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            # Under names of its own: a build function may make the group anew, and would read where
            # the ranks of this one were.
            store=dist.distributed_c10d.PrefixStore("unclamp", store),
            rank=rank,
            world_size=count,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ReplayError(f"the ranks that torchrun started cannot meet: {first}") from error
    return True


def built(build: Callable[[], Any], ranks: Ranks) -> Training:
    """Return what a build function makes, also one that makes the process group itself.

    What it makes may be the trainer of an integration, which knows what it trains.

    Raises:
        ReplayError: It makes something else.
    """
    try:
        return as_training(build())
    except ValueError as error:
        if _TWICE not in str(error) or not are_several():
            raise
    dist.destroy_process_group()
    training = as_training(build())
    ranks.rejoin()
    return training


def warm_up(training: Training, step: Step, snapshot: Snapshot, ranks: Ranks) -> None:
    """Do one step that counts for nothing, as the run had done some.

    DDP puts gradients into other buckets after its first step, in which sums may have another
    order: so that of the first replay would not be that of the run.

    Raises:
        ReplayError: The ranks hold different layers.
    """
    if not ranks.are_several:
        return
    sites = ranks.gathered(sorted(sites_of(training.model)))
    if any(each != sites[0] for each in sites):
        raise ReplayError(
            "expected the same FP8 layers on all ranks, as in DDP and FSDP2; a run whose ranks "
            "hold different ones, as in a pipeline, cannot be explained yet"
        )
    if snapshot.step in snapshot.batches:
        step(training, snapshot.batches[snapshot.step].fresh())
