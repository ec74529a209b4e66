"""What is only counted in an attention is in no total, and named by nobody; a line tells of it."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import unclamp
from unclamp import Recipe, RunLog, SiteName, Static
from unclamp.analysis import associate, clamped_gradients
from unclamp.analysis.horizon import clamped_before
from unclamp.report import build_view
from unclamp.report.arms import scenario_view
from unclamp.report.html import write_page
from unclamp.report.recorded import RunRecord, read_run
from unclamp.report.runs import RunView
from unclamp.report.text import print_view
from unclamp.study.arms import worst_sites
from unclamp.study.config import StudyConfig, default_toml

STEPS = 300
PLANTED = [20, 47, 88, 101, 133, 160, 199, 231, 266, 290]
LARGE = 250.0
"""Standard deviation of the queries at planted steps, at which a scale of 1 clamps above 464."""
QUERIES = SiteName("attn.qk", "input")


class Model(nn.Module):
    """An attention, and a layer behind it that clamps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = unclamp.Attention(), nn.Linear(8, 8)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        """Return the layer's output `[B, 1, T, 8]`."""
        q, kv = q.requires_grad_(), kv.requires_grad_()  # else nobody asks for their gradients
        return self.out(self.attn(q, kv, kv))


def drawn(step: int) -> tuple[Tensor, Tensor]:
    """Return queries, and keys that are values too."""
    generator = torch.Generator().manual_seed(step)
    q, kv = (torch.randn(2, 1, 16, 8, generator=generator) for _ in range(2))
    return (q * LARGE if step in PLANTED else q), kv


def train(path: Path, *rules: str, observed: bool = False) -> Path:
    """Record a run whose loss is made up: it jumps where queries are large."""
    torch.manual_seed(0)
    model = Model()
    recipe = Recipe.uniform(Static(scale=1.0)).override("out", scaling="dynamic")
    for glob in rules:
        recipe = recipe.override(glob, scaling=Static(scale=1.0))
    (unclamp.observe if observed else unclamp.convert)(model, recipe)
    noise = torch.Generator().manual_seed(1)
    with unclamp.Recorder(model, path, inspect=1) as recorder:
        for step in range(STEPS):
            model(*drawn(step)).square().mean().backward()
            unclamp.step(model)
            level = 2 + 0.02 * float(torch.randn((), generator=noise))
            recorder.step(loss=level * (3 if step in PLANTED else 1))
    return path


def by_hand() -> tuple[int, float]:
    """Return how many queries E4M3 clamps at a scale of 1, and the largest over its maximum."""
    queries = [drawn(step)[0].abs() for step in range(STEPS)]
    return sum(int((q > 464).sum()) for q in queries), max(float(q.max()) for q in queries) / 448


@pytest.fixture(scope="module")
def counted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("counted") / "run")


@pytest.fixture(scope="module")
def computed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("computed") / "run", "*.qk")


def run_of(path: Path) -> RunView:
    view = build_view(path).run
    assert view is not None
    return view


def record_of(path: Path) -> RunRecord:
    with RunLog.open(path) as log:
        return read_run(log)[0]


def test_the_log_says_which_sites_are_only_counted(counted_run: Path, computed_run: Path) -> None:
    for path, fqns in ((counted_run, {"attn.qk", "attn.pv"}), (computed_run, {"attn.pv"})):
        with RunLog.open(path) as log:
            rows = log.sites().to_pylist()
            assert {row["fqn"] for row in rows if row["only_counted"]} == fqns
            left = {site.fqn for site in log.computed_sites()}
            assert left == {row["fqn"] for row in rows} - fqns


def test_nothing_of_an_observed_run_is_told_apart(tmp_path: Path) -> None:
    path = train(tmp_path / "run", observed=True)
    with RunLog.open(path) as log:
        assert not any(log.sites()["only_counted"].to_pylist())
    said = " ".join(run_of(path).sentences)
    assert f"{by_hand()[0]:,} elements would have been clamped, in " in said
    assert "where clamping would have removed" in said
    assert "only counted" not in said


def test_a_total_of_what_was_only_counted_is_a_line_of_its_own(counted_run: Path) -> None:
    clamped, overshoot = by_hand()
    assert clamped > 100
    run = run_of(counted_run)
    assert "Nothing was clamped at any of 3 sites." in run.sentences
    (line,) = [said for said in run.sentences if said.startswith("Attention, only counted")]
    assert line.startswith(
        f"Attention, only counted: 6 sites, {clamped:,} elements would have been clamped, largest "
        f"overshoot {overshoot:.2f}x; "
    )
    assert run.heat == {}
    marked = {(site.fqn, site.role) for site in run.sites if site.only_counted}
    assert len(marked) == 6
    assert ("attn.qk", "input") in marked


