"""What a REPL and a notebook show of a report is what `print` shows, with markup escaped."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unclamp
from truths.trainings import Case, explain, record
from unclamp import Recipe, RunLog
from unclamp.analysis.association import associate


class Odd(nn.Module):
    """A model whose layer has a name that a browser would run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def observed() -> unclamp.Observation:
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    observation = unclamp.observe(model)
    for size in (1.0, 1.0, 50.0):
        model(torch.full((4, 8), size)).sum().backward()
        optimizer.step()
    return observation


def reverted() -> unclamp.RevertReport:
    model = Odd()
    unclamp.convert(model, Recipe())
    return unclamp.revert(model)


def switched() -> unclamp.SwitchReport:
    model = Odd()
    unclamp.convert(model, Recipe())
    return unclamp.switch(model, input="dynamic")


REPORTS = {
    "convert": lambda: unclamp.convert(Odd(), Recipe()),
    "revert": reverted,
    "switch": switched,
    "observe": observed,
}


def text_of(page: str) -> str:
    """Return what a browser shows of a `<pre>`."""
    found = re.fullmatch(r"<pre>(.*)</pre>", page, re.DOTALL)
    assert found is not None
    assert "<" not in found[1]
    return html.unescape(found[1])


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS)
def test_a_report_shows_what_print_prints(make: Any) -> None:
    report = make()
    assert "<script>alert(1)</script>" in str(report)
    assert repr(report) == str(report)
    assert text_of(report._repr_html_()) == str(report)


def test_a_recipe_is_shown_as_toml() -> None:
    recipe = Recipe().override("<b>*", input="dynamic")
    assert Recipe.from_toml(text_of(recipe._repr_html_())) == recipe


def test_a_run_log_says_where_it_is_and_what_it_holds(tmp_path: Path) -> None:
    model = Odd()
    unclamp.convert(model, Recipe())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    path = tmp_path / "a<b>run"
    with unclamp.Recorder(model, path) as recorder:
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        recorder.step(loss=1.0)
    with RunLog.open(path) as log:
        shown = repr(log)
        assert text_of(log._repr_html_()) == shown
    for part in (str(path), "finished", "1 step,", "3 sites", "ranks 0-0"):
        assert part in shown


def test_an_explanation_and_an_association_are_their_sentences(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    found = explain(Case(), tmp_path / "run")
    assert found.words() in str(found)
    assert found.override is not None
    assert found.override.toml.strip() in str(found)
    with RunLog.open(tmp_path / "run") as log:
        association = associate(log)
    assert all(sentence in str(association) for sentence in association.sentences)
    for each in (found, association):
        assert repr(each) == str(each) == text_of(each._repr_html_())
