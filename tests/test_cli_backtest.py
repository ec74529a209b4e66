"""`unclamp backtest` as a user types it."""

import json
from pathlib import Path

import pytest

from test_cli import assert_one_clear_line, unclamp
from unclamp.analysis.steering import Backtest, parse_rule
from unclamp.runlog import Header, RunLogWriter

RULE = "ladder=delayed(4) > guarded, floor=6"


def write(path: Path, clamped: int = 0) -> Path:
    """Write a site whose amax is 1, and 50 at step 8 and 20, where some elements are clamped."""
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        writer.add("sites", {"site": [0], "fqn": ["up"], "role": ["input"], "format": ["e4m3fn"],
                             "scaling": ["delayed"], "format_max": [448.0]})  # fmt: skip
        for step in range(30):
            writer.add("casts", {"step": [step], "site": [0], "scale": [1.0], "elements": [4],
                                 "amax": [50.0 if step in (8, 20) else 1.0],
                                 "saturated": [clamped if step in (8, 20) else 0],
                                 "underflowed": [0], "nonfinite": [0], "recast": [0],
                                 "saturated_error": [0.0], "microsteps": [1]})  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "one")


def test_it_says_what_a_rule_would_have_done(run: Path) -> None:
    done = unclamp("backtest", run, "--rule", RULE)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "On 1 log the rule goes up 2 times and comes back 1 times" in said
    assert "50 % of the switches up are false" in said
    assert "step 8: up input: delayed(4) -> guarded(2)" in said
    assert "step 14: up input: guarded(2) -> delayed(4)" in said


def test_json_is_one_document_and_the_file_can_be_handed_in(run: Path, tmp_path: Path) -> None:
    """A folder stands for the runs in it."""
    file = tmp_path / "tested.json"
    done = unclamp("backtest", run.parent, "--rule", RULE, "--late", 1, "--json", "--out", file)
    document = json.loads(done.stdout)
    assert [each["run"] for each in document["runs"]] == [str(run)]
    assert [d["kind"] for d in document["runs"][0]["decisions"]] == ["up", "down", "up"]
    read = Backtest.load(file)
    assert (read.rule, read.late, read.ups) == (parse_rule(RULE), 1, 2)


def test_of_several_logs_it_says_which_one_a_sentence_is_about(tmp_path: Path) -> None:
    one, other = write(tmp_path / "quiet"), write(tmp_path / "clamps", clamped=2)
    said = " ".join(unclamp("backtest", one, other, "--rule", RULE).stdout.split()).split(" - ")
    (unbiased,) = (line for line in said if "Nothing was clamped in this run" in line)
    (biased,) = (line for line in said if "2 casts of 30 were clamped in this run" in line)
    assert unbiased.startswith(f"Of {one}: ")
    assert biased.startswith(f"Of {other}: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rule", "flor=3"], "did you mean 'floor'"),
        (["--out", "/nowhere/at/all.json"], "cannot write"),
    ],
)
def test_a_mistake_is_one_clear_line(run: Path, arguments: list[str], said: str) -> None:
    done = unclamp("backtest", run, *arguments)
    assert_one_clear_line(done, said)


def test_what_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    assert_one_clear_line(unclamp("backtest", tmp_path / "none"))
