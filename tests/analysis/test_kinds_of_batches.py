"""Losses judged within their kind of batch: planted series of several kinds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from truths.curves import two_kinds
from truths.kinds import write_losses
from unclamp.analysis import (
    find_divergences,
    find_spikes,
    read_curve,
    run_curve,
    run_divergences,
    run_spikes,
    unjudged_in_words,
)
from unclamp.analysis.curves import run_losses
from unclamp.cli import app
from unclamp.errors import AnalysisError
from unclamp.runlog import Header, RunLog, RunLogWriter

EVERY = 20


def test_a_kind_with_a_higher_level_is_no_spike_of_another() -> None:
    for seed in range(20):
        losses, groups = two_kinds(seed)
        assert find_spikes(losses, groups=groups) == []


def test_without_groups_the_other_kind_raises_alarms() -> None:
    alarms = sum(len(find_spikes(two_kinds(seed)[0])) for seed in range(20))
    assert alarms > 500


@pytest.mark.parametrize(("onset", "group"), [(1005, None), (1200, "answers")])
def test_a_spike_planted_in_either_kind_is_found_in_it(onset: int, group: str | None) -> None:
    for seed in range(20):
        losses, groups = two_kinds(seed)
        level = 3.5 if group else 2.0
        losses[onset] *= 1.5
        (spike,) = find_spikes(losses, groups=groups)
        assert (spike.onset, spike.group, spike.number) == (onset, group, 1)
        assert spike.end - onset in (0, EVERY if group else 1)  # noise may seem to go on with it
        assert spike.level == pytest.approx(level, rel=0.05)
        assert spike.height == pytest.approx(1.5, rel=0.15)
        assert spike.recovery is not None
        assert groups[spike.recovery] == group
        assert spike.recovery - onset <= 4 * (EVERY if group else 1)


def test_spikes_of_all_kinds_stand_in_the_order_of_steps_and_are_numbered_in_it() -> None:
    losses, groups = two_kinds(3)
    for onset in (1800, 700, 1203, 1000):
        losses[onset] *= 2
    found = find_spikes(losses, groups=groups)
    assert [(s.onset, s.number) for s in found] == [(700, 1), (1000, 2), (1203, 3), (1800, 4)]
    assert [s.group for s in found] == ["answers", "answers", None, "answers"]


def test_each_kind_is_judged_as_if_it_stood_alone() -> None:
    losses, groups = two_kinds(5)
    losses[[300, 301, 302, 900, 920, 1500]] *= 1.7
    found = find_spikes(losses, groups=groups)
    steps = np.arange(len(losses))
    alone = []
    for kind in (None, "answers"):
        own = np.array([group == kind for group in groups])
        alone += find_spikes(losses[own], steps=steps[own])
    key = [(s.onset, s.peak, s.end, s.recovery, s.height, s.level) for s in found]
    assert key == sorted((s.onset, s.peak, s.end, s.recovery, s.height, s.level) for s in alone)


def test_a_series_of_one_kind_is_judged_as_without_groups() -> None:
    losses = 2 + 0.02 * np.random.default_rng(0).standard_normal(400)
    losses[200:203] *= 1.6
    plain = find_spikes(losses)
    assert find_spikes(losses, groups=[None] * 400) == plain
    named = find_spikes(losses, groups=["a"] * 400)
    assert [(s.onset, s.end, s.height) for s in named] == [
        (s.onset, s.end, s.height) for s in plain
    ]


def test_a_kind_with_few_batches_is_not_judged_and_said() -> None:
    losses, groups = [2.0 + 0.01 * (i % 7) for i in range(300)], ["text"] * 300
    for place, loss in ((50, 9.0), (100, 4.0), (150, 16.0), (200, 8.0)):
        losses[place], groups[place] = loss, "x"
    assert find_spikes(losses, groups=groups) == []
    assert unjudged_in_words(losses, groups) == ["not judged: only 4 batches of kind 'x'"]


@pytest.mark.parametrize(
    ("bad", "good", "why"),
    [
        (500, 0, "none of 500 batches of kind 'x' is finite"),
        (1, 0, "the only batch of kind 'x' is not finite"),
        (100, 3, "only 3 of 103 batches of kind 'x' are finite"),
        (100, 1, "only 1 of 101 batches of kind 'x' is finite"),
        (0, 1, "only 1 batch of kind 'x'"),
    ],
)
def test_why_a_kind_is_not_judged_is_said_by_its_finite_batches(
    bad: int, good: int, why: str
) -> None:
    losses = [2.0 + 0.01 * (i % 7) for i in range(300)] + [math.nan] * bad + [3.0] * good
    groups = ["text"] * 300 + ["x"] * (bad + good)
    assert unjudged_in_words(losses, groups) == [f"not judged: {why}"]


def test_of_very_many_kinds_the_largest_are_told_and_the_rest_counted() -> None:
    groups = [f"k{i}" for i in range(300)] + ["k7"]
    said = unjudged_in_words([2.0] * 301, groups)
    assert said[0] == "not judged: only 2 batches of kind 'k7'"
    assert said[4:] == ["and 296 more kinds"]


def test_a_non_finite_loss_of_a_kind_with_few_batches_is_a_spike() -> None:
    losses, groups = [2.0 + 0.01 * (i % 7) for i in range(100)], ["text"] * 100
    losses[60], groups[60] = float("nan"), "x"
    assert [(s.onset, s.kind, s.group) for s in find_spikes(losses, groups=groups)] == [
        (60, "nonfinite", "x")
    ]


def test_groups_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="a group a value, got 1 groups, 2 values"):
        find_spikes([1.0, 2.0], groups=["a"])
    with pytest.raises(ValueError, match="a group a value, got 1 groups, 2 values"):
        find_divergences([1.0, 2.0], groups=["a"])


def test_a_slow_rise_of_one_kind_is_found_in_it_and_in_no_other() -> None:
    losses, groups = two_kinds(0, steps=6000, every=5)
    rise = 1.003 ** np.maximum(0, np.arange(1200) - 900)
    losses[::5] *= rise
    (found,) = find_divergences(losses, groups=groups)
    assert found.group == "answers"
    assert 4300 <= found.onset <= 4700
    assert found.height == pytest.approx(rise[-16], rel=0.1)


def test_kinds_of_different_levels_are_no_slow_rise_where_their_mixture_changes() -> None:
    noise = np.exp(0.02 * np.random.default_rng(1).standard_normal(4000))
    groups: list[str | None] = [
        "hard" if np.random.default_rng([2, i]).random() < i / 4000 else None for i in range(4000)
    ]
    losses = noise * np.array([2.0 if group is None else 3.5 for group in groups])
    assert find_divergences(losses)  # the mixture's own level rises
    assert find_divergences(losses, groups=groups) == []


# ---- run logs ------------------------------------------------------------------------------------
def test_a_runs_groups_reach_its_curve_losses_spikes_and_rises(tmp_path: Path) -> None:
    losses, groups = two_kinds(1)
    losses[1200] *= 2
    with RunLog.open(write_losses(tmp_path / "run", losses.tolist(), groups)) as log:
        assert list(run_curve(log).groups) == groups
        assert run_losses(log).groups == groups
        assert [(s.onset, s.group) for s in run_spikes(log)] == [(1200, "answers")]
        assert run_divergences(log) == []


def test_a_run_without_groups_has_none(tmp_path: Path) -> None:
    with RunLog.open(write_losses(tmp_path / "run", [1.0, 2.0], [None, None])) as log:
        assert run_curve(log).groups == ()
        assert run_losses(log).groups == []


def test_ranks_that_call_a_step_differently_are_joined_by_a_plus(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_losses(path, [1.0, 1.0, 1.0], ["text", "text", None], world_size=2)
    write_losses(path, [2.0, 2.0, 2.0], ["text", "answers", None], rank=1, world_size=2)
    with RunLog.open(path) as log:
        assert list(run_curve(log).groups) == ["text", "answers+text", None]


def test_where_a_run_went_back_the_last_records_group_counts(tmp_path: Path) -> None:
    path = write_losses(
        tmp_path / "run",
        [1.0, 2.0, 3.0, 2.5, 3.5],
        ["a", "b", "b", None, "c"],
        steps=[0, 1, 2, 1, 2],
    )
    with RunLog.open(path) as log:
        assert list(run_curve(log).groups) == ["a", None, "c"]


def test_the_group_of_a_runs_step_is_that_of_the_record_with_its_loss(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunLogWriter(path, header=Header(unclamp_version="test")) as writer:
        for step, loss, group in ((0, 2.0, "a"), (0, None, None), (1, 2.0, None), (1, None, "b")):
            writer.add("steps", {"step": [step], "loss": [loss], "time_s": [0.0], "group": [group]})
        writer.add("steps", {"step": [2], "loss": [2.0], "time_s": [0.0], "group": ["c"]})
    with RunLog.open(path) as log:
        assert list(run_curve(log).groups) == ["a", None, "c"]


# ---- files ---------------------------------------------------------------------------------------
def written(path: Path, losses: np.ndarray, groups: Sequence[str | None]) -> Path:
    rows = [
        f"{i},{loss},{group or ''}"
        for i, (loss, group) in enumerate(zip(losses, groups, strict=True))
    ]
    path.write_text("\n".join(["step,loss,what", *rows]), encoding="utf-8")
    return path


def test_a_files_column_of_groups_is_used_if_named(tmp_path: Path) -> None:
    losses, groups = two_kinds(1)
    path = written(tmp_path / "loss.csv", losses, groups)
    assert list(read_curve(path, group="what").groups) == groups
    assert list(read_curve(path).groups) == []


def test_a_number_is_the_name_of_a_group_too(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 2.0, "source": i % 2} for i in range(4)]
    path = tmp_path / "loss.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_curve(path, group="source").groups) == ["0", "1", "0", "1"]


def test_an_evaluation_of_the_same_step_does_not_take_its_group(tmp_path: Path) -> None:
    rows: list[dict] = []
    for i, kind in enumerate(["answers", "text", "answers"]):
        rows += [{"step": i, "loss": 2.0, "kind": kind}, {"step": i, "eval_loss": 3.0}]
    rows[3]["kind"] = "held out"
    rows.append({"step": 3, "grad_norm": 1.0, "kind": "text"})  # a step without a loss
    path = tmp_path / "loss.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_curve(path, group="kind").groups) == ["answers", "text", "answers", "text"]


def test_ranks_of_a_file_that_call_a_step_differently_are_joined(tmp_path: Path) -> None:
    rows = [
        {"step": step, "rank": rank, "loss": 2.0, "kind": "answers" if step + rank == 2 else "text"}
        for step in range(3)
        for rank in range(2)
    ]
    path = tmp_path / "loss.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    groups = list(read_curve(path, group="kind").groups)
    assert groups == ["text", "answers+text", "answers+text"]


def test_a_column_of_groups_that_is_not_there_is_an_error_with_a_hint(tmp_path: Path) -> None:
    path = written(tmp_path / "loss.csv", *two_kinds(1))
    with pytest.raises(AnalysisError, match=r"no column 'whta'.*'what'"):
        read_curve(path, group="whta")


def test_a_column_of_groups_is_not_named_for_a_run(tmp_path: Path) -> None:
    path = write_losses(tmp_path / "run", [1.0], ["a"])
    with pytest.raises(AnalysisError, match="named for files only"):
        read_curve(path, group="a")


def test_the_command_judges_each_kind_and_names_it(tmp_path: Path) -> None:
    losses, groups = two_kinds(1)
    losses[[1005, 1200]] *= 1.6
    losses = np.append(losses, [9.0, 4.0])
    path = written(tmp_path / "loss.csv", losses, [*groups, "rare", "rare"])
    result = CliRunner().invoke(app, ["spikes", str(path), "--group", "what"])
    assert result.exit_code == 0, result.output
    assert "loss, batches without a group: 1 spike in 1900 steps" in result.output
    assert "loss, batches of kind 'answers': 1 spike in 100 steps" in result.output
    assert "loss, batches of kind 'rare': not judged: only 2 batches" in result.output
    table = [line.split() for line in result.output.splitlines() if " rise " in f"{line} "]
    assert [(row[2], row[-1]) for row in table] == [("1005", "-"), ("1200", "answers")]


def test_the_command_counts_batches_and_not_spikes(tmp_path: Path) -> None:
    losses = np.append(2 + 0.02 * np.random.default_rng(0).standard_normal(200), [math.nan] * 110)
    losses[-10:] = 3.0
    path = written(tmp_path / "loss.csv", losses, [None] * 200 + ["x"] * 100 + ["y"] * 10)
    result = CliRunner().invoke(app, ["spikes", str(path), "--group", "what"])
    assert "kind 'x': not judged: none of 100 batches is finite (method robust)." in result.output
    assert "kind 'y': not judged: only 10 batches (method robust)." in result.output


def test_of_very_many_kinds_the_command_adds_up_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = [*(i % 5 for i in range(500)), *range(5, 300)]
    groups: list[str | None] = [f"k{number}" for number in numbers]
    losses = 2 + 0.02 * rng.standard_normal(len(groups))
    losses[484] = 4.0  # of k4, which has no line of its own
    path = written(tmp_path / "loss.csv", losses, groups)
    lines = CliRunner().invoke(app, ["spikes", str(path), "--group", "what"]).output.splitlines()
    assert sum(line.startswith("loss, batches of kind") for line in lines) == 4
    rest = "296 more kinds: 1 spike in 395 steps; 295 of the kinds not judged (method robust)."
    assert lines[-1] == f"loss, and {rest}"


def test_the_commands_json_names_the_group_of_a_spike(tmp_path: Path) -> None:
    losses, groups = two_kinds(1)
    losses[1200] *= 1.6
    path = written(tmp_path / "loss.csv", losses, groups)
    result = CliRunner().invoke(app, ["spikes", str(path), "--group", "what", "--json"])
    (spike,) = json.loads(result.stdout)
    assert (spike["onset"], spike["group"]) == (1200, "answers")


def test_without_groups_the_command_says_what_it_said(tmp_path: Path) -> None:
    losses = 2 + 0.02 * np.random.default_rng(0).standard_normal(200)
    path = written(tmp_path / "loss.csv", losses, [None] * 200)
    result = CliRunner().invoke(app, ["spikes", str(path)])
    assert "loss: no spikes in 200 steps" in result.output
    assert "kind" not in result.output
