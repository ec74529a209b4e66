"""What `unclamp explain` wrote, on the page: of a real explanation, and of files that are odd."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from truths.runs import write_planted
from unclamp.analysis.counterfactual import (
    Counterfactual,
    Question,
    QuestionKind,
    SiteShare,
    Underflow,
)
from unclamp.analysis.explanation import Explanation
from unclamp.explain.mend import make_override
from unclamp.files import strict, write_json
from unclamp.names import SiteName
from unclamp.report import build_view
from unclamp.report.evidence import MOST_REPLAYS, read_explanations
from unclamp.report.html import write_page

SITES = [SiteName(f"layers.{i}.down", "input") for i in range(8)]


def replay(
    kind: QuestionKind, sites: Sequence[SiteName] = (), *, peak: float, seed: int | None = None
) -> Counterfactual:
    question = Question(kind=kind, sites=tuple(sites), seed=seed)
    return Counterfactual(question=question, losses={9: 2.0, 10: peak}, removed=0.5)


def explained(**changes: Any) -> Explanation:
    replays = [
        replay("actual", peak=5.0),
        replay("unclamped", SITES, peak=2.0),
        replay("placebo", peak=5.0, seed=0),
        *(replay("unclamped", [site], peak=math.nan) for site in SITES),
        *(replay("unclamped", SITES[:i], peak=3.0) for i in range(2, 7)),
        replay("blocks", SITES, peak=4.0),
        replay("high_precision", SITES, peak=4.0),
        replay("dynamic", SITES[:1], peak=2.1),
        replay("guarded", SITES[:2], peak=2.05),
    ]
    rows = [
        SiteShare(fqn=site.fqn, role=site.role, share=0.5 / (1 + i), low=0.1, high=0.6,
                  how="shapley", only=0.25)
        for i, site in enumerate(SITES)
    ]  # fmt: skip
    given: dict[str, Any] = {
        "run": "run", "onset": 10, "last": 10, "height": 2.5, "level": 2.0, "snapshot_step": 5,
        "status": "finished", "reproduced": True, "clamping_share": 0.93, "verdict": "clamping",
        "others": {}, "underflowed": {}, "sites": tuple(rows), "counterfactuals": tuple(replays),
        "override": make_override(SITES[:1], "dynamic", recipe=None, removed=0.9),
    }  # fmt: skip
    return Explanation(**given | changes)


def test_an_explanation_is_shown_as_it_was_written(tmp_path: Path) -> None:
    found = explained()
    path = write_planted(tmp_path / "run", steps=20)
    write_json(path / "explain-10.json", found.to_dict())
    (read,) = read_explanations(path)
    assert read.sentences == [found.words()]
    assert (read.reproduced, read.verdict, read.clamping_share) == (True, "clamping", 0.93)
    assert found.override is not None
    assert read.override == found.override.toml
    assert list(read.losses) == [
        "nothing changed",
        "nothing clamped",
        "dynamic: layers.0.down input",
        "guarded: 2 sites",
        "a scale for every 32 elements",
        "no FP8 at all",
        *(f"un-clamped only: layers.{i}.down input" for i in range(4)),
    ]
    assert len(read.losses) <= MOST_REPLAYS
    assert read.losses["nothing changed"] == {"step": [9, 10], "loss": [2.0, 5.0]}
    assert read.losses["un-clamped only: layers.0.down input"]["loss"] == [2.0, None]
    text = write_page(build_view(path), tmp_path / "page.html").read_text()
    assert "clamping is the cause" in text
    assert "only it free</th>" in text
    assert "only it clamped</th>" in text
    assert "^layers.0.down" in text
    assert "<td>50 %</td>" in text  # written as in the paragraph above the table
    assert 'id="replay-0"' in text


def test_the_shares_of_underflow_are_those_in_blocks(tmp_path: Path) -> None:
    found = explained(
        verdict="underflow",
        clamping_share=0.02,
        underflow=Underflow(by_step={10: 0.9}, elevated=1, removed=0.9),
    )
    path = write_planted(tmp_path / "run", steps=20)
    write_json(path / "explain-10.json", found.to_dict())
    text = write_page(build_view(path), tmp_path / "page.html").read_text()
    assert "1 of the 1 step above the level, 90 % of the rise goes in blocks" in text
    assert "only it in blocks</th>" in text
    assert "only it as it was</th>" in text
    assert "only it free" not in text


def test_a_group_of_sites_is_known_by_its_sites(tmp_path: Path) -> None:
    members = SiteName("layers.0.a", "input"), SiteName("layers.0.b", "input")
    group = SiteShare(fqn="layers.0.*", role="*", share=0.9, low=0.8, high=1.0, how="shapley",
                      sites=members)  # fmt: skip
    both = replay("unclamped", members[::-1], peak=2.0)
    everything = replay("unclamped", [SiteName(name, "input") for name in "xyz"], peak=2.0)
    plain = replay("actual", peak=5.0)
    found = explained(sites=(group,), counterfactuals=(plain, everything, both))
    write_json(tmp_path / "explain-10.json", found.to_dict())
    (read,) = read_explanations(tmp_path)
    assert list(read.losses)[-1] == "un-clamped only: layers.0.*"


def test_an_explanation_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    found = explained(status="running", reproduced=None, clamping_share=None, verdict="unknown",
                      sites=(), counterfactuals=(), override=None)  # fmt: skip
    path = write_planted(tmp_path / "run", steps=20)
    write_json(path / "explain-10.json", found.to_dict())
    text = write_page(build_view(path), tmp_path / "page.html").read_text()
    assert "was replayed from" in text


@pytest.mark.parametrize("value", [5, 0.5, "text", True, None, [3], [[1, 2]], {"a": 3}, [{"a": 3}]])
def test_values_of_another_type_are_passed_over(value: Any, tmp_path: Path) -> None:
    path = write_planted(tmp_path / "run", steps=20)
    keys = strict(explained().to_dict())
    for i, key in enumerate(("words", "sites", "override", "counterfactuals", "reproduced",
                             "verdict", "clamping_share")):  # fmt: skip
        (path / f"explain-{i}.json").write_text(json.dumps({**keys, key: value}))
    odd = [{"name": value, "losses": value}, {"name": "actual", "losses": {"1": value, "x": 1}}]
    site = {"fqn": value, "role": value, "share": value, "low": value, "sites": value}
    (path / "explain-odd.json").write_text(json.dumps({"counterfactuals": odd, "sites": [site]}))
    view = build_view(path)
    json.dumps(view.to_dict(), allow_nan=False)
    assert "Replay: explain-odd" in write_page(view, tmp_path / "page.html").read_text()
