"""`torchrun --max-restarts`: a rank is killed, and the run goes on in a new attempt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unclamp
from unclamp.runlog import RunLog

SCRIPT = """
import os, signal, sys
from datetime import timedelta
import torch, torch.distributed as dist, unclamp

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
unclamp.convert(model, unclamp.Recipe(), group=dist.group.WORLD)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with unclamp.Recorder(model, sys.argv[1], resume=True) as recorder:
    for step in range(5 * restarts, 10):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        recorder.step(step, loss=loss)
        recorder.flush()
        if restarts == 0 and step == 5:
            dist.barrier()  # both have this step on disk
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
dist.destroy_process_group()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MANY_S = 300
"""Seconds after which a launch that does not end is killed."""


@pytest.mark.slow
def test_a_run_goes_on_when_torchrun_starts_anew_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*TORCHRUN, "--max-restarts", "1", "train.py", str(run)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(unclamp.__file__).parents[1]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            # Else ranks that start anew find gloo's addresses of those that ended.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=MANY_S)
    finally:
        process.terminate()  # torchrun ends its ranks then
        process.wait(timeout=60)
    assert process.returncode == 0, said
    with RunLog.open(run) as log:
        assert log.header.status == "finished"
        attempts = [(a.number, a.first_step, a.ended) for a in log.attempts]
        steps = sorted((row["rank"], row["step"]) for row in log.steps().to_pylist())
    assert attempts == [(0, 0, "killed"), (1, 5, "finished")]
    assert steps == [(rank, step) for rank in (0, 1) for step in range(10)]
