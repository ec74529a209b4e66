"""`python train.py`, then `unclamp explain RUN`: its functions are found, and it is not run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch

import unclamp
from patience import PATIENCE_S
from truths.trainings import Case, record
from unclamp import ReplayError
from unclamp.explain.facts import load_functions
from unclamp.explain.script import load_from_script
from unclamp.explain.store import find_snapshots, read_facts

HEAD = '''
"""A training as a user writes one."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import unclamp
from unclamp import Delayed, Recipe, Recorder, Snapshots, Training

from sizes import WIDTH

with open("executed.txt", "a") as file:
    file.write("x")
torch.use_deterministic_algorithms(True)
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
arguments = parser.parse_args()


@dataclass
class Config:
    hidden: int = 64
    lr: float = 1e-3

    twice = hidden * 2


config = Config()
config.lr = 1e-4
if sys.version_info >= (3, 11):
    TOKENS = 32
else:
    TOKENS = 16


def layers():
    return torch.nn.Linear(WIDTH, config.hidden), torch.nn.ReLU(), torch.nn.Linear(64, WIDTH)


def build() -> Training:
    torch.manual_seed(0)
    assert arguments.steps == 45
    model = torch.nn.Sequential(*layers())
    unclamp.convert(model, Recipe.uniform(Delayed()))
    return Training(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=config.lr))


def step(training: Training, batch) -> torch.Tensor:
    x, target = batch
    loss = (training.model(x) - target).square().mean()
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    return loss


def batches(teacher, steps):
    for n in range(steps):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        x[0] *= 20 if n == 35 else 1
        with torch.no_grad():
            target = teacher(x) + 0.1 * torch.randn(32, WIDTH, generator=generator)
        yield x, target

