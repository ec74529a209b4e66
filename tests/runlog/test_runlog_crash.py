"""A process that ends without closing its run, politely or not."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from patience import PATIENCE_S
from truths.rows import assert_summaries_are_those_of_casts
from unclamp.runlog import RunLog

START = """
import itertools, sys, time
from unclamp.runlog import Header, RunLogWriter
writer = RunLogWriter(sys.argv[1], header=Header(unclamp_version="0.1"), flush_interval_s={flush_s})
began = time.monotonic()
def record(step):
    time_s = time.monotonic() - began
    writer.add("steps", {{"step": [step], "time_s": [time_s]}})
    return time_s
"""


def start(path: Path, code: str, *, flush_s: float) -> subprocess.Popen[str]:
    program = START.format(flush_s=flush_s) + code
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_exit_without_close_loses_nothing_and_is_interrupted(tmp_path: Path):
    process = start(tmp_path / "run", "for step in range(500): record(step)", flush_s=60)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "interrupted"
        assert log.steps()["step"].to_pylist() == list(range(500))


def test_an_uncaught_exception_loses_nothing(tmp_path: Path):
    process = start(tmp_path / "run", "record(0)\n1 / 0", flush_s=60)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert "ZeroDivisionError" in errors
    with RunLog.open(tmp_path / "run") as log:
        assert (log.header.status, log.steps().num_rows) == ("interrupted", 1)


def test_a_fork_that_exits_leaves_the_run_alone(tmp_path: Path):
    code = """
import os
record(0)
if os.fork() == 0:
    sys.exit()
os.wait()
print(open(sys.argv[1] + "/run.json").read())
record(1)
writer.close()
"""
    process = start(tmp_path / "run", code, flush_s=60)
    header, _ = process.communicate(timeout=PATIENCE_S)
    assert '"status": "running"' in header
    with RunLog.open(tmp_path / "run") as log:
        assert (log.header.status, log.steps().num_rows) == ("finished", 2)


def test_a_killed_run_stays_readable_and_loses_at_most_one_flush_interval(tmp_path: Path):
    flush_s = 0.2
    code = "for step in itertools.count(): print(record(step), flush=True); time.sleep(0.001)"
    process = start(tmp_path / "run", code, flush_s=flush_s)
    assert process.stdout is not None
    process.stdout.readline()  # imports are over
    time.sleep(1.1)
    process.kill()
    recorded_s = [float(line) for line in whole_lines(process.communicate()[0])]
    assert all(pq.read_table(part).num_rows for part in tmp_path.rglob("*.parquet"))
    with RunLog.open(tmp_path / "run") as log:
        steps = log.steps()
        assert log.header.status == "running"
    assert steps["step"].to_pylist() == list(range(steps.num_rows))
    lost_s = recorded_s[-1] - steps["time_s"][-1].as_py()
    assert lost_s < flush_s + 0.3  # the writing itself takes time, on a busy machine most of all


def whole_lines(text: str) -> list[str]:
    """Return the lines that were written to their end before the kill."""
    return text.splitlines()[: text.count("\n")]


COMPACTING = """
from truths.rows import casts_of_step
from unclamp.runlog import compactor
compactor.FAN_IN, compactor.FULL_ROWS = 3, 2000
for step in itertools.count():
    print("recorded", record(step), flush=True)
    writer.add("casts", casts_of_step(step, 40))
    if step % 7 == 6:
        writer.flush()
        print("flushed", step, flush=True)
"""


def kill_at_random(path: Path, rng: random.Random) -> set[str]:
    """Kill a writer that merges all the time; check its log and return what the folder holds."""
    flush_s = 0.1
    process = start(path, COMPACTING, flush_s=flush_s)
    assert process.stdout is not None
    process.stdout.readline()  # imports are over
    time.sleep(rng.uniform(0, 0.7))
    process.kill()
    said = [line.split() for line in whole_lines(process.communicate()[0])]
    flushed = max((int(value) for what, value in said if what == "flushed"), default=-1)
    recorded_s = [float(value) for what, value in said if what == "recorded"]
    for part in path.rglob("*.parquet"):
        assert pq.ParquetFile(part).metadata.num_rows
    with RunLog.open(path) as log:
        steps = log.steps()
        read = steps["step"].to_pylist()
        assert read == list(range(len(read)))
        assert len(read) > flushed
        casts = log.casts()
        assert casts["step"].to_pylist() == [
            s for s in range(casts.num_rows // 40) for _ in range(40)
        ]
        assert casts["site"].to_pylist() == list(range(40)) * (casts.num_rows // 40)
        assert casts.num_rows // 40 > flushed
        assert_summaries_are_those_of_casts(log)
    if recorded_s and read:
        assert recorded_s[-1] - steps["time_s"][-1].as_py() < flush_s + 1  # on a busy machine
    return {file.name for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "kills", [4, pytest.param(60, marks=pytest.mark.slow)], ids="{} kills".format
)
def test_kills_at_random_moments_lose_no_flushed_row_and_double_none(tmp_path: Path, kills: int):
    rng = random.Random(kills)
    left = set()
    for number in range(kills):
        left |= kill_at_random(tmp_path / str(number), rng)
    assert any(name.startswith("part-r0-000000-") for name in left)  # kills came after merges
