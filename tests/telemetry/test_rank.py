"""The place of a process, and two processes of torchrun that record one run."""

import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import torch
import torch.distributed as dist
from torch import nn

import unclamp
from patience import PATIENCE_S
from unclamp import RunLog
from unclamp.telemetry.rank import Place, find_place

LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}

TRAIN = """
import sys
import torch
import torch.distributed as dist
import unclamp
if sys.argv[2] == "joined":
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
unclamp.convert(model, unclamp.Recipe())
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
with unclamp.Recorder(model, sys.argv[1]) as recorder:
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(10, 12)).square().mean()
        loss.backward()
        optimizer.step()
        recorder.step(loss=loss)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_a_process_alone_is_rank_0_of_a_run_of_its_own():
    place = find_place({})
    assert (place.rank, place.world_size) == (0, 1)
    assert place.run_id != find_place({}).run_id


def test_a_launched_process_knows_its_rank_and_shares_the_id():
    place = find_place(LAUNCHED)
    assert (place.rank, place.world_size) == (1, 2)
    assert find_place(LAUNCHED | {"RANK": "0"}).run_id == place.run_id


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "WORLD_SIZE"])
def test_another_launch_has_another_id(name: str):
    assert find_place(LAUNCHED | {name: "9"}).run_id != find_place(LAUNCHED).run_id


@pytest.mark.parametrize(
    "change", [{"RANK": "x"}, {"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": ""}]
)
def test_variables_that_make_no_sense_do_not_count(change: dict[str, str]):
    place = find_place(LAUNCHED | change)
    assert place == Place(run_id=place.run_id)


def test_variables_of_something_else_do_not_count():
    assert find_place({"RANK": "3", "WORLD_SIZE": "8"}).rank == 0


def test_an_initialised_group_decides_and_agrees_on_one_id(tmp_path: Path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        place = find_place(LAUNCHED)
        assert (place.rank, place.world_size) == (0, 1)
        assert place.run_id is not None
        assert find_place(LAUNCHED).run_id == place.run_id
    finally:
        dist.destroy_process_group()


def test_a_site_id_is_one_of_its_run_so_that_files_join_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The query of the README, on the files of two ranks that hold different modules."""
    layers = {0: ["down", "shared"], 1: ["up", "gate", "shared"]}
    for rank, names in layers.items():
        for name, value in (LAUNCHED | {"RANK": str(rank), "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        model = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
        unclamp.convert(model, unclamp.Recipe())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with unclamp.Recorder(model, tmp_path / "run") as recorder:
            for size in (1.0, 1.0, 100.0):
                for layer in model.values():
                    layer(torch.full((4, 16), size)).sum().backward()
                optimizer.step()
                recorder.step(loss=0.0)
    rows = duckdb.execute(
        f"SELECT fqn, role, sum(saturated) FROM '{tmp_path}/run/casts/*.parquet' "
        f"JOIN '{tmp_path}/run/sites/*.parquet' USING (site) GROUP BY ALL"
    ).fetchall()
    found = {fqn: saturated for fqn, role, saturated in rows if role == "input"}
    # The last step's input of 4 x 16 elements overshoots; "shared" has one on each rank.
    assert found == {"down": 64, "up": 64, "gate": 64, "shared": 128}
    assert sum(saturated for _, _, saturated in rows) == sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["joined", "apart"])
def test_two_processes_of_torchrun_record_one_run(tmp_path: Path, how: str):
    (tmp_path / "train.py").write_text(TRAIN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "train.py"), str(tmp_path / "run"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    with RunLog.open(tmp_path / "run") as log:
        assert (log.header.status, log.header.world_size) == ("finished", 2)
        assert log.header.run_id is not None
        assert log.steps().select(["step", "rank"]).to_pylist() == [
            {"step": step, "rank": rank} for step in range(3) for rank in range(2)
        ]
        assert log.casts().num_rows == 2 * 3 * 6
        assert log.sites()["rank"].to_pylist() == [0, 1] * 6
        assert len(log.named_sites()) == 6
        query = "SELECT count(*) AS rows FROM casts JOIN sites USING ({})"
        for columns in ("site", "rank, site"):
            assert log.sql(query.format(columns))["rows"].to_pylist() == [2 * 3 * 6]
        assert log.summaries()["rank"].to_pylist() == [0] * 6 + [1] * 6
        assert repr(log).endswith("run': finished, 3 steps, 6 sites, ranks 0-1)")
