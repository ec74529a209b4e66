"""A training on four ranks in which much happens; in the end one of them is killed."""

import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unclamp
from ranks import Failure, outcomes
from unclamp import Delayed, Dynamic, Guarded, PerBlock, Recipe
from unclamp.nn import Ledger, find_ledgers

RANKS, KILLED, COLLECTIVE_S = 4, 2, 30
SWITCHES: list[dict[str, Any]] = [
    {"input": Dynamic()},
    {"input": Delayed(history_len=2), "grad_output": Guarded()},
    {"weight": Delayed(granularity=PerBlock(8, 8))},
    {"weight": Guarded(history_len=5)},
    {"scaling": Delayed()},
]
GLOBS = ["*", "*.0.*", "*mlp*", "*q_proj"]


class Droppable(nn.Module):
    """A decoder layer that is left out of some steps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_left_out = False

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return x if self.is_left_out else self.layer(x, **others)


def _model() -> tuple[nn.Module, list[Droppable]]:
    # The study imports transformers, which other tests of several processes need not wait for.
    from unclamp.study.config import ModelConfig
    from unclamp.study.models import build_model

    torch.manual_seed(0)
    model: Any = build_model(ModelConfig(hidden_size=16, intermediate_size=32, layers=3, heads=2))
    layers = model.model.layers
    for i in range(len(layers)):
        layers[i] = Droppable(layers[i])
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=4)), skip=["lm_head"])
    return model, list(layers)


def _is_skipped(step: int) -> bool:
    return random.Random(f"skip {step}").random() < 0.15


def _digest(ledger: Ledger) -> str:
    held = (ledger.scale, ledger.amax_history)
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in held)).hexdigest()


def _soak(rank: int, steps: int, folder: str) -> None:
    net, layers = _model()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (ledger,) = find_ledgers(model)
    own, alike = random.Random(rank), random.Random("all ranks")
    killed_at = 0.0
    with (Path(folder) / f"rank-{rank}").open("w", buffering=1) as log:
        try:
            for step in range(steps + 3):
                if step == steps:
                    killed_at = time.monotonic()
                    if rank == KILLED:
                        os.kill(os.getpid(), signal.SIGKILL)
                for layer in layers:
                    layer.is_left_out = own.random() < 0.5 and step % RANKS != rank
                if alike.random() < 0.1:
                    unclamp.switch(model, alike.choice(GLOBS), **alike.choice(SWITCHES))
                tokens = torch.tensor([[own.randrange(256) for _ in range(12)] for _ in range(2)])
                model(input_ids=tokens, labels=tokens).loss.backward()
                if not _is_skipped(step):
                    optimizer.step()
                optimizer.zero_grad()
                log.write(f"{_digest(ledger)} {ledger.updates}\n")
        finally:
            if killed_at:
                log.write(f"ended after {time.monotonic() - killed_at:.1f} s\n")


def _check(steps: int, folder: Path) -> None:
    ends = outcomes(RANKS, _soak, steps, str(folder), collective_s=COLLECTIVE_S)
    lines = [(folder / f"rank-{rank}").read_text().splitlines() for rank in range(RANKS)]
    assert [len(each[:steps]) for each in lines] == [steps] * RANKS, ends
    for step in range(steps):
        assert len({each[step] for each in lines}) == 1, step
    made = sum(not _is_skipped(step) for step in range(steps))
    assert 0 < made < steps
    assert lines[0][steps - 1].split()[1] == str(made)
    assert len({line.split()[0] for line in lines[0][:steps]}) >= made - 1  # histories do move
    for rank, (end, each) in enumerate(zip(ends, lines, strict=True)):
        assert isinstance(end, Failure)
        if rank == KILLED:
            assert end.kind == "killed"
            continue
        assert end.kind in ("RuntimeError", "DistBackendError", "DistNetworkError"), end
        assert each[-1].startswith("ended after ")
        assert float(each[-1].split()[2]) < COLLECTIVE_S + 10


def test_ranks_keep_one_history_and_none_hangs_when_one_is_killed(tmp_path: Path) -> None:
    _check(30, tmp_path)


@pytest.mark.slow
def test_ranks_keep_one_history_for_long(tmp_path: Path) -> None:
    _check(300, tmp_path)
