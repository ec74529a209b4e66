"""A kind of scaling from outside of the package: one class with one function, and all works."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import unclamp
from patience import PATIENCE_S
from unclamp import Dynamic, Recipe, Recorder, RunLog
from unclamp.nn import find_ledgers
from unclamp.reference import float32

LENGTH = 7


@dataclass(frozen=True, kw_only=True)
class Percentile(unclamp.Scaling):
    """The 99.9th percentile of the history, interpolated linearly."""

    kind: ClassVar[str] = "quantile"
    history_len: int = LENGTH
    percent: float = 99.9
    margin: int = 0

    def amax(self, history: Any, xp: ModuleType) -> Any:
        return xp.quantile(history, self.percent / 100, 1)


def trained(path: Path, steps: int = 30) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    recipe = Recipe(input=Percentile(), weight=Percentile(percent=50.0, margin=1))
    unclamp.convert(model, Recipe.from_toml(recipe.to_toml()).override("2", weight=Dynamic()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, path) as recorder:
        for step in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(10, 12) * (30 if step == 20 else 1)).square().mean()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run"
    trained(path)
    return path


def test_a_recipe_with_it_goes_through_a_file() -> None:
    recipe = Recipe(input=Percentile(percent=99.0)).override("0", weight=Percentile(margin=2))
    text = recipe.to_toml()
    assert 'scaling = "quantile"' in text
    assert Recipe.from_toml(text) == recipe
    assert hash(Recipe.from_toml(text)) == hash(recipe)
    with pytest.raises(unclamp.RecipeError, match=r"key of the quantile scaling 'percnt'.*'perce"):
        Recipe.from_toml('input = {scaling = "quantile", percnt = 1.0}')


def test_its_settings_are_checked_as_those_of_any_kind() -> None:
    with pytest.raises(unclamp.RecipeError, match="margin"):
        Percentile(margin=-1)
    with pytest.raises(unclamp.RecipeError, match="history_len"):
        Percentile(history_len=0)


def expected_scales(amaxes: list[float], percent: float, margin: int) -> list[float]:
    """Return the scale of each step but the first, by a quantile over what came before."""
    scales = []
    for step in range(1, len(amaxes)):
        newest = amaxes[:step][::-1][:LENGTH]
        window = np.array([*newest, *[0.0] * (LENGTH - len(newest))])
        amax = float32(float(np.quantile(window, percent / 100)))
        # While more than half of a history is empty, its median says nothing.
        scales.append(448 / 2**margin / amax if amax > 0 else math.nan)
    return scales


def test_the_scales_of_a_training_are_those_of_numpy(run: Path) -> None:
    query = """SELECT fqn, role, list(amax ORDER BY step) AS amaxes, list(scale ORDER BY step) AS
               scales FROM casts JOIN sites USING (site) WHERE scaling = 'quantile' GROUP BY ALL
               ORDER BY ALL"""
    rows = RunLog.open(run).sql(query).to_pylist()
    assert [(row["fqn"], row["role"]) for row in rows] == [
        ("0", "input"), ("0", "weight"), ("2", "input")
    ]  # fmt: skip
    for row in rows:
        is_weight = row["role"] == "weight"
        percent, margin = (50.0, 1) if is_weight else (99.9, 0)
        expected = expected_scales(row["amaxes"], percent, margin)
        says = ~np.isnan(expected)
        assert says.sum() == (26 if is_weight else 29)
        got = np.array(row["scales"][1:])
        np.testing.assert_allclose(got[says], np.array(expected)[says], rtol=1e-6)


def test_it_clamps_what_it_does_not_expect_and_the_log_counts_it(run: Path) -> None:
    query = """SELECT step, saturated FROM casts JOIN sites USING (site)
               WHERE fqn = '0' AND role = 'input' ORDER BY step"""
    saturated = {row["step"]: row["saturated"] for row in RunLog.open(run).sql(query).to_pylist()}
    assert saturated[20] > 0
    assert saturated[0] == 0


def test_the_log_holds_the_recipe_and_says_the_kind(run: Path) -> None:
    header = RunLog.open(run).header
    assert header.recipe is not None
    assert header.recipe["input"]["scaling"] == "quantile"
    assert Recipe.from_dict(header.recipe).input == Percentile()


def test_a_process_that_does_not_know_it_reports_the_run(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unclamp", "report", str(run)]
    text = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout
    assert "quantile" in text
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    page = Path(json.loads(done.stdout)["page"]).read_text(encoding="utf-8")
    assert "quantile" in page


def test_a_switch_to_it_goes_on_with_the_history_and_is_logged(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    unclamp.convert(model, Recipe())
    (ledger,) = find_ledgers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(model, tmp_path / "run") as recorder:
        for amax in (1.0, 2.0, 4.0):
            model(torch.full((2, 8), amax)).sum().backward()
            optimizer.step()
            recorder.step(loss=0.0)
        report = unclamp.switch(model, input=Percentile(history_len=3, percent=50.0))
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        recorder.step(loss=0.0)
    assert "input delayed -> quantile" in str(report)
    assert ledger.history_of(0)[:4].tolist() == [1, 4, 2, 1]
    assert ledger.scale[0] == 448 / 2  # the median of 1, 4 and 2
    events = RunLog.open(tmp_path / "run").sql("SELECT * FROM events").to_pylist()
    assert "quantile" in json.dumps(events, default=str)


def test_a_guarded_kind_of_ones_own_never_clamps() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Careful(Percentile):
        kind: ClassVar[str] = "careful"
        guards: ClassVar[bool] = True

    model = nn.Sequential(nn.Linear(8, 8))
    unclamp.convert(model, Recipe.uniform(Careful()))
    (ledger,) = find_ledgers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    ledger.subscribe(lambda update: seen.append(update.stats))
    for amax in (1.0, 1.0, 20.0, 1.0):
        model(torch.full((2, 8), amax)).sum().backward()
        optimizer.step()
    from unclamp.numerics import Stat

    assert [int(stats[0, Stat.SATURATED]) for stats in seen] == [0, 0, 0, 0]
    assert [int(stats[0, Stat.RECAST]) for stats in seen] == [0, 0, 1, 0]
