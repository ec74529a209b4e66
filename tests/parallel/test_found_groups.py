"""Who holds a product: found in meshes and wrappers, never the world by default."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ranks import run_ranks
from unclamp.nn.groups import follow_wrappers, give, groups_of, max_over


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def _ranks_of(layer: nn.Module, root: nn.Module) -> list[list[int]]:
    return [dist.get_process_group_ranks(group) for group in groups_of(layer, root)]


def _wrapped(kind: str, net: nn.Sequential) -> nn.Module:
    """Return a model wrapped for 4 ranks."""
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "ddp of a half":
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        return DistributedDataParallel(net, process_group=halves[dist.get_rank() // 2])
    if kind == "fsdp1":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    if kind == "fsdp1, flat":
        net[0] = FullyShardedDataParallel(net[0], device_id=torch.device("cpu"))
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=False)
    if kind == "fsdp2":
        fully_shard(net, mesh=flat)
        return net
    if kind == "hsdp":
        fully_shard(net, mesh=square)
        return net
    if kind == "a stage's fsdp2":
        fully_shard(net, mesh=square["dp"])
        return net
    parallelize_module(net, square["tp"], {"0": ColwiseParallel()})
    if kind == "tp and fsdp2":
        fully_shard(net, mesh=square["dp"])
        return net
    assert kind == "tp"
    return net


def _find(rank: int, kind: str) -> Any:
    follow_wrappers()
    net = _net()
    layer = net[0]
    assert groups_of(layer, net) == ()
    wrapped = _wrapped(kind, net)
    before = _ranks_of(layer, net)
    if kind.startswith("fsdp2"):
        wrapped(torch.ones(2, 8)).sum()  # the weights stay put together until backward
    return before, _ranks_of(layer, net)


@pytest.mark.parametrize(
    ("kind", "of_rank_1"),
    [
        ("ddp", [[0, 1, 2, 3]]),
        ("ddp of a half", [[0, 1]]),
        ("fsdp1", [[0, 1, 2, 3]]),
        ("fsdp1, flat", [[0, 1, 2, 3]]),
        ("fsdp2", [[0, 1, 2, 3]]),
        ("hsdp", [[1, 3], [0, 1]]),
        ("a stage's fsdp2", [[1, 3]]),
        ("tp", [[0, 1]]),
        ("tp and fsdp2", [[1, 3], [0, 1]]),
    ],
)
def test_groups_are_found(kind: str, of_rank_1: list[list[int]]) -> None:
    assert run_ranks(4, _find, kind)[1] == (of_rank_1, of_rank_1)


def _find_others(rank: int) -> dict[str, Any]:
    net = _net()
    early = DistributedDataParallel(net[2])
    follow_wrappers()
    left_out = _net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        left_out, ["0.weight", "0.bias"]
    )
    wrapper = DistributedDataParallel(left_out)
    given = nn.Linear(8, 8)
    give({"layer": given}, dist.new_group([rank], use_local_synchronization=True))
    found = {
        "wrapped before": _ranks_of(early.module, net),
        "around a part": _ranks_of(net[0], net),
        "left out": _ranks_of(left_out[0], left_out),
        "not left out": _ranks_of(left_out[2], left_out),
        "given": _ranks_of(given, given),
    }
    del wrapper
    return found


def test_a_wrapper_speaks_for_what_it_takes_care_of() -> None:
    assert run_ranks(2, _find_others)[0] == {
        "wrapped before": [[0, 1]],
        "around a part": [],
        "left out": [],
        "not left out": [[0, 1]],
        "given": [],
    }


AMAXES = [[1.0, 9.0], [5.0, -1.0]]


def _max(rank: int) -> tuple[torch.dtype, list[float], list[float]]:
    x = torch.tensor(AMAXES[rank], dtype=torch.float64)
    agreed = max_over((dist.group.WORLD,), x)
    return agreed.dtype, agreed.tolist(), x.tolist()


def test_a_maximum_over_groups_leaves_its_argument() -> None:
    found = run_ranks(2, _max)
    assert found == [(torch.float32, [5.0, 9.0], AMAXES[rank]) for rank in range(2)]


def test_alone_there_is_no_group() -> None:
    assert groups_of(nn.Linear(2, 2), None) == ()
