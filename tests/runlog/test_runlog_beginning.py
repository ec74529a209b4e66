"""A run begins in a numbered folder or in the place of an old run, and never costs another's."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from patience import PATIENCE_S
from unclamp.errors import RunLogError
from unclamp.runlog import Header, RunLog, RunLogWriter

HEADER = Header(unclamp_version="0")


def write(path: Path, loss: float = 1.0, **options: bool) -> Path:
    with RunLogWriter(path, header=HEADER, **options) as writer:  # pyright: ignore[reportArgumentType]
        writer.add("steps", {"step": [0], "loss": [loss], "time_s": [0.0], "step_ms": [0.0]})
    return writer.path


def loss_of(path: Path) -> float:
    with RunLog.open(path) as log:
        return log.steps()["loss"][0].as_py()


def edit(path: Path, file: str, **changes: object) -> None:
    data = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(data | changes))


# ---- numbers -----------------------------------------------------------------------------


def test_a_path_numbers_itself_from_one_on(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "first-{n}"
    assert [write(wanted, n).name for n in (1, 2, 3)] == ["first-1", "first-2", "first-3"]
    assert loss_of(tmp_path / "runs" / "first-2") == 2


def test_the_first_free_number_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a1").write_text("a file")
    (tmp_path / "a3").mkdir()
    assert [write(tmp_path / "a{n}").name for _ in range(2)] == ["a2", "a4"]


def test_those_who_ask_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda n: write(tmp_path / "{n}", n), range(16)))
    assert sorted(int(path.name) for path in paths) == list(range(1, 17))
    assert sorted(loss_of(path) for path in paths) == list(range(16))


def test_a_refused_run_takes_no_number(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="JSON"):
        RunLogWriter(tmp_path / "{n}", header=Header(unclamp_version="0", metadata={"a": Path()}))
    assert list(tmp_path.iterdir()) == []


def test_a_number_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match="cannot create"):
        write(tmp_path / "file" / "{n}")


@pytest.mark.parametrize(("name", "options"), [("{n}", {}), ("run", {"overwrite": True})])
def test_ranks_have_to_name_one_folder(tmp_path: Path, name: str, options: dict) -> None:
    header = Header(unclamp_version="0", world_size=2)
    with pytest.raises(RunLogError, match="one new folder"):
        RunLogWriter(tmp_path / name, header=header, **options)
    assert list(tmp_path.iterdir()) == []


# ---- overwriting -------------------------------------------------------------------------


def test_an_old_run_is_replaced_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    run = write(tmp_path / "run", 1.0)
    for name in ("report.html", "explain-40.json"):
        (run / name).write_text("{}")
    (run / "snapshots" / "step-1").mkdir(parents=True)
    assert write(run, 2.0, overwrite=True) == run
    assert loss_of(run) == 2.0
    assert not (run / "snapshots").exists()
    assert not (run / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_where_nothing_is_overwriting_is_writing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert loss_of(write(tmp_path / name, 3.0, overwrite=True)) == 3.0


def test_a_link_to_a_run_stays_a_link(tmp_path: Path) -> None:
    run = write(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to(run)
    write(tmp_path / "link", 2.0, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert loss_of(run) == 2.0


def test_a_folder_that_is_no_run_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(RunLogError, match=r"holds none \(\['thesis.tex'\]\)"):
        write(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["notes.md", ".git", "explain.txt", "another-run"])
def test_a_run_with_something_of_the_users_is_not_replaced(tmp_path: Path, name: str) -> None:
    run = write(tmp_path / "run", 1.0)
    (run / name).mkdir()
    with pytest.raises(RunLogError, match="which unclamp did not write"):
        write(run, 2.0, overwrite=True)
    assert (run / name).exists()
    assert loss_of(run) == 1.0


def test_what_cannot_be_written_costs_no_old_run(tmp_path: Path) -> None:
    run = write(tmp_path / "run", 1.0)
    for metadata in ({"a": Path()}, {"a": float("nan")}):
        header = Header(unclamp_version="0", metadata=metadata)
        with pytest.raises(RunLogError, match="JSON"):
            RunLogWriter(run, header=header, overwrite=True)
    assert loss_of(run) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_fails_costs_no_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write(tmp_path / "run", 1.0)

    def fail(path: Path, data: bytes) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("unclamp.runlog.folder.write_atomically", fail)
    with pytest.raises(RunLogError, match="no space left"):
        write(run, 2.0, overwrite=True)
    monkeypatch.undo()
    assert loss_of(run) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_another_process_writes_is_not_replaced(tmp_path: Path) -> None:
    code = (
        "import sys; from unclamp.runlog import Header, RunLogWriter\n"
        f"w = RunLogWriter({str(tmp_path / 'run')!r}, header=Header(unclamp_version='0'))\n"
        "print('ready', flush=True); sys.stdin.read(); import os; os._exit(1)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as writer:  # pyright: ignore
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(RunLogError, match=f"being written by process {writer.pid}"):
            write(tmp_path / "run", 2.0, overwrite=True)
        assert (tmp_path / "run" / "run.json").exists()
        writer.stdin.close()
        writer.wait(timeout=PATIENCE_S)
    # Killed: its header says "running" for ever, and nobody writes.
    write(tmp_path / "run", 2.0, overwrite=True)
    assert loss_of(tmp_path / "run") == 2.0


def test_a_run_that_runs_on_another_machine_is_not_replaced(tmp_path: Path) -> None:
    run = write(tmp_path / "run", 1.0)
    edit(run, ".writer-r0.json", host=f"not-{socket.gethostname()}")
    edit(run, "run.json", status="running")
    with pytest.raises(RunLogError, match=r"on not-.*remove the folder yourself"):
        write(run, overwrite=True)
    edit(run, "run.json", status="finished")
    write(run, 2.0, overwrite=True)
    assert loss_of(run) == 2.0


def test_a_run_that_this_process_writes_is_not_replaced(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=HEADER) as writer:
        with pytest.raises(RunLogError, match="by this process: close its recorder first"):
            write(tmp_path / "run", overwrite=True)
        writer.add("steps", {"step": [0], "loss": [1.0], "time_s": [0.0], "step_ms": [0.0]})
    assert loss_of(tmp_path / "run") == 1.0


def test_the_refusal_of_a_folder_in_use_names_both_ways(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    with pytest.raises(RunLogError, match=r"overwrite=True; or .*run-\{n\}"):
        write(run)
    assert f"process {os.getpid()}" in (run / ".writer-r0.json").read_text().replace(
        '"process": ', "process "
    )
    shutil.rmtree(run)


def test_a_process_with_the_number_of_one_that_was_killed_may_replace_its_run(
    tmp_path: Path,
) -> None:
    # A container that starts again has its old host name, and often its old process numbers.
    run = write(tmp_path / "run", 1.0)
    edit(run, "run.json", status="running")
    edit(run, ".writer-r0.json", made_by="another process")
    write(run, 2.0, overwrite=True)
    assert loss_of(run) == 2.0


@pytest.mark.parametrize("hindrance", ["file", "metadata", "ranks"])
def test_who_writes_a_run_is_told_only_when_it_will_be_replaced(
    tmp_path: Path, hindrance: str
) -> None:
    run = write(tmp_path / "run")
    if hindrance == "file":
        (run / "mine.txt").write_text("")
    metadata = {"a": Path()} if hindrance == "metadata" else {}
    world_size = 2 if hindrance == "ranks" else 1
    header = Header(unclamp_version="0", metadata=metadata, world_size=world_size)
    told: list[str] = []

    def tell() -> None:
        told.append("told")

    with pytest.raises(RunLogError):
        RunLogWriter(run, header=header, overwrite=True, before_replacing=tell)
    assert told == []
    (run / "mine.txt").unlink(missing_ok=True)
    RunLogWriter(run, header=HEADER, overwrite=True, before_replacing=tell).close()
    assert told == ["told"]
