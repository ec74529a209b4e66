"""What `unclamp explain` wrote, on the page: of a real explanation, and of files that are odd."""

import json
from pathlib import Path
from typing import Any

import pytest

from planted_run import write_planted
from unclamp.explain import Explanation
from unclamp.explain.explanation import SiteShare
from unclamp.explain.mend import make_override
from unclamp.names import Role
from unclamp.report import build_view
from unclamp.report.evidence import MOST_REPLAYS, read_explanations
from unclamp.report.html import write_page

SITES: list[tuple[str, Role]] = [(f"layers.{i}.down", "input") for i in range(8)]


def replay(name: str, peak: float | None) -> dict[str, Any]:
    return {"name": name, "losses": {"9": 2.0, "10": peak}, "removed": 0.5}


def explained(**changes: Any) -> Explanation:
    names = [f"{fqn} {role}" for fqn, role in SITES]
    replays = [
        replay("actual", 5.0),
        replay("unclamped: " + ", ".join(names), 2.0),
        replay("placebo 0", 5.0),
        *(replay(f"unclamped: {name}", None) for name in names),
        *(replay("unclamped: " + ", ".join(names[:i]), 3.0) for i in range(2, 7)),
        *(replay(f"{kind}: {', '.join(names)}", 4.0) for kind in ("blocks", "high_precision")),
        replay(f"dynamic: {names[0]}", 2.1),
        replay("guarded: " + ", ".join(names[:2]), 2.05),
    ]
    rows = [
        SiteShare(fqn=f, role=r, share=0.5 / (1 + i), low=0.1, high=0.6, how="shapley", only=0.25)
        for i, (f, r) in enumerate(SITES)
    ]
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
    (path / "explain-10.json").write_text(json.dumps(found.to_dict()))
    (read,) = read_explanations(path)
    assert read["sentences"] == [found.words()]
    assert (read["reproduced"], read["verdict"], read["clamping_share"]) == (True, "clamping", 0.93)
    assert found.override is not None
    assert read["override"] == found.override.toml
    assert list(read["losses"]) == [
        "nothing changed",
        "nothing clamped",
        "dynamic: layers.0.down input",
        "guarded: 2 sites",
        "a scale for every 32 elements",
        "no FP8 at all",
        *(f"un-clamped only: layers.{i}.down input" for i in range(4)),
    ]
    assert len(read["losses"]) <= MOST_REPLAYS
    assert read["losses"]["nothing changed"] == {"step": [9, 10], "loss": [2.0, 5.0]}
    assert read["losses"]["un-clamped only: layers.0.down input"]["loss"] == [2.0, None]
    text = write_page(build_view(path), tmp_path / "page.html").read_text()
    assert "clamping is the cause" in text
    assert "^layers.0.down" in text
    assert "50.00 %" in text
    assert 'id="replay-0"' in text


def test_a_group_of_sites_is_known_by_its_sites(tmp_path: Path) -> None:
    group = SiteShare(fqn="layers.0.*", role="*", share=0.9, low=0.8, high=1.0, how="shapley",
                      sites=(("layers.0.a", "input"), ("layers.0.b", "input")))  # fmt: skip
    both = replay("unclamped: layers.0.b input, layers.0.a input", 2.0)
    everything = replay("unclamped: x input, y input, z input", 2.0)
    found = explained(sites=(group,), counterfactuals=(replay("actual", 5.0), everything, both))
    (tmp_path / "explain-10.json").write_text(json.dumps(found.to_dict()))
    (read,) = read_explanations(tmp_path)
    assert list(read["losses"])[-1] == "un-clamped only: layers.0.*"


def test_an_explanation_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    found = explained(status="running", reproduced=None, clamping_share=None, verdict="unknown",
                      sites=(), counterfactuals=(), override=None)  # fmt: skip
    path = write_planted(tmp_path / "run", steps=20)
    (path / "explain-10.json").write_text(json.dumps(found.to_dict()))
    text = write_page(build_view(path), tmp_path / "page.html").read_text()
    assert "was replayed from" in text


@pytest.mark.parametrize("value", [5, 0.5, "text", True, None, [3], [[1, 2]], {"a": 3}, [{"a": 3}]])
def test_values_of_another_type_are_passed_over(value: Any, tmp_path: Path) -> None:
    path = write_planted(tmp_path / "run", steps=20)
    keys = explained().to_dict()
    for i, key in enumerate(("words", "sites", "override", "counterfactuals", "reproduced",
                             "verdict", "clamping_share")):  # fmt: skip
        (path / f"explain-{i}.json").write_text(json.dumps({**keys, key: value}))
    odd = [{"name": value, "losses": value}, {"name": "actual", "losses": {"1": value, "x": 1}}]
    site = {"fqn": value, "role": value, "share": value, "low": value, "sites": value}
    (path / "explain-odd.json").write_text(json.dumps({"counterfactuals": odd, "sites": [site]}))
    view = build_view(path)
    json.dumps(view.to_dict(), allow_nan=False)
    assert "Replay: explain-odd" in write_page(view, tmp_path / "page.html").read_text()
