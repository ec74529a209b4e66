"""Accelerate on two ranks: DDP, and FSDP2 whose weights come from rank 0 (`cpu_ram_efficient`).

The truth is the run that was never interrupted, and the plain model's keys.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranks import run_ranks
from truths.wrapped import quiet
from unclamp import Delayed, Recipe, ScalingState
from unclamp.nn import find_ledgers

pytest.importorskip("accelerate")

STEPS, RANKS, WIDTH = 4, 2, 8
RECIPE = Recipe.uniform(Delayed(history_len=4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def batch(step: int, rank: int) -> Tensor:
    g = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, WIDTH, generator=g) * (1 + step % 3)


class Loop:
    def __init__(self, kind: str, converts: str, run: Path, seed: int) -> None:
        from accelerate import Accelerator  # of this rank
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        from unclamp.integrations.accelerate import attach

        for each in (AcceleratorState, GradientState):
            each._reset_state()
        PartialState._shared_state = {}  # the process group stays
        plugin = None
        if kind == "fsdp2":
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                cpu_ram_efficient_loading=True,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                state_dict_type="SHARDED_STATE_DICT",
            )
        # The group is there already.
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", OMP_NUM_THREADS="1")
        self.accelerator = accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        if plugin is not None:  # which accelerate allows on accelerators alone
            PartialState().distributed_type = DistributedType.FSDP
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        self.rank = accelerator.process_index
        torch.manual_seed(seed + self.rank)  # rank 1 has other weights
        model = Net()
        if converts == "before":
            self.attached = attach(accelerator, model, recipe=RECIPE, run=run)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if converts == "after":
            self.attached = attach(accelerator, self.model, recipe=RECIPE, run=run)
        self.losses: list[float] = []

    def train(self, steps: range) -> "Loop":
        for step in steps:
            loss = self.model(batch(step, self.rank)).square().mean()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(float(loss.detach()))
        return self

    def end(self) -> list[Any]:
        state = self.model.state_dict() | ScalingState(self.model).state_dict()
        whole = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in state.items()}
        self.attached.detach()
        return [self.losses, {k.removeprefix("module."): v.tolist() for k, v in whole.items()}]


@quiet
def _runs(rank: int, kind: str, folder: Path) -> Any:
    ends = {}
    for converts in ("before", "after"):
        own = folder / converts
        whole = Loop(kind, converts, own / "whole", 0).train(range(STEPS))
        assert find_ledgers(whole.model)[0].count() == STEPS
        first = Loop(kind, converts, own / "run", 0).train(range(2))
        first.accelerator.save_state(str(own / "checkpoint"))
        first.accelerator.wait_for_everyone()
        first.attached.detach()
        second = Loop(kind, converts, own / "run", 5)
        second.accelerator.load_state(str(own / "checkpoint"))
        second.train(range(2, STEPS))
        second.losses = first.losses + second.losses
        ends[converts] = whole.end(), second.end(), second.attached.step
    return ends


@pytest.mark.cell("Accelerate", "resume bit for bit")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_convert_before_or_after_prepare_and_resume_bit_for_bit(kind, tmp_path) -> None:
    ranks = run_ranks(RANKS, _runs, kind, tmp_path)
    states = []
    for ends in ranks:
        for whole, resumed, step in ends.values():
            assert resumed == whole
            assert step == STEPS
        assert ends["before"][0] == ends["after"][0]
        states.append(ends["before"][0][1])
    assert states[0] == states[1]
    assert {key for key in states[0] if "unclamp_" not in key} == set(Net().state_dict())
    for converts in ("before", "after"):
        folder = tmp_path / converts / "checkpoint"
        assert json.loads((folder / "unclamp_step.json").read_text()) == {"step": 2}
        assert (folder / "unclamp_scaling_state.pt").exists()