def test_what_a_rule_computes_counts_as_any_other(computed_run: Path) -> None:
    clamped, _ = by_hand()
    run = run_of(computed_run)
    assert any(f"{clamped:,} elements were clamped" in said for said in run.sentences)
    (line,) = [said for said in run.sentences if said.startswith("Attention, only counted")]
    assert "3 sites, 0 elements would have been clamped;" in line
    assert list(run.heat) == [str(QUERIES)]


def test_an_association_names_nobody_for_what_was_only_counted(
    counted_run: Path, computed_run: Path
) -> None:
    with RunLog.open(computed_run) as log:
        found = associate(log)
    assert found.verdict == "named"
    assert [(site.fqn, site.role) for site in found.sites if site.by] == [("attn.qk", "input")]
    with RunLog.open(counted_run) as log:
        found = associate(log)
        assert not clamped_gradients(log).has_clamped
    assert (found.sites, found.all_sites) == ([], 3)
    assert found.sentences[0].startswith("Nothing was clamped at any of the 3 sites")
    assert any(said.startswith("6 sites are left out") for said in found.sentences)


def test_arms_are_compared_without_it(counted_run: Path, computed_run: Path) -> None:
    counted, computed = record_of(counted_run), record_of(computed_run)
    view = scenario_view("text", "", {"dynamic": {0: computed}, "delayed": {0: counted}}, {})
    assert [arm.saturated for arm in view.arms] == [by_hand()[0], 0]
    assert not view.worst["delayed"]
    assert [(row.fqn, row.role) for row in view.worst["dynamic"]] == [("attn.qk", "input")]
    assert not any(said.startswith("delayed clamped") for said in view.findings)


def test_it_says_nothing_of_where_a_replay_should_start(
    counted_run: Path, computed_run: Path
) -> None:
    assert clamped_before(computed_run, PLANTED[3]).last == PLANTED[2]
    before = clamped_before(counted_run, PLANTED[3])
    assert (before.steps, before.last, before.sites) == (0, None, ())


def test_a_study_switches_no_site_that_is_only_counted(
    counted_run: Path, computed_run: Path
) -> None:
    """A rule that named one would have it computed."""
    config = StudyConfig.from_toml(default_toml())
    assert worst_sites([computed_run], config, "mixed") == [("attn.qk", "input")]
    assert worst_sites([counted_run], config, "mixed") == []


def test_page_and_terminal_have_it_apart(counted_run: Path, tmp_path: Path) -> None:
    view = build_view(counted_run, sites=["*.qk"])
    text = write_page(view, tmp_path / "page.html").read_text()
    assert "Attention, only counted: 6 sites" in text
    assert '"only_counted": true' in text or '"only_counted":true' in text
    assert view.run is not None
    panel = next(p for p in view.run.panels.values() if p.fqn == "attn.qk" and p.role == "input")
    assert max(share or 0 for share in panel.clamp) > 0
    console = Console(width=100)
    with console.capture() as shown:
        print_view(view, console)
    assert "Attention, only counted: 6 sites" in shown.get()
    assert "worst sites" not in shown.get()


def test_a_switch_does_not_make_it_computed(tmp_path: Path) -> None:
    model = Model()
    unclamp.convert(model, Recipe.uniform(Static(scale=1.0)).override("out", scaling="dynamic"))
    with unclamp.Recorder(model, tmp_path / "run", inspect=1) as recorder:
        for step in (0, PLANTED[0]):
            model(*drawn(step)).square().mean().backward()
            unclamp.step(model)
            recorder.step(loss=1.0)
            unclamp.switch(model, "*.qk", input=Static(scale=2.0))
    run = run_of(tmp_path / "run")
    assert "Nothing was clamped at any of 3 sites." in run.sentences
    (row,) = [site for site in run.sites if (site.fqn, site.role) == ("attn.qk", "input")]
    assert row.only_counted
    assert row.saturated == int((drawn(PLANTED[0])[0].abs() * 2 > 464).sum())


def test_a_name_that_a_later_attempt_computes_is_told_apart(tmp_path: Path) -> None:
    for first, rules in ((0, ()), (2, ("*.qk",))):
        model, recipe = (
            Model(),
            Recipe.uniform(Static(scale=1.0)).override("out", scaling="dynamic"),
        )
        for glob in rules:
            recipe = recipe.override(glob, scaling=Static(scale=1.0))
        unclamp.convert(model, recipe)
        with unclamp.Recorder(model, tmp_path / "run", inspect=1, resume=True) as recorder:
            for step in range(first, first + 2):
                model(*drawn(PLANTED[step])).square().mean().backward()
                unclamp.step(model)
                recorder.step(step, loss=1.0)
    clamped = [int((drawn(step)[0].abs() > 464).sum()) for step in PLANTED[:4]]
    record = record_of(tmp_path / "run")
    assert sum(site.totals.saturated for site in record.counted_sites) == sum(clamped[:2])
    assert sum(site.totals.saturated for site in record.sites) == sum(clamped[2:])
