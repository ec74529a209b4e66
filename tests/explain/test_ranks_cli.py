"""`torchrun --nproc-per-node N -m unclamp explain RUN`: one voice, and an end in any case."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unclamp
from ranks import run_ranks
from truths.ranked import DEFAULT, FAILS, JOINS, SLOW, default_build, odd_step, record
from truths.trainings import SPIKE, Case

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MANY_S = 200
"""Seconds after which a command that does not end is killed."""


def recorded(rank: int, run: str) -> list[float]:
    return record(DEFAULT, Path(run), rank, {"build": default_build, "step": odd_step})


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ranks") / "run"
    run_ranks(2, recorded, str(run))
    return run


@pytest.fixture
def run(recording: Path, tmp_path: Path) -> Path:
    """A copy of a run of two ranks, which nobody has explained."""
    return shutil.copytree(recording, tmp_path / "run")


def started(count: int, run: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    command = "-m", "unclamp", "explain", str(run), *options
    return launched(count, run.parent, *command, **variables)


def launched(count: int, folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    source, tests = Path(unclamp.__file__).parents[1], Path(__file__).parents[1]
    return subprocess.Popen(
        [*TORCHRUN, str(count), *command],
        env={
            **os.environ,
            "PYTHONPATH": f"{source}{os.pathsep}{tests}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Return how it ended, what was printed, and the lines that unclamp wrote to stderr."""
    try:
        out, err = process.communicate(timeout=MANY_S)
    finally:
        process.terminate()  # torchrun ends its ranks then
        process.wait(timeout=60)
    return process.returncode, out, [x for x in err.splitlines() if x.startswith("unclamp:")]


def test_two_ranks_give_one_answer(run: Path) -> None:
    code, out, said = ended(started(2, run, "--json", "--budget", "30"))
    assert code == 0
    assert said == []
    answer = json.loads(out)  # one document: the other rank was silent
    assert answer["reproduced"]
    assert answer["verdict"] == "clamping"
    sites = [(site["fqn"], site["role"]) for site in answer["override"]["sites"]]
    assert sites == [(site.fqn, site.role) for site in Case().culprits]
    written = json.loads((run / f"explain-{SPIKE}.json").read_bytes())
    assert written["sites"] == answer["sites"]


def test_another_number_of_ranks_is_one_sentence(run: Path) -> None:
    code, out, said = ended(started(3, run))
    assert code != 0
    assert out == ""
    assert said == [
        "unclamp: the run was recorded on 2 ranks, and these are 3: "
        f"torchrun --nproc-per-node 2 -m unclamp explain {run}"
    ]


def test_a_rank_that_fails_in_a_replay_ends_all_with_one_sentence(run: Path) -> None:
    # It fails once the first replay was written down, when others wait in its collectives.
    fails = f"1:{run / f'explain-{SPIKE}.json'}"
    code, out, said = ended(started(2, run, **{FAILS: fails, SLOW: "0.02"}))
    assert code != 0
    assert out == ""
    (line,) = said
    assert line.startswith("unclamp: rank 1 failed in step ")
    assert "RuntimeError: the disk of this rank is full (" in line
    assert "ranked.py:" in line


def test_ctrl_c_ends_all_ranks_also_where_build_made_their_group(run: Path) -> None:
    answer = run / f"explain-{SPIKE}.json"
    process = started(2, run, **{SLOW: "0.1", JOINS: "1"})
    deadline = time.monotonic() + MANY_S
    while not answer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, out, said = ended(process)
    assert said == []
    assert "Interrupted: this is the answer so far" in " ".join(out.split())
    assert json.loads(answer.read_bytes())["status"] == "interrupted"


@pytest.mark.slow
def test_the_script_of_the_page_trains_and_is_explained(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "explain.md"
    section = page.read_text(encoding="utf-8").partition("### On several processes")[2]
    script = section.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    code, _, said = ended(launched(2, tmp_path, "train.py"))
    assert (code, said) == (0, [])
    code, out, said = ended(launched(2, tmp_path, "-m", "unclamp", "explain", "run"))
    assert (code, said) == (0, [])
    words = " ".join(out.split())
    assert "clamping is the cause" in words
    assert "2 input on rank 1" in words
