"""Lightning and Fabric on two processes under DDP: one update a step, of what both have seen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import unclamp
from patience import PATIENCE_S
from unclamp import RunLog

pytest.importorskip("lightning")
pytestmark = pytest.mark.xdist_group("lightning")

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import lightning as L
import unclamp
from unclamp.integrations.lightning import FabricRecorder, UnclampCallback

out = sys.argv[1]
STEPS = 4


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    scales = [1 + i * (1 + rank) for i in range(2 * STEPS)]
    return [torch.randn(8, 16, generator=generator) * scale for scale in scales]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = network(), []

    def training_step(self, batch, index):
        loss = self.net(batch).square().mean()
        self.losses.append(float(loss.detach()) / 2)
        return loss

    def train_dataloader(self):
        every = batches(self.trainer.global_rank)
        return torch.utils.data.DataLoader(every, batch_size=None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def said(model, losses):
    state = unclamp.ScalingState(model).state_dict()
    name = next(name for name in state if name.endswith("0.unclamp_input_amax_history"))
    return {"history": state[name][:STEPS].tolist(), "losses": losses,
            "weights": float(model.state_dict()[name.split("unclamp")[0] + "weight"].sum()),
            "seen": [float(batch.abs().max()) for batch in batches(rank)]}


module = Net()
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, accumulate_grad_batches=2,
    logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, use_distributed_sampler=False,
    callbacks=[UnclampCallback(unclamp.Recipe(), out + "/trainer")],
)
trainer.fit(module)
rank = trainer.global_rank
got = {"trainer": said(module, module.losses)}

with FabricRecorder(unclamp.Recipe(), out + "/fabric") as recorder:
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp", callbacks=[recorder])
    fabric.launch()
    plain = network()
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    losses = []
    for index, batch in enumerate(batches(rank)):
        is_last = index % 2 == 1
        with fabric.no_backward_sync(model, enabled=not is_last):
            loss = model(batch).square().mean() / 2
            fabric.backward(loss)
        losses.append(float(loss.detach()))
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
got["fabric"] = said(plain, losses)
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(got, file)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    source = str(Path(unclamp.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "train.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": "",
             "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("converted 2 layers") == 2  # rank 0, twice
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("which", ["trainer", "fabric"])
def test_ranks_update_once_a_step_and_alike(which: str, trained) -> None:
    ranks = [each[which] for each in trained[1]]
    largest = [max(pair) for pair in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    steps = [max(largest[i : i + 2]) for i in range(0, len(largest), 2)]
    assert ranks[0]["history"] == ranks[1]["history"] == steps[::-1]
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.parametrize("which", ["trainer", "fabric"])
def test_each_rank_records_its_own_losses(which: str, trained) -> None:
    folder, ranks = trained
    with RunLog.open(folder / which) as log:
        assert log.header.status == "finished"
        assert log.header.metadata["world_size"] == 2
        got = log.sql("SELECT rank, loss FROM steps ORDER BY rank, step").to_pylist()
    for rank in (0, 1):
        losses = ranks[rank][which]["losses"]
        sums = [sum(losses[i : i + 2]) for i in range(0, len(losses), 2)]
        assert [row["loss"] for row in got if row["rank"] == rank] == pytest.approx(sums, rel=1e-6)
