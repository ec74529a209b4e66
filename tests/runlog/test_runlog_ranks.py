"""Several writers: ranks of one run share a folder, and nobody else does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE_S
from truths.rows import step
from unclamp.errors import RunLogError
from unclamp.runlog import Header, RunLog, RunLogWriter, folder

RACE = """
import sys, time
from unclamp.errors import RunLogError
from unclamp.runlog import Header, RunLogWriter
print("ready", flush=True)
sys.stdin.readline()
try:
    writer = RunLogWriter(sys.argv[1], header=Header(unclamp_version="0.1", run_id=sys.argv[2]))
except RunLogError as error:
    print(error)
else:
    writer.add("steps", {"step": [0], "time_s": [0.0]})
    writer.close()
    print("won")
"""


def header(run_id: str | None) -> Header:
    return Header(unclamp_version="0.1.0", world_size=3, run_id=run_id)


def test_of_processes_that_race_for_a_folder_one_wins(tmp_path: Path):
    command = [sys.executable, "-c", RACE, str(tmp_path / "run")]
    racers = [
        subprocess.Popen(
            [*command, run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for run_id in "abc"
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = sorted(racer.communicate(timeout=PATIENCE_S)[0] for racer in racers)
    assert answers[2] == "won\n"
    for refusal in answers[:2]:
        assert refusal.startswith(f"{tmp_path / 'run'} already holds a run")
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps().num_rows == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_writer_of_a_rank_is_refused_while_the_first_writes(tmp_path: Path, rank: int):
    with RunLogWriter(tmp_path, header=header("a"), rank=rank) as writer:
        with pytest.raises(RunLogError, match="already holds a run, begun by process"):
            RunLogWriter(tmp_path, header=header("a"), rank=rank)
        writer.add("steps", step(0))
    assert len(list(tmp_path.glob("steps/*"))) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("other", ["b", None])
def test_a_rank_of_another_run_is_refused_and_leaves_no_claim(
    tmp_path: Path, order: tuple[int, int], other: str | None
):
    first, second = order
    with RunLogWriter(tmp_path, header=header("a"), rank=first):
        with pytest.raises(RunLogError, match=f"what rank {first} of another run wrote"):
            RunLogWriter(tmp_path, header=header(other), rank=second)
        with RunLogWriter(tmp_path, header=header("a"), rank=second) as writer:
            writer.add("steps", step(0))


def test_a_rank_joins_no_run_that_has_a_header_alone(tmp_path: Path):
    RunLogWriter(tmp_path, header=header("a")).close()
    (tmp_path / ".writer-r0.json").unlink()  # files with a dot get lost in copies
    with pytest.raises(RunLogError, match="rank 0 of another run"):
        RunLogWriter(tmp_path, header=header("b"), rank=1)


def test_a_claim_that_stays_empty_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "_CLAIM_S", 0.05)
    (tmp_path / ".writer-r1.json").touch()
    with pytest.raises(RunLogError, match=r"writer-r1\.json cannot be read"):
        RunLogWriter(tmp_path, header=header("a"))
    assert not (tmp_path / ".writer-r0.json").exists()


def test_a_header_that_is_refused_leaves_the_folder_as_it_was(tmp_path: Path):
    refused = Header(unclamp_version="0.1", metadata={"clip": float("inf")})
    with pytest.raises(RunLogError, match="JSON"):
        RunLogWriter(tmp_path / "run", header=refused)
    assert not (tmp_path / "run").exists()


def test_ranks_without_rank_0_are_told_apart_from_a_foreign_folder(tmp_path: Path):
    with RunLogWriter(tmp_path, header=header("a"), rank=1) as writer:
        writer.add("steps", step(0))
    with pytest.raises(RunLogError, match=r"lacks the run\.json that rank 0 writes"):
        RunLog.open(tmp_path)


def test_a_header_from_before_run_ids_is_read(tmp_path: Path):
    RunLogWriter(tmp_path, header=header(None)).close()
    data = json.loads((tmp_path / "run.json").read_text())
    del data["run_id"], data["missing"]
    (tmp_path / "run.json").write_text(json.dumps(data))
    with RunLog.open(tmp_path) as log:
        assert (log.header.run_id, log.header.missing, log.missing) == (None, None, {})
