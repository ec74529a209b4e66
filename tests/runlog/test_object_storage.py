"""Runs in object storage: the same answers as from a folder, by requests for what is needed."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truths.runs import write_planted
from typed import Typed, unclamp
from unclamp.errors import RunLogError
from unclamp.runlog import Header, RunLog, RunLogWriter, find_runs
from unclamp.runlog.storage import told

upath = pytest.importorskip("upath")
needs_s3 = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("moto", "s3fs")),
    reason="moto[server] and s3fs are not installed",
)
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
COMMANDS = [
    pytest.param(("report",), id="report"),
    pytest.param(("whatif", "--policy", "delayed(16)"), id="whatif"),
    pytest.param(("associate",), id="associate"),
    pytest.param(("spikes",), id="spikes"),
    pytest.param(("advise",), id="advise"),
    pytest.param(("backtest",), id="backtest"),
]
TABLES = ("steps", "sites", "casts", "events", "summaries", "amaxes", "switches")


@dataclass(kw_only=True)
class Server:
    """An S3 of our own, with the requests that it has answered."""

    log: Path
    environment: dict[str, str]

    def requests(self) -> list[str]:
        return re.findall(r'"((?:GET|HEAD|PUT) [^ ]+)', self.log.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("runs") / "planted")


@pytest.fixture
def in_memory(run: Path) -> Iterator[str]:
    memory = upath.UPath("memory://bucket/runs/planted")
    _copy(run, memory)
    yield str(memory)
    memory.fs.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        assert process.stdout is not None
        port = next((line.split()[1] for line in process.stdout if line.startswith("port ")), "")
        assert port, log.read_text()
        yield Server(
            log=log,
            environment={
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    s3fs = pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def in_s3(run: Path, s3: Server) -> str:
    bucket = upath.UPath("s3://bucket")
    if not bucket.exists():
        bucket.mkdir()
        _copy(run, bucket / "runs" / "planted")
    bucket.fs.clear_instance_cache()
    return "s3://bucket/runs/planted"


def _copy(run: Path, to: Any) -> None:
    for file in run.rglob("*"):
        if file.is_file() and file.suffix != ".html":
            target = to / str(file.relative_to(run))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


def _answer(done: Typed, run: str | Path) -> Any:
    """Return what was printed, with one name for wherever the run lies."""
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.replace(str(run), "RUN"))
    if isinstance(data, dict):
        data.pop("page", None)
    return data


def _asks_the_same(command: tuple[str, ...], run: Path, url: str) -> None:
    name, *options = command
    here = _answer(unclamp(name, run, *options, "--json"), run)
    assert _answer(unclamp(name, url, *options, "--json"), url) == here
    assert here


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_answer_the_same_from_memory(
    command: tuple[str, ...],
    run: Path,
    in_memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _asks_the_same(command, run, in_memory)


def test_a_file_url_is_the_folder(run: Path) -> None:
    with RunLog.open(run) as here, RunLog.open(run.as_uri()) as there:
        for table in TABLES:
            assert getattr(there, table)().equals(getattr(here, table)())


def test_the_page_of_a_url_is_written_here(
    in_memory: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pages = {}
    for path in (in_memory, run):
        page = tmp_path / "report.html"
        done = unclamp("report", path, *(() if path == in_memory else ("--out", page)))
        assert done.returncode == 0, done.stderr
        pages[path] = page.read_text(encoding="utf-8").replace(str(path), "RUN")
    assert pages[in_memory] == pages[run]
    assert not upath.UPath(f"{in_memory}/report.html").exists()


def test_runs_are_found_below_a_url(in_memory: str) -> None:
    assert [str(path) for path in find_runs("memory://bucket")] == [in_memory]
    with pytest.raises(RunLogError, match=rf"one of the runs below it: {in_memory}"):
        RunLog.open("memory://bucket/runs")


def test_what_has_not_arrived_is_told(in_memory: str, run: Path) -> None:
    upath.UPath(f"{in_memory}/run.json").unlink()
    with pytest.raises(RunLogError, match=r"lacks the run\.json that rank 0 writes"):
        RunLog.open(in_memory)
    with pytest.raises(RunLogError, match="memory://bucket/no/such does not exist"):
        RunLog.open("memory://bucket/no/such")


def test_a_run_that_is_still_written_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    run = write_planted(tmp_path / "run", status="running")
    memory = upath.UPath("memory://growing/run")
    _copy(run, memory)
    with RunLog.open("memory://growing/run") as log:
        assert log.header.status == "running"
        assert log.steps().num_rows == 200
        part = next(iter(memory.glob("steps/*.parquet")))
        data = part.read_bytes()
        part.unlink()  # and arrives under another name, as where parts are merged
        (part.parent / "part-r0-000000-000015.parquet").write_bytes(data)
        assert log.steps().num_rows == 200


def test_only_what_a_query_needs_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eleven columns one, and the ends of the files: less than a fifth of the bytes."""
    rows = 200_000
    rng = np.random.default_rng(0)
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        whole = {name: rng.integers(0, 2**40, rows) for name in
                 ("elements", "saturated", "underflowed", "nonfinite")}  # fmt: skip
        parts = {name: rng.random(rows) for name in ("saturated_error",)}
        writer.add("casts", {"step": np.arange(rows), "site": np.zeros(rows, np.int32),
                             "amax": rng.random(rows).astype(np.float32),
                             "scale": rng.random(rows).astype(np.float32),
                             "recast": np.zeros(rows, np.int64), **whole, **parts,
                             "microsteps": np.ones(rows, np.int32)})  # fmt: skip
    _copy(tmp_path / "run", upath.UPath("memory://wide/run"))
    total = sum(file.stat().st_size for file in (tmp_path / "run" / "casts").iterdir())
    read: list[int] = []
    memory = type(upath.UPath("memory://wide").fs)
    opened = memory.open

    def opens(self: Any, path: str, **settings: Any) -> Any:
        file = opened(self, path, **settings)
        reads = file.read
        file.read = lambda size=-1: read.append(len(data := reads(size))) or data
        return file

    monkeypatch.setattr(memory, "open", opens)
    with RunLog.open("memory://wide/run") as log:
        log.sql("SELECT max(amax) FROM casts")
    monkeypatch.undo()
    assert 0 < sum(read) < total / 5


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(RunLogError, match=r"pip install 'unclamp\[s3\]'"):
        RunLog.open("memory://bucket/run")


