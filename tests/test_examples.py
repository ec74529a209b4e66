"""The examples run; notebooks a second time too, and they lie in the repository without outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unclamp
from patience import PATIENCE_S

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
cells = notebook.cells
again = nbformat.from_dict([cell | {"id": f"{cell['id']}-again"} for cell in cells])
notebook.cells = [*cells, *again]
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
"""Executes all cells twice in one kernel; a process of its own, for what Jupyter warns of."""


def outputs(cell: dict) -> str:
    """Return what a cell shows: streams, texts, HTML; not that kernels are compiled, once."""
    shown = []
    for output in cell["outputs"]:
        assert output["output_type"] != "error"
        shown += [output.get("text", ""), *output.get("data", {}).values()]
    text = "\n".join("".join(each) for each in shown)  # nbformat writes lists of lines
    return re.sub(r"^unclamp: compiling .*\n+", "", text, flags=re.MULTILINE)


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["first_look.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stripped(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("notebook")
    source = str(Path(unclamp.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": source,
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
    }
    (path,) = NOTEBOOKS
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(folder / "done.ipynb")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    notebook = json.loads((folder / "done.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_first_look_shows_what_it_says(cells: list[dict]) -> None:
    first = "\n".join(map(outputs, cells[: len(cells) // 2]))
    assert "observed 2 layers for 50 steps" in first
    assert "<pre>observed 2 layers" in first
    assert "finished, 50 steps, 6 sites, ranks 0-0" in first
    assert "clamping is the cause" in first
    assert "[[override]]" in first
    assert "Warning" not in first


def test_every_cell_can_be_run_again(cells: list[dict]) -> None:
    half = len(cells) // 2
    for once, again in zip(cells[:half], cells[half:], strict=True):
        shown = [outputs(cell) for cell in (once, again)]
        if "replays of" not in shown[0]:
            assert shown[0] == shown[1]


def test_the_script_for_many_processes_trains_and_records(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "train_fsdp2.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 80
    source, run = str(Path(unclamp.__file__).parents[1]), tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", "2", str(script), str(run)],
        env={**os.environ, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "8 layers in FP8" in ended.stdout
    log = unclamp.RunLog.open(run)
    steps = log.steps().to_pylist()
    assert sorted((row["rank"], row["step"]) for row in steps) == [
        (rank, step) for rank in (0, 1) for step in range(30)
    ]
    losses = [row["loss"] for row in steps]
    assert sum(losses[-10:]) < sum(losses[:10]) / 1.4


TWICE = """
import runpy, sys
script, folder = sys.argv[1:]
for epochs in ("1", "2"):
    sys.argv = [script, folder, epochs]
    runpy.run_path(script, run_name="__main__")
"""
"""Runs a script, and again with more epochs; in one process, for what it takes to import."""


def test_the_script_for_lightning_trains_and_goes_on(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "train_lightning.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    pytest.importorskip("lightning")
    source = str(Path(unclamp.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", TWICE, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("converted 2 layers, skipped 2") == 2
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        steps = log.sql("SELECT step, loss FROM steps ORDER BY step").to_pylist()
    assert [row["step"] for row in steps] == list(range(len(steps)))
    losses = [row["loss"] for row in steps]
    assert sum(losses[-10:]) < sum(losses[:10]) / 1.5


def test_the_example_of_transformers_trainer_records_and_saves(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    script = Path(__file__).parent.parent / "examples" / "train_trainer.py"
    source = str(Path(unclamp.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "unclamp report run"
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        losses = [
            row["loss"] for row in log.sql("SELECT loss FROM steps ORDER BY step").to_pylist()
        ]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    assert (tmp_path / "run-checkpoints" / "checkpoint-30" / "unclamp_scaling_state.pt").is_file()
