"""The wheel that `python -m build` makes holds what it must, and works outside the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

from patience import PATIENCE_S

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, which borrows what the wheel requires.

    What another environment installed as editable is not borrowed: a folder that a .pth file names
    has its own .pth files ignored.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(install, capture_output=True, check=True, env=environ())
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "unclamp").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there
    assert {"unclamp/py.typed", "unclamp/study/default.toml"} <= held
    assert {"page.html.j2", "sites.js", "style.css"} <= {Path(name).name for name in held}


def test_its_metadata_say_what_it_needs_and_its_licence(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Name"] == "unclamp"
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_all("License-File") == ["LICENSE"]
    assert {"hf", "tensorboard", "wandb", "mlflow"} <= set(found.get_all("Provides-Extra") or [])
    required = found.get_all("Requires-Dist") or []
    always = [line for line in required if "extra ==" not in line]
    assert any(line.startswith("torch>=") for line in always)
    assert not any(line.startswith(("pytest", "transformers", "build")) for line in always)
    assert any(line.startswith("transformers>=") and "'hf'" in line for line in required)


def test_what_runs_is_the_wheel(fresh: Path, tmp_path: Path) -> None:
    code = "import unclamp; print(unclamp.__file__); print(unclamp.__version__)"
    file, version = run([str(fresh / "python"), "-c", code], tmp_path).split()
    assert Path(file).is_relative_to(fresh.parent)
    assert run([str(fresh / "unclamp"), "--version"], tmp_path) == f"unclamp {version}\n"


def test_commands_without_torch_work_outside_the_repository(fresh: Path, tmp_path: Path) -> None:
    command = [str(fresh / "python"), "-m", "unclamp"]
    assert "study" in run([*command, "--help"], tmp_path)
    formats = json.loads(run([*command, "formats", "--json"], tmp_path))
    assert {row["name"]: row["max"] for row in formats}["e5m2"] == 57344
    shipped = (SOURCE / "unclamp" / "study" / "default.toml").read_text()
    assert run([*command, "study", "--print-config"], tmp_path) == shipped


def test_a_study_and_its_page_work_outside_the_repository(fresh: Path, tmp_path: Path) -> None:
    command = [str(fresh / "unclamp")]
    # The arm in high precision: kernels would be compiled anew for this environment.
    short = ["--quick", "--scenario", "text", "--arm", "hp", "--steps", "3", "--json"]
    document = json.loads(run([*command, "study", *short], tmp_path))
    assert document["page"] == "runs/quick/report.html"
    page = tmp_path / "runs" / "quick" / "report.html"
    assert "<style>" in page.read_text(encoding="utf-8")
    page.unlink()
    run([*command, "report", "runs/quick"], tmp_path)
    assert page.is_file()
