"""A run that ended goes on in its folder: what a later attempt repeats replaces the old rows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from truths.rows import assert_summaries_are_those_of_casts, merge_early
from truths.several_ranks import header, write_rank
from unclamp.errors import RunLogError
from unclamp.runlog import RunLog, RunLogWriter

X = ("a", "input")
WRITE = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from truths.several_ranks import write_rank
path, rank = Path(sys.argv[1]), int(sys.argv[2])
write_rank(path, rank, range(5), casts={("a", "input"): {"amax": 1.0}}, close=False)
print("written", flush=True)
sys.stdin.readline()
"""


def write(path: Path, rank: int, steps: range, run_id: str = "a", amax: float = 1.0, **more: Any):
    more = {"resume": True, "world_size": 1} | more
    return write_rank(path, rank, steps, run_id=run_id, casts={X: {"amax": amax}}, **more)


def told(log: RunLog) -> list[tuple[int, int, float]]:
    rows = log.sql("SELECT step, rank, amax FROM casts ORDER BY step, rank").to_pylist()
    return [(row["step"], row["rank"], row["amax"]) for row in rows]


def test_what_a_new_attempt_repeats_replaces_the_old_rows_in_every_view(tmp_path: Path):
    write(tmp_path, 0, range(8), amax=1.0, loss=float)
    begun = write(tmp_path, 0, range(5, 7), run_id="b", amax=2.0, loss=lambda n: n + 100.0)
    assert begun.attempt == 1
    with RunLog.open(tmp_path) as log:
        assert told(log) == [(n, 0, 1.0) for n in range(5)] + [(5, 0, 2.0), (6, 0, 2.0)]
        assert log.steps()["step"].to_pylist() == list(range(7))
        assert log.steps()["loss"].to_pylist() == [0, 1, 2, 3, 4, 105, 106]
        assert log.amaxes()["amax"].to_pylist() == [1.0] * 5 + [2.0] * 2
        assert log.windows().totals[0].rows == 7
        assert_summaries_are_those_of_casts(log)
        assert [a.first_step for a in log.attempts] == [0, 5]
        assert [a.ended for a in log.attempts] == ["finished", "finished"]


def test_events_beyond_the_new_first_step_are_gone(tmp_path: Path):
    with RunLogWriter(tmp_path, header=header(1)) as writer:
        for number in (1, 5):
            writer.add("events", {"step": [number], "kind": ["spike"], "data": ["{}"]})
    write(tmp_path, 0, range(3, 9), run_id="b")
    with RunLog.open(tmp_path) as log:
        assert log.events()["step"].to_pylist() == [1]


@pytest.mark.parametrize("begins", [0, 50, 100, 130, 299])
def test_summaries_agree_with_casts_wherever_an_attempt_begins(
    tmp_path: Path, begins: int, monkeypatch: pytest.MonkeyPatch
):
    merge_early(monkeypatch)
    for rank in range(2):
        write(tmp_path, rank, range(0, 300, 7), world_size=2)
    for rank in range(3):
        write(tmp_path, rank, range(begins, 310, 9), run_id="b", amax=3.0, world_size=3)
    expected = [(n, r, 1.0) for n in range(0, 300, 7) if n < begins for r in range(2)]
    expected += [(n, r, 3.0) for n in range(begins, 310, 9) for r in range(3)]
    with RunLog.open(tmp_path) as log:
        assert told(log) == sorted(expected)
        assert_summaries_are_those_of_casts(log)
        assert log.header.world_size == 3
        assert [a.world_size for a in log.attempts] == [2, 3]


def test_a_third_attempt_that_goes_further_back_replaces_both(tmp_path: Path):
    write(tmp_path, 0, range(10), amax=1.0)
    write(tmp_path, 0, range(6, 12), run_id="b", amax=2.0)
    write(tmp_path, 0, range(3, 5), run_id="c", amax=3.0)
    with RunLog.open(tmp_path) as log:
        assert told(log) == [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 1.0), (3, 0, 3.0), (4, 0, 3.0)]
        assert [a.first_step for a in log.attempts] == [0, 6, 3]


def test_sites_of_an_attempt_have_ids_of_their_own(tmp_path: Path):
    """With another world size, and sites in another order, ids would otherwise be mixed up."""
    w = ("a", "weight")
    for rank in range(2):
        write_rank(tmp_path, rank, range(4), casts={X: {"amax": 1.0}, w: {"amax": 2.0}})
    for rank in range(3):
        casts = {w: {"amax": 20.0}, X: {"amax": 10.0}}
        write_rank(tmp_path, rank, range(2, 4), world_size=3, run_id="b", resume=True, casts=casts)
    with RunLog.open(tmp_path) as log:
        rows = log.sql(
            "SELECT role, amax, count(*) AS n FROM casts JOIN sites USING (site) GROUP BY ALL "
            "ORDER BY amax"
        ).to_pylist()
        assert len(log.named_sites()) == 2
    assert [(r["role"], r["amax"], r["n"]) for r in rows] == [
        ("input", 1.0, 4),
        ("weight", 2.0, 4),
        ("input", 10.0, 6),
        ("weight", 20.0, 6),
    ]


def test_an_empty_folder_begins_a_run(tmp_path: Path):
    assert write(tmp_path / "new", 0, range(2)).attempt == 0
    with RunLog.open(tmp_path / "new") as log:
        assert log.header.attempts == []
        assert len(log.attempts) == 1


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_agree_whichever_comes_first(tmp_path: Path, first: int):
    for rank in (first, 1 - first):
        assert write(tmp_path, rank, range(4), world_size=2).attempt == 0
    for rank in (first, 1 - first):
        assert write(tmp_path, rank, range(2, 6), run_id="b", world_size=2).attempt == 1
    with RunLog.open(tmp_path) as log:
        assert log.steps().num_rows == 2 * 6
        assert log.header.run_id == "b"


