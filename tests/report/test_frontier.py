"""The page's frontier: what other scalings would have done, beside what the run did."""

from pathlib import Path

import numpy as np
import pytest

from truths.amax_logs import write_amaxes
from unclamp.report import build_view
from unclamp.report import frontier as frontier_module
from unclamp.report.frontier import POLICIES, read_frontiers
from unclamp.report.html import write_page
from unclamp.runlog import RunLog


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of amax 1, one of which has an outlier of 50 at every 30th step."""
    steps = np.arange(150)
    outlier = np.where(steps % 30 == 29, 50.0, 1.0)
    amaxes = {("up", "input"): np.ones(150), ("down", "input"): outlier}
    return write_amaxes(tmp_path_factory.mktemp("frontier") / "run", amaxes)


def test_points_say_what_each_policy_would_have_done(run: Path) -> None:
    with RunLog.open(run) as log:
        whole, down = read_frontiers(log, globs=["down"])
    assert len(whole.points) == len(POLICIES) + 1
    assert (whole.sites, whole.casts, down.sites, down.casts) == ("", 300, "down", 150)
    points = {point.policy: point for point in whole.points}
    # Five outliers: 16 updates have forgotten the one before, 64 have not.
    assert points["delayed(16)"].clamped == 5
    assert points["delayed(64)"].clamped == 1
    assert points["guarded(2)"].reads == pytest.approx(1 + 5 / 300)
    assert points["dynamic"].reads == 2
    own = points["this run: dynamic"]
    assert (own.clamped, own.reads, own.is_own) == (0, 2.0, True)
    assert {p.policy for p in whole.points if p.is_best} == {
        "delayed(64)",  # the shortest of those that clamp once at one read
        "guarded(16)" if points["guarded(16)"].reads < points["guarded(2)"].reads else "guarded(2)",
    }


def test_the_page_draws_it_and_says_it_in_a_table(run: Path, tmp_path: Path) -> None:
    page = write_page(build_view(run), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What other scalings would have done" in page
    assert "<td>delayed(64)</td><td>1</td>" in page
    assert 'id="frontier-0"' in page


def test_a_long_log_has_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier_module, "MOST_CASTS", 299)
    with RunLog.open(run) as log:
        assert read_frontiers(log) == []
