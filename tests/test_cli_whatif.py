"""`unclamp whatif` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest

from test_cli import assert_one_clear_line, unclamp
from unclamp.runlog import Header, RunLogWriter

STEPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose one amax is 1, and 100 in every twentieth step."""
    path = tmp_path_factory.mktemp("whatif") / "run"
    steps = np.arange(STEPS)
    amax = np.where(steps % 20 == 19, 100.0, 1.0).astype(np.float32)
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        site = {"site": [0], "fqn": ["mlp.down_proj"], "role": ["input"], "format": ["e4m3fn"]}
        writer.add("sites", {**site, "scaling": ["dynamic"], "format_max": [448.0]})
        writer.add("casts", {"step": steps, "site": np.zeros(STEPS, np.int32), "amax": amax,
                             "scale": 448 / amax, "elements": np.full(STEPS, 1000),
                             **{name: np.zeros(STEPS, np.int64)
                                for name in ("saturated", "underflowed", "nonfinite", "recast")},
                             "saturated_error": np.zeros(STEPS),
                             "microsteps": np.ones(STEPS, np.int32)})  # fmt: skip
    return path


def test_the_table_says_what_each_policy_would_have_done(run: Path) -> None:
    done = unclamp("whatif", run, "--policy", "delayed(16)", "--policy", "delayed(64)",
                   "--policy", "guarded(4)", "--bandwidth", "1", "--by-site")  # fmt: skip
    assert done.returncode == 0, done.stderr
    words: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if "  " in line:  # a row: of the first table, or of one with further columns
            words.setdefault(line.split("  ")[0], []).extend(line.split())
    # Of three outliers a history of 16 has forgotten the one before, and one of 64 has not.
    assert words["delayed(16)"][1:3] == ["3", "100.00x"]
    assert words["delayed(64)"][1:3] == ["1", "100.00x"]
    assert words["guarded(4)"][1:3] == ["0", "1.00x"]
    # 3 of 60 casts of 1,000 bfloat16 elements again, at 1 GB/s: 100 bytes a step.
    assert words["guarded(4)"][5] == "1.050"
    assert words["guarded(4)"][-1] == "0.0001"
    assert "unbiased" in done.stdout
    assert "mlp.down_proj input: 3 clamped of 60 casts" in " ".join(done.stdout.split())


def test_json_is_one_document(run: Path) -> None:
    done = unclamp("whatif", run, "--grid", "--json")
    data = json.loads(done.stdout)
    assert len(data["policies"]) > 180
    by_name = {policy["policy"]: policy for policy in data["policies"]}
    assert by_name["delayed(16)"]["clamped_casts"] == 3
    assert by_name["delayed(16)"]["sites"][0]["first_clamp"] == 19
    assert by_name["dynamic"]["reads_per_element"] == 2
    assert any(policy["on_frontier"] for policy in data["policies"])
    assert data["policies"][0]["lost"] is None


def test_what_none_beats_is_shown_of_a_grid(run: Path) -> None:
    done = unclamp("whatif", run, "--grid")
    assert done.returncode == 0, done.stderr
    assert "that no other beats" in " ".join(done.stdout.split())


def test_a_policy_under_which_no_site_clamps_says_so_by_site(run: Path) -> None:
    done = unclamp("whatif", run, "--policy", "dynamic", "--policy", "delayed", "--by-site")
    worst = done.stdout.split("\ndynamic\n")[1].split("\ndelayed(16)\n")
    assert worst[0].strip() == "no site clamps, and none is cast again"
    assert "clamped of" in worst[1]
    assert "no site" not in worst[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "delayd"], "did you mean 'delayed'"),
        (["--site", "lm_head"], "no site of the run matches 'lm_head'"),
        (["--grid", "--policy", "guarded"], "not both"),
    ],
)
def test_mistakes_are_one_line(run: Path, options: list[str], said: str) -> None:
    done = unclamp("whatif", run, *options)
    assert_one_clear_line(done)
    assert said in done.stderr


def test_no_figure_is_cut_where_the_table_is_wider_than_the_terminal(run: Path) -> None:
    policies = ["delayed(history_len=16, reduce=most_recent, margin=1)", "delayed(64)"]
    options = [part for policy in policies for part in ("--policy", policy)]
    done = unclamp("whatif", run, *options, "--bandwidth", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.startswith("delayed(64)")]
    figures = [figure for row in rows for figure in row[1:]]
    # One read an element; nothing was inspected, so that two figures are unknown.
    assert figures == ["1", "100.00x", "-", "1.000", "?", "-", "0"]
