"""Arms side by side: what is said of their final losses, and what the JSON holds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from truths.runs import write_planted
from unclamp.report import build_view
from unclamp.report.arms import ScenarioView, scenario_view
from unclamp.report.html import write_page
from unclamp.report.recorded import RunRecord, read_run
from unclamp.runlog import RunLog

DYNAMIC = [2.41, 2.52, 2.38]
GAPS = [-0.0093, -0.0047, -0.0001]
"""Mean -0.0047, standard deviation 0.0046."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A run of 20 steps that clamps; a study's arms are made of it."""
    path = write_planted(tmp_path_factory.mktemp("arms") / "run", steps=20)
    with RunLog.open(path) as log:
        record, _ = read_run(log)
    clamping = [
        replace(site, totals=replace(site.totals, saturated=7, clamped_rows=2))
        for site in record.sites
    ]
    return replace(record, sites=clamping)


def study(run: RunRecord, finals: Mapping[str, Sequence[float]]) -> ScenarioView:
    """Return a scenario whose arms have these final losses, a seed each."""
    runs = {
        arm: {i: replace(run, loss=[loss] * len(run.steps)) for i, loss in enumerate(losses)}
        for arm, losses in finals.items()
    }
    return scenario_view("text", "", runs, {})


def said(view: ScenarioView, arm: str) -> str:
    (line,) = [line for line in view.findings if line.startswith(f"{arm} clamped")]
    return line


def test_three_seeds_at_one_standard_deviation_are_not_called_a_difference(run: RunRecord) -> None:
    own = [loss + gap for loss, gap in zip(DYNAMIC, GAPS, strict=True)]
    view = study(run, {"dynamic": DYNAMIC, "delayed": own})
    assert "-0.0047 (95 %" in said(view, "delayed")
    assert "not distinguishable with 3 seeds (a difference over 0.011 would show)." in said(
        view, "delayed"
    )
    assert not any(word in " ".join(view.findings) for word in ("spread", "±", "differs"))
    assert not any("compared" in line for line in view.findings)
    gap = view.arms[1].final_gap
    assert gap is not None
    want = ttest_rel(own, DYNAMIC).confidence_interval(0.95)
    assert gap.interval == pytest.approx((want.low, want.high), rel=1e-9)
    assert view.arms[0].final_gap is None


def test_a_difference_that_three_seeds_can_show_is_called_one(run: RunRecord) -> None:
    own = [loss + gap + 0.1 for loss, gap in zip(DYNAMIC, GAPS, strict=True)]
    view = study(run, {"dynamic": DYNAMIC, "delayed": own})
    assert "delayed differs from dynamic, as far as 3 seeds can show." in said(view, "delayed")


def test_several_arms_say_how_many_comparisons_were_made(run: RunRecord) -> None:
    arms = {"dynamic": DYNAMIC, "a": [2.4, 2.5, 2.4], "b": [2.3, 2.6, 2.4], "c": [2.5, 2.5, 2.3]}
    findings = study(run, arms).findings
    assert sum("3 comparisons with dynamic were made" in line for line in findings) == 1


def test_only_seeds_of_both_arms_are_paired(run: RunRecord) -> None:
    view = study(run, {"dynamic": DYNAMIC, "delayed": [2.40]})
    assert "+" not in said(view, "delayed")
    assert "-0.01 (one seed: no interval" in said(view, "delayed")
    assert study(run, {"dynamic": [], "delayed": [2.4, 2.5]}).arms[0].final_gap is None


def test_a_diverged_seed_is_said_and_leaves_strict_json(run: RunRecord, tmp_path: Path) -> None:
    view = study(run, {"dynamic": DYNAMIC, "delayed": [2.4, math.nan, 2.3]})
    assert "of 3 seeds the loss is not finite, that of delayed with 1." in said(view, "delayed")
    assert "nan" not in " ".join(view.findings)
    whole = build_view(write_planted(tmp_path / "run", steps=20))
    data = replace(whole, run=None, scenarios=[view]).to_dict()
    gap = json.loads(json.dumps(data, allow_nan=False))["scenarios"][0]["arms"][1]["final_gap"]
    assert (gap["mean"], gap["interval"], gap["verdict"]) == (None, None, "not finite")
    assert (gap["pairs"], gap["own_nonfinite"], gap["other_nonfinite"]) == (3, 1, 0)


def test_the_page_and_the_json_hold_the_interval(run: RunRecord, tmp_path: Path) -> None:
    own = list(np.array(DYNAMIC) + GAPS)
    view = study(run, {"dynamic": DYNAMIC, "delayed": own})
    whole = replace(
        build_view(write_planted(tmp_path / "run", steps=20)), run=None, scenarios=[view]
    )
    text = write_page(whole, tmp_path / "page.html").read_text()
    assert "not distinguishable with 3 seeds (a difference over 0.011 would show)" in text
    assert "beyond that spread" not in text
    gap = whole.to_dict()["scenarios"][0]["arms"][1]["final_gap"]
    assert gap["interval"] == pytest.approx(list(asdict(view.arms[1])["final_gap"]["interval"]))
