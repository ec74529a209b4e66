"""Reports of runs with several kinds of batches: by kind, against figures made by hand."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import ttest_rel

import unclamp
from truths.curves import two_kinds
from truths.kinds import write_losses
from unclamp.report.arms import ScenarioView, scenario_view
from unclamp.report.charts import run_figure
from unclamp.report.html import write_page
from unclamp.report.recorded import RunRecord, read_run
from unclamp.report.side_by_side import Comparison, compare_runs
from unclamp.report.side_by_side.page import write_comparison
from unclamp.report.side_by_side.text import print_comparison
from unclamp.report.text import print_view
from unclamp.report.verdict import study_verdict
from unclamp.report.view import build_view
from unclamp.runlog import RunLog
from unclamp.written import loss_text

STEPS = 600
ANSWERS = np.arange(STEPS) % 20 == 0
GROUPS = ["answers" if answer else None for answer in ANSWERS]


def falling(seed: int, *, answers: float = 0.4, text: float = 0.4, factor: float = 1) -> np.ndarray:
    """Return losses that fall by a share over the run, by kind; `factor` raises the answers."""
    rng = np.random.default_rng(seed)
    time = np.arange(STEPS) / STEPS
    shares = np.where(ANSWERS, answers, text)
    losses = np.where(ANSWERS, 3.5 * factor, 2.0) * (1 - shares) ** time
    return losses * np.exp(0.02 * rng.standard_normal(STEPS))


def printed(show: Any, shown: Any) -> str:
    console = Console(width=100, record=True, file=StringIO())
    show(shown, console)
    return " ".join(console.export_text().split())


# ---- a run ---------------------------------------------------------------------------------------
def test_a_runs_report_has_no_alarm_at_the_other_kind_and_names_a_spikes_kind(
    tmp_path: Path,
) -> None:
    losses, groups = two_kinds(1)
    losses[1200] *= 2
    view = build_view(write_losses(tmp_path / "run", losses.tolist(), groups))
    assert view.run is not None
    assert [(s["onset"], s["group"]) for s in view.run.spikes] == [(1200, "answers")]
    words = printed(print_view, view)
    assert "the highest, at step 1,200 among batches of kind 'answers', is" in words
    assert "onset 1,200, peak 1,200" in words
    assert "its level, among batches of kind 'answers'" in words
    assert view.scenarios[0].spikes["run"] == [1200]


def test_a_runs_report_says_the_mean_loss_of_each_kind(tmp_path: Path) -> None:
    losses = falling(0)
    view = build_view(write_losses(tmp_path / "run", losses.tolist(), GROUPS))
    assert view.run is not None
    text, answers = losses[~ANSWERS].mean(), losses[ANSWERS].mean()
    assert [(k["group"], k["batches"], k["loss"]) for k in view.run.kinds] == [
        (None, 570, pytest.approx(text)),
        ("answers", 30, pytest.approx(answers)),
    ]
    assert f"{loss_text(answers)} for 30 batches of kind 'answers'" in printed(print_view, view)
    assert json.loads(json.dumps(view.to_dict()))["run"]["kinds"][1]["group"] == "answers"


def test_within_a_run_it_is_not_claimed_that_a_kind_fell_faster(tmp_path: Path) -> None:
    rng, time = np.random.default_rng(0), np.arange(1000)
    losses = (1.5 + 3 * (1 + time / 20) ** -0.7) * np.exp(0.03 * rng.standard_normal(1000))
    groups = ["answers" if few else None for few in rng.random(1000) < 0.15 * (time / 1000) ** 2]
    view = build_view(write_losses(tmp_path / "run", losses.tolist(), groups))
    assert view.run is not None
    assert "as fast as" not in " ".join(view.run.sentences)
    assert set(view.run.kinds[1]) == {"group", "batches", "loss"}


def test_a_run_without_groups_says_nothing_of_kinds(tmp_path: Path) -> None:
    view = build_view(write_losses(tmp_path / "run", falling(0).tolist(), [None] * STEPS))
    assert view.run is not None
    assert (view.run.kinds, view.run.kind_curves) == ([], {})
    assert "kind" not in printed(print_view, view)


def test_a_kind_of_four_batches_is_not_judged_and_said(tmp_path: Path) -> None:
    groups: list[str | None] = [None] * STEPS
    losses = 2 + 0.01 * np.random.default_rng(0).standard_normal(STEPS)
    for i, loss in ((50, 9.0), (150, 4.0), (250, 16.0), (350, 8.0)):
        groups[i], losses[i] = "x", loss
    view = build_view(write_losses(tmp_path / "run", losses.tolist(), groups))
    words = printed(print_view, view)
    assert "No spike of the loss in 600 steps (not judged: only 4 batches of kind 'x')." in words


def test_the_chart_has_a_line_for_each_kind_that_the_legend_toggles(tmp_path: Path) -> None:
    losses = falling(0)
    view = build_view(write_losses(tmp_path / "run", losses.tolist(), GROUPS))
    assert view.run is not None
    traces = {trace["name"]: trace for trace in run_figure(view.run).to_dict()["data"]}
    assert set(traces) == {"without a group", "answers"}
    assert list(traces["answers"]["x"]) == np.flatnonzero(ANSWERS).tolist()
    assert traces["answers"]["y"] == pytest.approx(losses[ANSWERS], rel=1e-3)
    assert all(trace.get("showlegend") is not False for trace in traces.values())
    page = write_page(view, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "A line is a kind of batches" in page


def test_of_very_many_kinds_the_rarest_share_a_line(tmp_path: Path) -> None:
    groups: list[str | None] = [f"kind {min(i % 40, 20)}" for i in range(STEPS)]
    view = build_view(write_losses(tmp_path / "run", falling(0).tolist(), groups))
    assert view.run is not None
    assert len(view.run.kind_curves) == 7
    assert sum(len(curve.step) for curve in view.run.kind_curves.values()) == STEPS
    assert "other kinds" in view.run.kind_curves


# ---- arms of a study -----------------------------------------------------------------------------
def records(tmp_path: Path, arm: str, seeds: int, **kinds: float) -> dict[int, RunRecord]:
    found = {}
    for seed in range(seeds):
        own = np.random.default_rng([seed, *arm.encode()])
        losses = falling(seed, **kinds) * np.exp(0.001 * own.standard_normal(STEPS))
        path = write_losses(tmp_path / arm / f"{seed}", losses.tolist(), GROUPS)
        with RunLog.open(path) as log:
            found[seed] = read_run(log)[0]
    return found


def study(tmp_path: Path, *, factor: float = 1.2) -> tuple[ScenarioView, Any, Any]:
    base = records(tmp_path, "dynamic", 5)
    own = records(tmp_path, "delayed", 5, factor=factor)
    return scenario_view("text", "", {"dynamic": base, "delayed": own}, {}), own, base


def test_an_arms_loss_by_kind_is_paired_over_seeds(tmp_path: Path) -> None:
    view, own, base = study(tmp_path)
    text, answers = view.arms[1].kinds
    assert (text.group, answers.group, answers.batches) == (None, "answers", 30)

    def logs(runs: dict[int, RunRecord]) -> list[float]:
        return [float(np.mean(np.log(np.array(run.loss)[ANSWERS]))) for run in runs.values()]

    assert answers.loss == pytest.approx(
        np.mean([np.array(run.loss)[ANSWERS].mean() for run in own.values()])
    )
    expected = ttest_rel(logs(own), logs(base)).confidence_interval(0.95)
    assert answers.log_ratio is not None
    assert answers.log_ratio.interval == pytest.approx((expected.low, expected.high))
    assert text.log_ratio is not None
    assert text.log_ratio.verdict == "not distinguishable"
    assert all(kind.log_ratio is None for kind in view.arms[0].kinds)
    assert view.comparisons == 3  # two kinds and the final loss


def test_the_verdict_tells_of_the_kind_that_differs_and_of_no_other(tmp_path: Path) -> None:
    view, *_ = study(tmp_path)
    words = " ".join(study_verdict([view]))
    assert "Among batches of kind 'answers' (scenario text) delayed has 1.20x the loss" in words
    assert "without a group" not in words


def test_where_steps_are_marked_kinds_are_not_compared_a_second_time(tmp_path: Path) -> None:
    planted = np.flatnonzero(ANSWERS).tolist()
    base, own = (
        {s: replace(run, planted=planted) for s, run in records(tmp_path, arm, 3).items()}
        for arm in ("dynamic", "delayed")
    )
    view = scenario_view("outlier", "", {"dynamic": base, "delayed": own}, {})
    assert [kind.log_ratio for kind in view.arms[1].kinds] == [None, None]
    assert view.comparisons == 2


# ---- runs side by side ---------------------------------------------------------------------------
def side_by_side(tmp_path: Path, **kinds: float) -> Comparison:
    base = write_losses(tmp_path / "dynamic", falling(0).tolist(), GROUPS, seed=0, arm="dynamic")
    own = falling(0, **kinds) * np.exp(0.01 * np.random.default_rng(9).standard_normal(STEPS))
    own[0] = falling(0)[0]
    path = write_losses(tmp_path / "delayed", own.tolist(), GROUPS, seed=0, arm="delayed")
    return compare_runs([base, path])


def test_two_runs_are_compared_kind_by_kind(tmp_path: Path) -> None:
    found = side_by_side(tmp_path, answers=1 - math.sqrt(0.6))
    text, answers = found.kinds
    assert (answers.group, answers.batches) == ("answers", 30)
    assert answers.pace is not None
    assert (answers.pace.verdict, answers.pace.ratio) == ("slower", pytest.approx(0.5, abs=0.1))
    assert text.pace is not None
    assert text.pace.verdict == "not distinguishable"
    assert answers.paired is not None
    assert answers.paired.verdict == "one pair"
    words = printed(print_comparison, found)
    assert "The loss of batches of kind 'answers' in delayed fell 0." in words
    assert "as fast as that of the same in dynamic (95 %: 0." in words
    assert "another seed may differ by more" in words
    assert json.loads(json.dumps(found.to_dict()))["kinds"][1]["group"] == "answers"
    page = write_comparison(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Loss by kind of batch" in page


def test_runs_of_equal_pace_are_not_told_apart(tmp_path: Path) -> None:
    found = side_by_side(tmp_path)
    assert "as fast as" not in " ".join(found.verdict)


def test_runs_without_groups_have_no_table_of_kinds(tmp_path: Path) -> None:
    paths = [
        write_losses(tmp_path / arm, falling(0).tolist(), [None] * STEPS, seed=0, arm=arm)
        for arm in ("dynamic", "delayed")
    ]
    assert compare_runs(paths).kinds == []


# ---- what clamping took from a kind --------------------------------------------------------------
def test_a_report_says_what_clamping_took_from_the_gradients_of_a_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    unclamp.convert(model, unclamp.Recipe())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with unclamp.Recorder(model, tmp_path / "run") as recorder:
        for step in range(80):
            is_few = step % 20 == 19  # the mean of 8 losses in place of 256
            losses = model(torch.randn(256, 16)).square().mean(1)
            loss = losses[:8].mean() if is_few else losses.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=loss, group="few labels" if is_few else None)
    view = build_view(tmp_path / "run")
    words = printed(print_view, view)
    told = "clamped at 1 of 1 weight, in 4 of 4 batches of kind 'few labels': there clamping turned"
    assert told in words
    assert "76 batches without a group:" not in words


def test_a_report_says_of_a_kind_that_its_clamped_gradients_were_not_measured(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    unclamp.convert(model, unclamp.Recipe(grad_output=unclamp.Static(scale=2.0**15)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with unclamp.Recorder(model, tmp_path / "run", inspect=None) as recorder:
        for step in range(40):
            is_few = step % 10 == 9
            gradient = torch.full((8, 16), 100.0 if is_few else 1.0)
            model(torch.randn(8, 16)).backward(gradient)
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=1.0, group="few labels" if is_few else None)
    words = printed(print_view, build_view(tmp_path / "run"))
    assert "4 casts of gradients clamped in 4 batches of kind 'few labels'; what that did" in words