'''
TRAIN = """
with open("trained.txt", "a") as file:
    file.write("x")
training, teacher = build(), build().model
unclamp.revert(teacher)
with (
    Recorder(training.model, "run", overwrite=True) as recorder,
    Snapshots(training, "run", build=build, step=step, recorder=recorder) as snapshots,
):
    for n, batch in snapshots.follow(batches(teacher, arguments.steps)):
        loss = step(training, batch)
        recorder.step(n, loss=loss)
        snapshots.after(n, loss)
"""
UNGUARDED = HEAD + TRAIN
GUARDED = f'{HEAD}\nif __name__ == "__main__":\n{indent(TRAIN, "    ")}'


def run(folder: Path, *line: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    source = str(Path(unclamp.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *line],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def explain(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "-m", "unclamp", "explain", "run", "--json", "--budget", "6", *options)


def write(folder: Path, script: str, name: str = "train.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sizes.py").write_text("WIDTH = 16\n", encoding="utf-8")
    (folder / name).write_text(script, encoding="utf-8")
    return folder / name


def trained(folder: Path, script: str) -> Path:
    path = write(folder, script)
    done = run(folder, "train.py", "--steps", "45")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(UNGUARDED, id="plain"),
        pytest.param(GUARDED, id="guard", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_a_script_is_explained_without_training_again(script: str, tmp_path: Path) -> None:
    trained(tmp_path, script)
    files = {file: file.read_bytes() for file in tmp_path.glob("*.txt")}
    assert len(files) == 2
    header = (tmp_path / "run" / "run.json").read_bytes()
    done = explain(tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reproduced"] is True
    assert found["verdict"] == "clamping"
    assert found["onset"] == 35
    assert {file: file.read_bytes() for file in tmp_path.glob("*.txt")} == files
    assert (tmp_path / "run" / "run.json").read_bytes() == header


@pytest.mark.slow
def test_a_script_in_a_package_runs_with_m_and_is_explained(tmp_path: Path) -> None:
    package = tmp_path / "project"
    write(package, UNGUARDED.replace("from sizes", "from .sizes"))
    (package / "__init__.py").write_text("")
    done = run(tmp_path, "-m", "project.train", "--steps", "45")
    assert done.returncode == 0, done.stderr
    done = explain(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reproduced"] is True


ASK = """
from pathlib import Path
from unclamp.explain import Limits, explain_spike

SCRIPT = Path("train.py")
TEXT = SCRIPT.read_text()


def ask(name, **functions):
    try:
        found = explain_spike("run", limits=Limits(replays=6), **functions)
        print(name, found.verdict, found.reproduced, *found.notes)
    except Exception as error:
        print(name, type(error).__name__, error)


SCRIPT.write_text(TEXT + "# a comment")
ask("comment")
SCRIPT.write_text(TEXT.replace("loss.backward()", "(2 * loss).backward()"))
ask("code")
SCRIPT.rename("old.py")
ask("moved")
Path("old.py").write_text(TEXT.replace("steps == 45", "steps == 45  # as it was"))
ask("named", build="old.py:build", step="old.py:step")
"""


def test_a_changed_and_a_missing_script_are_said(tmp_path: Path) -> None:
    path = trained(tmp_path, UNGUARDED)
    *_, snapshot = find_snapshots(tmp_path / "run")
    assert read_facts(snapshot)["build"] == f"{path}:build"
    done = run(tmp_path, "-c", ASK)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert re.match("clamping True .*train.py has changed since the run", said["comment"])
    assert re.match("ReplayError the build or step function has changed", said["code"])
    missing = "ReplayError cannot read the script .*train.py.*--build FILE.py:FUNCTION"
    assert re.match(missing, said["moved"])
    assert said["named"].startswith("clamping True")
    assert "has changed" not in said["named"]


def test_functions_on_standard_input_are_warned_of_and_explained_in_their_process(
    tmp_path: Path,
) -> None:
    write(tmp_path, "")
    script = UNGUARDED.replace("default=50", "default=45")
    here = '\nprint(unclamp.explain_spike("run").verdict)\n'
    done = run(tmp_path, "-", stdin=script + here)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clamping\n"
    assert "UnclampWarning: build and step come from standard input" in done.stderr
    done = explain(tmp_path)
    assert done.returncode == 2
    assert "defined in a notebook, a shell or on standard input" in done.stderr


# ---- what of a script is executed --------------------------------------------------------


def function(folder: Path, script: str, name: str = "build") -> Any:
    path = write(folder, dedent(script), f"script_{abs(hash(script))}.py")
    return load_functions({"build": f"{path}:{name}"})["build"]


def test_what_the_functions_use_is_executed_in_order_and_nothing_else(tmp_path: Path) -> None:
    build = function(
        tmp_path,
        """
        import math
        values = [1]
        values.append(2)
        values[0] = 10
        unused = 1 / 0
        print("never")
        values.clear()
        scale = values[0] * 2
        try:
            import nonsense_of_nobody
        except ImportError:
            nonsense_of_nobody = None
        offset: float = 0.5
        offset += 1
        def helper(x):
            inner = lambda y: y + offset
            return inner(x) * scale + Box().size
        class Box:
            size = len(values)
            half = size / 2
        def build():
            return helper(math.pi)
        for unused in range(3):
            print("never")
        1 / 0
        """,
    )
    assert build() == (3.141592653589793 + 1.5) * 20 + 2
    assert build.__module__ != "__main__"
    assert build.__module__ in sys.modules


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("def biuld(): pass", "no 'build' at its top level; did you mean 'biuld'"),
        ("def build(): return x\nfor x in range(3): pass", "need 'x', which line 2 sets"),
        ("def build(): return x\nwith open('f') as x: pass", "need 'x', which line 2 sets"),
        (
            'def build(): return x\nif __name__ == "__main__":\n    x = 1',
            "need 'x', which line 2 sets where the script trains",
        ),
        ("def build(): return x\nx = 1 / 0", "fails in line 2: ZeroDivisionError"),
        ("import sys\nx = sys.exit(3)\ndef build(): return x", "fails in line 2: SystemExit: 3"),
        ("def build(:", "cannot read the script"),
        ("import nonsense_of_nobody\ndef build(): pass", "fails in line 1: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_had_without_training_is_said(
    script: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReplayError, match=message):
        function(tmp_path, script)


def test_no_run_begins_while_a_replay_is_built(tmp_path: Path) -> None:
    """A `build` that makes a recorder would replace the run that is being explained."""
    record(Case(), tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()

    def build() -> unclamp.Training:
        training = Case().build()
        unclamp.Recorder(training.model, tmp_path / "run", overwrite=True)
        return training

    with pytest.raises(unclamp.RunLogError, match=r"no run can begin in .*run while a replay"):
        unclamp.explain_spike(tmp_path / "run", build=build, step=Case().step)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    unclamp.Recorder(Case().build().model, tmp_path / "other").close()  # afterwards one may


def test_settings_of_torch_are_made_and_torch_is_not_called_otherwise(tmp_path: Path) -> None:
    before = torch.get_default_dtype()
    try:
        build = function(
            tmp_path,
            """
            import torch
            torch.set_default_dtype(torch.float64)
            torch.save(torch.nonsense, "x")
            def build():
                return torch.zeros(1).dtype
            """,
        )
        assert build() == torch.float64
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["train:", ":build", "build", "train.py"])
def test_a_name_of_no_function_is_refused(name: str) -> None:
    with pytest.raises(ReplayError, match=r"MODULE:FUNCTION .*or FILE\.py:FUNCTION"):
        load_functions({"build": name})


def test_a_file_that_the_top_level_opens_to_write_is_not_emptied(tmp_path: Path) -> None:
    log, script = tmp_path / "train.log", tmp_path / "train.py"
    log.write_text("ten hours")
    for opened in (f"open({str(log)!r}, 'w')", f"open({str(log)!r}, mode='a')",
                   f"Path({str(log)!r}).open('w')"):  # fmt: skip
        script.write_text(
            f"from pathlib import Path\nlog = {opened}\ndef build(): ...\n"
            "def step(t, b): log.write('x')\n"
        )
        with pytest.raises(ReplayError, match=r"line 2 of .*writes a file"):
            load_from_script(script, ("build", "step"))
    assert log.read_text() == "ten hours"
    script.write_text(
        f"from pathlib import Path\ntext = Path({str(log)!r}).read_text()\n"
        f"def build(): return text\ndef step(t, b): open({str(log)!r}, 'w')\n"
    )
    assert load_from_script(script, ("build", "step")).build() == "ten hours"


def test_each_command_line_has_a_module_of_its_own_and_seeds_are_set(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\nargument = sys.argv[1]\ntorch.manual_seed(3)\nW = torch.randn(2)\n"
        "def build(): return argument, W\ndef step(t, b): ...\n"
    )
    for given in ("2", "3"):
        facts = {"argv": [given]}
        argument, drawn = load_from_script(script, ("build", "step"), facts=facts).build()
        generator = torch.Generator().manual_seed(3)
        assert argument == given
        assert torch.equal(drawn, torch.randn(2, generator=generator))


# ---- functions of a module -----------------------------------------------------------------------
PARSES = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, required=True)
WIDTH = parser.parse_args().width
def build():
    return WIDTH
"""


def test_a_module_is_imported_with_the_command_line_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parses_as_the_run.py").write_text(PARSES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unclamp", "explain", "RUN"])
    names = {"build": "parses_as_the_run:build"}
    assert load_functions(names, argv=["--width", "7"])["build"]() == 7
    assert sys.argv == ["unclamp", "explain", "RUN"]


def test_a_module_that_ends_the_program_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parses_and_ends.py").write_text(PARSES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ReplayError, match="importing parses_and_ends ends the program"):
        load_functions({"build": "parses_and_ends:build"})
