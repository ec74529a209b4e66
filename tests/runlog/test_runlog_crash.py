"""A process that ends without closing its run, politely or not."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

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
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_exit_without_close_loses_nothing_and_is_interrupted(tmp_path: Path):
    process = start(tmp_path / "run", "for step in range(500): record(step)", flush_s=60)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "interrupted"
        assert log.steps()["step"].to_pylist() == list(range(500))


def test_an_uncaught_exception_loses_nothing(tmp_path: Path):
    process = start(tmp_path / "run", "record(0)\n1 / 0", flush_s=60)
    _, errors = process.communicate(timeout=30)
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
    header, _ = process.communicate(timeout=30)
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
    recorded_s = [float(line) for line in process.communicate()[0].split()]
    assert all(pq.read_table(part).num_rows for part in tmp_path.rglob("*.parquet"))
    with RunLog.open(tmp_path / "run") as log:
        steps = log.steps()
        assert log.header.status == "running"
    assert steps["step"].to_pylist() == list(range(steps.num_rows))
    lost_s = recorded_s[-1] - steps["time_s"][-1].as_py()
    assert lost_s < flush_s + 0.3  # the writing itself takes time, on a busy machine most of all
