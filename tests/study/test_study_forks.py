"""`unclamp study`'s workers are forks, which no Ctrl-C reaches, and train what others would."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from patience import PATIENCE_S
from unclamp.runlog import RunLog
from unclamp.study.config import StudyConfig
from unclamp.study.loop import RunPlan, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")

STUDY = (
    "scenarios = ['text']\nseeds = [0]\nsteps = 4\n"
    "[data]\nbatch_size = 2\nseq_len = 32\n"
    "[model]\nhidden_size = 32\nintermediate_size = 64\nlayers = 1\nheads = 2\n"
    "[arms.hp]\n[arms.delayed]\nrecipe = 'delayed'\n"
)
COMPILES = "compiling the CPU kernels"


def study(file: Path, out: Path, cache: Path) -> str:
    """Run the command; return what it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "unclamp", "study", "--config", file, "--out", out],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_runs_in_forks_have_the_losses_of_runs_in_this_process(tmp_path: Path) -> None:
    """First kernels are compiled beside the run in high precision, and then they are loaded."""
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    said = study(file, tmp_path / "first", tmp_path / "cache")
    assert COMPILES in said
    again = study(file, tmp_path / "second", tmp_path / "cache")
    assert COMPILES not in again
    assert "leaked" not in said + again
    config = StudyConfig.load(file)
    for arm in ("hp", "delayed"):
        path = tmp_path / "here" / arm
        recipe = config.arms[arm].recipe
        train(RunPlan(config=config, scenario="text", arm=arm, seed=0, recipe=recipe, path=path))
        found = []
        for run in (
            path,
            *(tmp_path / out / "text" / arm / "seed-0" for out in ("first", "second")),
        ):
            with RunLog.open(run) as log:
                found.append(log.steps()["loss"].to_pylist())
        assert len(found[0]) == 4
        assert found[0] == found[1] == found[2]


ASKED = """
    import multiprocessing, os, signal, sys
    from unclamp.study import forking

    def tell(channel):
        channel.put((signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
                     "unclamp.study.loop" in sys.modules))

    def answers():
        context = forking.workers_context()
        channel = context.SimpleQueue()
        with forking.blocking_interrupts():
            process = context.Process(target=tell, args=(channel,))
            process.start()
        print(type(context).__name__, *channel.get())
        process.join()
        assert process in context.started

    if __name__ == "__main__":
        answers()
        forking.prepare()
        answers()
        os.environ["ADDED"] = "as imports do"
        answers()
        os.environ["CHANGED"] = "now"
        answers()
"""


def test_workers_are_forks_where_these_were_prepared(tmp_path: Path) -> None:
    script = tmp_path / "asked.py"
    script.write_text(textwrap.dedent(ASKED))
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"CHANGED": "before"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    # Whether SIGINT is blocked, and whether the loop was imported before it was asked for.
    assert done.stdout.splitlines() == [
        "Spawning True False",
        "Forking True True",
        "Forking True True",
        "Spawning True False",
    ], done.stderr