def test_a_reader_that_is_open_sees_the_new_attempt(tmp_path: Path):
    write(tmp_path, 0, range(6))
    with RunLog.open(tmp_path) as log:
        assert log.steps().num_rows == 6
        write(tmp_path, 0, range(2, 3), run_id="b", amax=2.0)
        assert told(log) == [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 2.0)]


def test_without_resume_a_run_is_refused_and_resume_is_named(tmp_path: Path):
    write(tmp_path, 0, range(2))
    with pytest.raises(RunLogError, match="resume=True"):
        RunLogWriter(tmp_path, header=header(1, "b"))


@pytest.mark.parametrize(("name", "overwrite"), [("run", True), ("run-{n}", False)])
def test_resume_goes_with_no_other_way_to_begin(tmp_path: Path, name: str, overwrite: bool):
    with pytest.raises(RunLogError, match="resume=True goes on"):
        RunLogWriter(tmp_path / name, header=header(1), resume=True, overwrite=overwrite)


def test_a_writer_of_this_process_is_never_joined(tmp_path: Path):
    writer = write(tmp_path, 0, range(2), close=False)
    with pytest.raises(RunLogError, match="by this process: close its recorder first"):
        write(tmp_path, 0, range(2), run_id="b")
    writer.close()
    assert write(tmp_path, 0, range(2), run_id="b").attempt == 1


def begin(path: Path, rank: int = 0) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path), str(rank)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_killed_run_goes_on_and_a_live_one_does_not(tmp_path: Path):
    process = begin(tmp_path)
    try:
        with pytest.raises(RunLogError, match=f"by process {process.pid}: stop that first"):
            write(tmp_path, 1, range(3, 6), run_id="b", world_size=2)
        assert not list(tmp_path.glob(".attempt-*"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
    for rank in range(2):
        assert write(tmp_path, rank, range(3, 6), run_id="b", world_size=2).attempt == 1
    with RunLog.open(tmp_path) as log:
        assert [a.ended for a in log.attempts] == ["killed", "finished"]
        assert log.steps()["step"].to_pylist() == [0, 1, 2, 3, 3, 4, 4, 5, 5]


def elsewhere(path: Path, **changes: object) -> None:
    """Make the claim of rank 0 one of a process on another host that never closed."""
    claim = path / ".writer-r0.json"
    other = {"host": f"not-{socket.gethostname()}", "made_by": "another", "closed": None}
    claim.write_text(json.dumps(json.loads(claim.read_text()) | other | changes))


def ago(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path / ".writer-r0.json", (then, then))


def test_a_writer_of_another_host_is_dead_when_it_was_quiet_for_long(tmp_path: Path):
    write(tmp_path, 0, range(2))
    elsewhere(tmp_path)
    with pytest.raises(RunLogError, match=r"process \d+ on not-.*wait until it has been quiet"):
        write(tmp_path, 0, range(2), run_id="b")
    ago(tmp_path, 3600)
    assert write(tmp_path, 0, range(2), run_id="b").attempt == 1


def test_a_writer_gives_signs_of_life(tmp_path: Path):
    with RunLogWriter(tmp_path, header=header(2), flush_interval_s=0.05):
        ago(tmp_path, 3600)
        deadline = time.monotonic() + PATIENCE_S
        while time.time() - (tmp_path / ".writer-r0.json").stat().st_mtime > 60:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_launcher_ends_workers_of_every_host_before_it_restarts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, 0, range(2))
    elsewhere(tmp_path, launch=["job", 0])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RunLogError, match="wait until"):
        write(tmp_path, 0, range(2), run_id="b")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert write(tmp_path, 0, range(2), run_id="b").attempt == 1


def test_ranks_that_cannot_agree_are_told_what_to_call(tmp_path: Path):
    write(tmp_path, 0, range(2))
    with pytest.raises(RunLogError, match="init_process_group before making the Recorder"):
        RunLogWriter(tmp_path, header=header(2, None), resume=True)


def test_a_writer_taken_for_dead_leaves_the_new_header_alone(tmp_path: Path):
    old = write(tmp_path, 0, range(4), close=False)
    elsewhere(tmp_path)
    ago(tmp_path, 3600)
    write(tmp_path, 0, range(2, 4), run_id="b")
    old.close("failed")
    with RunLog.open(tmp_path) as log:
        assert (log.header.status, log.header.run_id) == ("finished", "b")


def test_a_copy_without_hidden_files_goes_on_in_the_next_attempt(tmp_path: Path):
    write(tmp_path, 0, range(4))
    write(tmp_path, 0, range(2, 4), run_id="b", amax=2.0)
    for file in tmp_path.glob(".*.json"):
        file.unlink()
    assert write(tmp_path, 0, range(3, 5), run_id="c", amax=3.0).attempt == 2
    with RunLog.open(tmp_path) as log:
        assert [amax for _, _, amax in told(log)] == [1.0, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("table", ["steps", "casts"])
def test_damage_is_told_of_the_attempt_that_it_is_in(
    tmp_path: Path, table: str, recwarn: pytest.WarningsRecorder
):
    write(tmp_path, 0, range(4))
    write(tmp_path, 0, range(2, 4), run_id="b")
    part = next((tmp_path / table).glob("part-r0-a1-*"))
    part.write_bytes(b"broken")
    with RunLog.open(tmp_path) as log:
        (damage,) = log.damaged
        assert (damage.first_step, damage.last_step) == (None, None)
