"""A recording of several ranks has the single process's totals: what ranks hold alike counts once.

The scale is fixed, so that each element is clamped or not whatever its neighbours in the batch are:
then two halves of a batch lose what the whole one loses, element by element. The loss is a sum over
tokens, which makes the gradients of the halves those of the whole.
"""

from pathlib import Path
from typing import Any

import pytest
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

import unclamp
from ranks import run_ranks
from unclamp.analysis import read_curve
from unclamp.nn.convert import find_ledgers
from unclamp.nn.replicas import repeated_sites
from unclamp.runlog import RunLog

STEPS, TOKENS = 3, 8
COUNTS = ("elements", "saturated", "underflowed", "nonfinite", "overshoot")


def build(*, is_alone: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    clamping = unclamp.Static(scale=300.0)
    recipe = unclamp.Recipe(input=clamping, weight=clamping, grad_output=clamping)
    unclamp.convert(model, recipe, group=() if is_alone else None)
    return model


def batch(step: int) -> Tensor:
    return torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(step))


def train(path: str, model: nn.Module, recorded: nn.Module, part: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with unclamp.Recorder(recorded, path) as recorder:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(batch(step)[part]).square().sum()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)


def work(rank: int, path: str, kind: str) -> None:
    part = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    model: Any = build()
    recorded = model
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "FSDP1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif kind == "FSDP2":
        fully_shard(model)
    else:
        part = slice(None)
        mesh = init_device_mesh("cpu", (2,))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh, plan)
    train(path, model, recorded, part)


@pytest.mark.parametrize("kind", ["DDP", "FSDP1", "FSDP2", "TP"])
def test_totals_of_two_ranks_are_those_of_the_single_process(tmp_path: Path, kind: str):
    model = build()
    train(str(tmp_path / "one"), model, model, slice(None))
    run_ranks(2, work, str(tmp_path / "two"), kind)
    with RunLog.open(tmp_path / "one") as log:
        one = dict(zip([s.name for s in log.named_sites()], log.windows().totals, strict=True))
    with RunLog.open(tmp_path / "two") as log:
        two = dict(zip([s.name for s in log.named_sites()], log.windows().totals, strict=True))
    assert sum(totals.saturated for totals in one.values()) > 20  # enough to tell
    assert two.keys() == one.keys()
    for name, totals in one.items():
        for count in COUNTS:
            assert getattr(two[name], count) == getattr(totals, count), (str(name), count)
    alone, mean = (read_curve(tmp_path / name).series["loss"] for name in ("one", "two"))
    parts = 1 if kind == "TP" else 2  # a rank's loss is a sum over its tokens
    assert [parts * loss for loss in mean if loss] == pytest.approx(alone, rel=1e-6)


def roles_repeated(rank: int) -> dict[str, list[str]]:
    """Data parallel over the first dimension of the mesh, tensor parallel over the second."""
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for kind in ("FSDP2 and TP", "HSDP"):
        model = build()
        if kind == "HSDP":
            fully_shard(model, mesh=mesh)
        else:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
            fully_shard(model, mesh=mesh["dp"])
        (ledger,) = find_ledgers(model)
        repeated = repeated_sites(ledger, model)
        found[kind] = sorted(str(ledger.sites[index].name) for index in repeated)
    dist.barrier()
    return found


def test_what_is_repeated_on_a_mesh_of_two_dimensions():
    ranks = run_ranks(4, roles_repeated)
    # Weights are spread over tp and copied over dp: ranks 2 and 3 repeat those of 0 and 1.
    # The input of the column-wise layer, and the gradient of the row-wise one, are the same on
    # both ranks of a tp group: 1 repeats 0, and 3 repeats 2.
    same = ["0 input", "2 grad_output"]
    weights = ["0 weight", "2 weight"]
    assert [rank["FSDP2 and TP"] for rank in ranks] == [
        [],
        same,
        weights,
        sorted([*same, *weights]),
    ]
    assert [rank["HSDP"] for rank in ranks] == [[], weights, weights, weights]


def resume(rank: int, path: str) -> list[int]:
    attempts = []
    for begins in (0, 2):
        model = build(is_alone=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        dist.barrier()
        with unclamp.Recorder(model, path, resume=True) as recorder:
            for step in range(begins, begins + 3):
                loss = model(batch(step)).square().sum()
                loss.backward()
                optimizer.step()
                recorder.step(step, loss=loss)
        attempts.append(recorder._writer.attempt)
        dist.barrier()
    return attempts


def test_ranks_of_one_launch_go_on_together(tmp_path: Path):
    assert run_ranks(2, resume, str(tmp_path / "run")) == [[0, 1], [0, 1]]
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["step"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert [a.first_step for a in log.attempts] == [0, 2]


def test_a_recorder_that_goes_on_asks_for_the_number_of_its_first_step(tmp_path: Path):
    model = build()
    with unclamp.Recorder(model, tmp_path, resume=True) as recorder:
        with pytest.raises(unclamp.RunLogError, match="number of the step"):
            recorder.step(loss=1.0)
        recorder.step(40, loss=1.0)
        recorder.step(loss=1.0)
    with RunLog.open(tmp_path) as log:
        assert log.steps()["step"].to_pylist() == [40, 41]
