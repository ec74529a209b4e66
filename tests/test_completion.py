"""Completion in a shell: of commands, of options, and of the files that a RUN is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unclamp
from patience import PATIENCE_S

PROGRAM = """#!{python}
import sys
sys.argv[0] = "unclamp"
sys.path.insert(0, {source!r})
from unclamp.cli import main
main()
"""
TYPED = """
eval "$(unclamp --show-completion)"
unclamp --install-completion >/dev/null
complete_it() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _unclamp_completion unclamp
    echo "${COMPREPLY[*]}"
}
complete_it unclamp "sp"
complete_it unclamp spikes --thr
complete_it unclamp spikes ru
complete -p unclamp
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "unclamp"
    path.parent.mkdir()
    source = str(Path(unclamp.__file__).parents[1])
    path.write_text(PROGRAM.format(python=sys.executable, source=source), encoding="utf-8")
    path.chmod(0o755)
    return path


def run(program: Path, *line: str, **environment: str) -> str:
    environ = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(program.parent.parent),
    }
    done = subprocess.run(
        line, env=environ | environment, cwd=program.parent.parent, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_options_and_paths(program: Path) -> None:
    """What is completed to nothing is left to bash, which completes paths (`-o default`)."""
    command, option, path, rule = run(program, "bash", "-c", TYPED).splitlines()
    assert command == "spikes"
    assert option == "--threshold"
    assert path == ""
    assert rule == "complete -o default -F _unclamp_completion unclamp"
    bashrc = (program.parent.parent / ".bashrc").read_text(encoding="utf-8")
    assert "unclamp" in bashrc


def test_zsh_is_given_commands_and_asked_for_files(program: Path) -> None:
    """Without a zsh: what the program answers to zsh's function."""

    def answer(typed: str) -> str:
        return run(program, str(program), _UNCLAMP_COMPLETE="complete_zsh",
                   _TYPER_COMPLETE_ARGS=typed)  # fmt: skip

    assert '"spikes":' in answer("unclamp sp")
    assert answer("unclamp spikes ru").strip() == "_files"
    shown = run(program, str(program), _UNCLAMP_COMPLETE="source_zsh")
    assert "compdef _unclamp_completion unclamp" in shown
