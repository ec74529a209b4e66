"""Two ranks of transformers' Trainer under DDP: each records its own loss, and all resume."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import numpy as np

import unclamp
from hf_training import differing, everything, own_log, status, trainer
from ranks import run_ranks
from unclamp.integrations.recorded import SCALING_STATE_FILE
from unclamp.integrations.transformers import attach

ASKED = {
    **{"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2},
    **{"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo"},
}


def train(rank: int, folder: str) -> dict[str, Any]:
    """Be a rank, as torchrun would start it: train, and go on from the middle in another folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # they have met already
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # or accelerate warns
    where = Path(folder)
    whole = trainer(where / "whole", **ASKED)
    attach(whole, unclamp.Recipe(), where / "run")
    whole.train()
    again = trainer(where / "again", **ASKED)
    attach(again, unclamp.Recipe(), where / "second")
    again.train(resume_from_checkpoint=str(where / "whole" / "checkpoint-2"))
    return {
        "world": whole.args.world_size,
        "log": own_log(whole),
        "differs": differing(everything(whole), everything(again)),
        "scales": {
            k: v.tolist() for k, v in unclamp.ScalingState(whole.model).state_dict().items()
        },
    }


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_each_rank_records_its_own_loss_whose_mean_is_trainers(tmp_path: Path) -> None:
    first, second = run_ranks(2, train, str(tmp_path))
    assert first["world"] == 2
    assert first["differs"] == second["differs"] == []
    assert first["scales"] == second["scales"]
    with unclamp.RunLog.open(tmp_path / "run") as log:
        rows = log.sql("SELECT rank, step, loss, grad_norm, lr FROM steps").to_pylist()
        assert log.header.world_size == 2
    assert status(tmp_path / "run") == status(tmp_path / "second") == "finished"
    own = {(row["rank"], row["step"]): row for row in rows}
    assert len(own) == 8
    for step, loss, norm, lr in first["log"]:
        losses = [own[rank, step]["loss"] for rank in (0, 1)]
        assert losses[0] != losses[1]
        assert np.mean(np.array(losses, np.float32), dtype=np.float32) == np.float32(loss)
        assert {own[rank, step]["grad_norm"] for rank in (0, 1)} == {norm}
        assert {own[rank, step]["lr"] for rank in (0, 1)} == {lr}
    assert (tmp_path / "whole" / "checkpoint-4" / SCALING_STATE_FILE).is_file()
