"""A terminal or pipe that shows ASCII only: nothing that a command prints stops it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE_S
from truths.runs import SPIKE, write_planted
from unclamp.cli.plain import in_others

ALL = """
import io, json, sys
from unclamp.cli import main

for line in json.loads(sys.argv[1]):
    print("====", line[0], flush=True)
    sys.argv = ["unclamp", *line]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
"""
"""Types many commands in one process, for what it takes to import."""


def test_every_command_prints_where_only_ascii_can_be_shown(tmp_path: Path) -> None:
    run = str(write_planted(tmp_path / "run", scenario="größe"))
    other = str(write_planted(tmp_path / "other", scenario="outlier", lr=0.1))
    page = str(tmp_path / "page.html")
    lines = [["doctor"], ["formats"], ["report", run, "--out", page], ["spikes", run],
             ["report", run, other, "--out", page], ["associate", run], ["spikes", run, "--json"],
             ["study", "--print-config"], ["--help"], ["report", "--help"]]  # fmt: skip
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0",
             "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(lines)], env=os.environ | plain,
        capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    said = dict(part.split("\n", 1) for part in done.stdout.decode("ascii").split("==== ") if part)
    assert len(done.stdout.decode("ascii").split("==== ")) == len(lines) + 1
    assert "- " in said["doctor"]
    assert str(SPIKE) in said["spikes"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a · b", b"a - b"),
        ("model.l…down: 1 → 2", b"model.l~down: 1 -> 2"),
        ("größe", rb"gr\u00f6\u00dfe"),
        ("\U0001d6fc\ud800", rb"\ud835\udefc\ud800"),
    ],
)
def test_what_cannot_be_shown_is_an_escape_that_json_reads(text: str, shown: bytes) -> None:
    import codecs

    codecs.register_error("here", in_others)
    assert text.encode("ascii", "here") == shown
    if "\\u" in shown.decode():
        assert json.loads(f'"{shown.decode()}"') == text