def test_a_command_says_in_a_line_what_is_wrong() -> None:
    done = unclamp("whatif", "nonsense://bucket/run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("unclamp: nonsense://bucket/run cannot be read")


def test_writing_stays_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunLogError, match="aws s3 sync FOLDER s3://bucket/run"):
        RunLogWriter("s3://bucket/run", header=Header(unclamp_version="0"))
    done = unclamp("study", "--quick", "--out", "s3://bucket/study")
    assert done.returncode == 2
    assert "aws s3 sync FOLDER s3://bucket/study" in done.stderr
    assert not list(tmp_path.iterdir())


@needs_s3
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_answer_the_same_from_s3(
    command: tuple[str, ...],
    run: Path,
    in_s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _asks_the_same(command, run, in_s3)


@needs_s3
def test_few_requests_are_made(in_s3: str, server: Server) -> None:
    before = len(server.requests())
    with RunLog.open(in_s3) as log:
        log.sql("SELECT max(amax) FROM casts")
        asked = len(server.requests()) - before
        log.sql("SELECT max(amax) FROM casts")
    again = len(server.requests()) - before - asked
    assert asked <= 25
    assert again < asked / 2


@needs_s3
def test_s3_says_what_is_wrong(in_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    with pytest.raises(RunLogError, match=r"there is no bucket 'elsewhere'"):
        RunLog.open("s3://elsewhere/run")
    with pytest.raises(RunLogError, match=r"expected s3://BUCKET/FOLDER, got s3://"):
        RunLog.open("s3://")
    with pytest.raises(RunLogError, match=r"s3://bucket/runs/other does not exist"):
        RunLog.open("s3://bucket/runs/other")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RunLogError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        RunLog.open(in_s3)


class ExpiredToken(Exception):
    """As botocore's errors: of no class that others know."""


def _expire(*_: object, **__: object) -> None:
    raise ExpiredToken("The provided token has expired.")


@pytest.mark.parametrize("asked", ["_open", "info", "ls"])
def test_storage_that_fails_after_opening_is_told_with_its_url_and_cause(
    asked: str, in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(upath.UPath(in_memory).fs)
    with RunLog.open(in_memory) as log:
        assert log.steps().num_rows
        monkeypatch.setattr(memory, asked, _expire)
        upath.UPath(in_memory).fs.invalidate_cache()
        with pytest.raises(RunLogError, match=r"memory://.*has expired.*new credentials"):
            log.casts()


def test_a_run_whose_storage_does_not_answer_is_not_left_out(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(upath.UPath(in_memory).fs), "_open", _expire)
    with pytest.raises(RunLogError, match=r"memory://.*has expired"):
        find_runs("memory://bucket")


def test_a_path_whose_storage_tells_its_errors_can_be_copied(in_memory: str) -> None:
    system = told(upath.UPath(in_memory)).fs
    assert copy.copy(system).exists(in_memory)


def test_a_file_that_breaks_off_while_it_is_read_is_told(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = upath.UPath(in_memory).fs
    with RunLog.open(in_memory) as log:
        (part,) = system.glob(f"{in_memory.removeprefix('memory:/')}/casts/*.parquet")
        file = type(system.open(part))
        monkeypatch.setattr(file, "read", _expire)
        with pytest.raises(RunLogError, match=r"memory://.*has expired"):
            log.casts()
        assert log.path.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_in_a_line_that_storage_failed_midway(
    command: tuple[str, ...], in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *options = command
    memory = type(upath.UPath(in_memory).fs)
    opened, count = memory._open, 0

    def some(self: Any, path: str, *args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        return opened(self, path, *args, **more) if count <= 2 else _expire()

    monkeypatch.setattr(memory, "_open", some)
    answer = unclamp(name, in_memory, *options, "--json")
    assert answer.returncode != 0
    (line,) = (line for line in answer.stderr.splitlines() if line.startswith("unclamp: "))
    assert "memory://" in line
    assert "has expired" in line
    assert "Traceback" not in answer.stderr


@needs_s3
def test_an_object_that_is_gone_after_opening_is_told(in_s3: str, run: Path) -> None:
    copy = upath.UPath("s3://bucket/gone")
    _copy(run, copy)
    (part,) = copy.glob("casts/*.parquet")
    with RunLog.open(str(copy)) as log:
        listed = log.sql("SELECT count(*) AS n FROM steps")["n"][0].as_py()
        copy.fs.rm(str(copy), recursive=True)
        with pytest.raises(RunLogError, match=r"s3://bucket/gone"):
            log.casts()
    assert listed > 0
    assert not part.exists()
