"""A study on a Ray cluster: the bits of one machine, whatever happens to its workers."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctrl_c import with_ctrl_c
from patience import PATIENCE_S
from typed import unclamp
from unclamp.runlog import RunLog

pytestmark = pytest.mark.xdist_group("ray")

STUDY = (
    "scenarios = ['text']\nseeds = [0, 1]\nsteps = 40\n"
    "[data]\nbatch_size = 2\nseq_len = 32\n"
    "[model]\nhidden_size = 32\nintermediate_size = 64\nlayers = 1\nheads = 2\n"
    "[arms.delayed]\nrecipe = 'delayed'\n[arms.pilot]\nfrom = 'delayed'\nautopilot = true\n"
)
RUNS = [f"text/{arm}/seed-{seed}" for arm in ("delayed", "pilot") for seed in (0, 1)]
CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=100_000_000, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""
APART = """
import sys
from pathlib import Path
from unclamp.cli import main
from unclamp.study import ray_tasks
ray_tasks._mark = lambda plan: Path("no such mark")
main()
"""
"""A study whose folder no worker finds on its own file system: they look for its mark."""
WORKING = "ray::run"


@dataclass(kw_only=True)
class Cluster:
    """Two workers, started in a process of their own."""

    process: subprocess.Popen[str]
    address: str
    settings: dict[str, str]

    def workers(self) -> list[int]:
        """Return the processes that train."""
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if _title(folder) == WORKING and _group(folder) == self.process.pid
        ]


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().rstrip(b"\0 ").decode(errors="replace")
    except OSError:
        return ""


def _group(folder: Path) -> int:
    try:  # the session, which is that of the process that began the cluster
        return int((folder / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return -1


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray")
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's workers are polite, and on a busy machine never done
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    folder = tempfile.mkdtemp(prefix="r")  # short: the names of sockets are
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | settings,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield Cluster(process=process, address=address, settings=settings)
        process.communicate("", timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


class Study:
    """`unclamp study --ray` in a process of its own."""

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        out: Path,
        *,
        program: Sequence[str] = ("-m", "unclamp"),
    ) -> None:
        self.stderr = out.with_suffix(".txt")
        options = ["--config", str(config), "--out", str(out), "--ray", cluster.address, "--json"]
        with self.stderr.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, "study", *options],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=os.environ | cluster.settings,
                start_new_session=True,
                preexec_fn=with_ctrl_c,
            )

    def said(self) -> str:
        return self.stderr.read_text()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def ends(self, code: int = 0) -> None:
        assert self.process.wait(timeout=PATIENCE_S) == code, self.said()
        assert "Traceback" not in self.said()


def config(folder: Path) -> Path:
    path = folder / "study.toml"
    path.write_text(STUDY)
    return path


def bits(out: Path) -> dict[str, list[str]]:
    """Return every loss and every amax of the runs, exactly."""
    found = {}
    for run in RUNS:
        with RunLog.open(out / run) as log:
            assert log.header.status == "finished"
            losses = log.steps()["loss"].to_pylist()
            amaxes = log.sql("SELECT amax FROM amaxes ORDER BY step, fqn, role")
        found[run] = [float(x).hex() for x in [*losses, *amaxes["amax"].to_pylist()]]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The bits of the study on one machine."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ["--config", config(folder), "--out", folder / "o", "--jobs", 1, "--json"]
    done = unclamp("study", *arguments)
    assert done.returncode == 0, done.stderr
    return bits(folder / "o")


def test_whatever_happens_a_cluster_trains_the_bits_of_one_machine(
    cluster: Cluster, alone: dict[str, list[str]], tmp_path: Path
) -> None:
    """Ctrl-C, then the same command again, of which a worker is killed, then again."""
    out, file = tmp_path / "out", config(tmp_path)
    begun = Study(cluster, file, out)
    begun.wait_until(lambda: any(out.glob("text/delayed/*/run.json")))
    os.killpg(begun.process.pid, signal.SIGINT)
    begun.ends(130)
    assert "Interrupted: stopping" in begun.said()
    assert "unfinished ones start over" in begun.said()
    for header in out.glob("text/*/*/run.json"):
        with RunLog.open(header.parent) as log:
            log.steps()
    assert not list(out.glob(".here-*"))

    again = Study(cluster, file, out)
    again.wait_until(lambda: any(cluster.workers()))
    os.kill(cluster.workers()[0], signal.SIGKILL)
    again.ends()
    assert "4 runs of 40 steps (1 scenario, 2 arms, 2 seeds), as Ray tasks" in again.said()
    assert again.said().count("its worker died; it is trained again") == 1
    assert bits(out) == alone
    assert not list(out.glob(".here-*"))

    stamps = {p: p.stat().st_mtime_ns for p in out.glob("**/steps/*.parquet")}
    here = unclamp("study", "--config", file, "--out", out, "--json")  # and on one machine
    assert (here.returncode, len(stamps)) == (0, 4), here.stderr
    assert {p: p.stat().st_mtime_ns for p in out.glob("**/steps/*.parquet")} == stamps


def test_what_workers_without_the_folder_train_comes_back(
    cluster: Cluster, alone: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    study = Study(cluster, config(tmp_path), out, program=("-c", APART))
    study.wait_until(lambda: any(cluster.workers()))
    study.ends()
    assert "done 4/4" in study.said()
    assert bits(out) == alone
    for run in RUNS:
        assert list((out / run).glob(".writer-r0.json")), "a file is missing"


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder = config(tmp_path)
    done = unclamp("study", "--config", folder, "--out", tmp_path / "out", "--ray", "auto")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("unclamp: no Ray cluster can be used at 'auto'")
    assert "ray start --head" in done.stderr


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = unclamp("study", "--config", config(tmp_path), "--out", tmp_path / "o", "--ray", "auto")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "unclamp: --ray needs the package ray: install it with pip install 'unclamp[ray]'"
    )
    assert not (tmp_path / "o").exists()
