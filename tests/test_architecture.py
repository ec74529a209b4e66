"""The shape of the project: layers, imports, exports, and what importing pulls in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unclamp

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
SOURCE = Path(unclamp.__file__).parent
LAYERS = [
    {"errors", "files", "quiet", "shown", "version", "worker", "written"},
    {"formats", "names", "totals"},
    {"covered", "scaling"},
    {"reference", "rule", "runlog"},
    {"recipe", "policy"},
    {"numerics"},
    {"nn"},
    {"blueprint", "telemetry", "parallel"},
    {"analysis"},
    {"autopilot", "explain"},
    {"integrations", "study", "traps"},
    {"doctor"},
    {"report"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
TORCH_FREE = ["unclamp", "unclamp.files", "unclamp.worker", "unclamp.runlog", "unclamp.analysis",
              "unclamp.analysis.explanation", "unclamp.report.html",
              "unclamp.report.text", "unclamp.report.side_by_side.page",
              "unclamp.report.side_by_side.text", "unclamp.report.doctor", "unclamp.report.traps",
              "unclamp.study.config", "unclamp.cli"]  # fmt: skip
MODULES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    rooms = set()
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("unclamp.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down_or_stay_in_the_room(path: Path) -> None:
    own = room(path)
    for other in imported_rooms(path) - {own}:
        assert LEVEL[other] < LEVEL[own]


def test_architecture_prints_the_layers_that_are_enforced() -> None:
    printed = re.findall(r"^\| (\d+) \| ([^|]+) \|", ARCHITECTURE, flags=re.MULTILINE)
    rows = {int(layer): set(re.findall(r"`(\w+)`", rooms)) for layer, rooms in printed}
    assert rows == dict(enumerate(LAYERS))
    assert len(printed) == len(LAYERS)  # no layer in two rows


def test_the_tests_of_invariants_exist() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", ARCHITECTURE)
    assert len(named) > 40
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("package", ["nn", "numerics"])
def test_architecture_names_every_file_of_the_core(package: str) -> None:
    section = ARCHITECTURE.split(f"### Inside `{package}`")[1].split("##")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, flags=re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)]
    there = {path.stem for path in (SOURCE / package).iterdir() if path.stem[0] != "_"}
    assert sorted(named) == sorted(there)


def test_telemetry_and_analysis_meet_only_in_the_run_log() -> None:
    for path in (SOURCE / "analysis").rglob("*.py"):
        assert "telemetry" not in imported_rooms(path)
    for path in (SOURCE / "nn").rglob("*.py"):
        assert "telemetry" not in imported_rooms(path)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_is_complete_and_loads() -> None:
    for name in unclamp.__all__:
        assert getattr(unclamp, name) is not None
    assert sorted(unclamp.__all__) == sorted(set(unclamp.__all__))


def test_every_error_and_warning_is_public() -> None:
    tree = ast.parse((SOURCE / "errors.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert len(classes) > 5
    assert classes <= set(unclamp.__all__)


def test_all_names_whatever_the_package_offers() -> None:
    """What is imported or loaded at first use is public, and nothing is in one list alone."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unclamp")
        for alias in node.names
    }
    assert imported == set(unclamp.__all__)
    assert set(unclamp._LAZY) < imported


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        unclamp.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short_and_say_what_they_answer(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 420
    assert ast.get_docstring(ast.parse(text))


def test_an_explanation_needs_no_torch() -> None:
    code = "import sys, unclamp; unclamp.Explanation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def shared() -> None:
    """Stands for what a module's tests share, and what takes time to make."""


def test_tests_that_share_a_fixture_of_their_module_go_to_one_worker(
    shared: None, request: pytest.FixtureRequest
) -> None:
    mark = request.node.get_closest_marker("xdist_group")
    assert mark is not None
    assert mark.args == ("tests/test_architecture.py",)
    if getattr(request.config.option, "loadgroup", False):  # as `make test` asks for
        assert request.node.nodeid.endswith("@tests/test_architecture.py")
