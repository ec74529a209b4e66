"""Explanations as data: to a file and back, also those of the version before; and their words."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unclamp
from unclamp.analysis.counterfactual import (
    Change,
    Counterfactual,
    How,
    Override,
    Question,
    ScalingName,
    SiteShare,
)
from unclamp.analysis.explanation import (
    Explanation,
    Status,
    Verdict,
)
from unclamp.analysis.horizon import Asked, Clamped, Horizon, Stop
from unclamp.analysis.labels import named_counterfactuals
from unclamp.analysis.shares import percent, spike_share
from unclamp.errors import AnalysisError
from unclamp.files import to_json
from unclamp.names import ROLES, SiteName
from unclamp.report.evidence import read_explanations
from unclamp.report.words import explanation_row

STORED = Path(__file__).parents[1] / "explain" / "data"
"""Explanations as 0.1 wrote them, what it said of them, and what its page showed."""
NAMES = ["series", "group", "not-clamping", "not-reproduced", "budget", "inf"]

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=8)
sites = st.builds(SiteName, text, st.sampled_from(ROLES))
several = st.lists(sites, max_size=3).map(tuple)
questions = st.one_of(
    st.just(Question(kind="actual")),
    st.builds(Question, kind=st.just("placebo"), seed=st.integers(0, 9)),
    st.builds(Question, kind=st.sampled_from(get_args(Change)), sites=several),
)
maybe = st.none() | finite


def explanations(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Explanation]:
    """Return explanations in which what may be no number comes from `numbers`."""
    losses = st.dictionaries(st.integers(0, 10**6), numbers, max_size=3)
    answers = st.builds(Counterfactual, question=questions, losses=losses, removed=maybe)
    shares = st.builds(
        SiteShare, fqn=text, role=st.sampled_from([*ROLES, "*"]), share=finite, low=finite,
        high=finite, how=st.sampled_from(get_args(How)), only=maybe, last=maybe, effect=maybe,
        clamp_error=finite, overshoot=finite, named=st.booleans(), sites=several,
    )  # fmt: skip
    overrides = st.builds(
        Override, sites=several, scaling=st.sampled_from(get_args(ScalingName)), removed=maybe,
        toml=text, python=st.none() | text,
    )  # fmt: skip
    return st.builds(
        Explanation, run=text, onset=st.integers(), last=st.integers(), height=numbers,
        level=numbers, snapshot_step=st.integers(), kind=st.sampled_from(["rise", "nonfinite"]),
        status=st.sampled_from(get_args(Status)), reproduced=st.none() | st.booleans(),
        differences=st.lists(text, max_size=2).map(tuple), noise=maybe, clamping_share=maybe,
        verdict=st.sampled_from(get_args(Verdict)),
        others=st.dictionaries(st.sampled_from(["blocks", "high_precision"]), finite),
        underflowed=st.fixed_dictionaries(
            dict.fromkeys(("actual", "blocks", "high_precision"), finite)
        ),
        sites=st.lists(shares, max_size=2).map(tuple), rest_share=finite,
        clamped_sites=st.integers(0), override=st.none() | overrides,
        counterfactuals=st.lists(answers, max_size=3).map(tuple), replays=st.integers(0),
        budget=st.integers(0), replay_s=finite, step_s=finite,
        notes=st.lists(text, max_size=2).map(tuple), horizon=st.none() | horizons(),
    )  # fmt: skip


def horizons() -> st.SearchStrategy[Horizon]:
    clamped = st.builds(
        Clamped, steps=st.integers(0), last=st.none() | st.integers(0), sites=several,
        hardest=st.none() | st.integers(0), is_complete=st.booleans(),
    )  # fmt: skip
    asked = st.builds(Asked, step=st.integers(0), steps=st.integers(1), removed=finite)
    return st.builds(
        Horizon, asked=st.lists(asked, min_size=1, max_size=3).map(tuple),
        clamped=st.none() | clamped, stop=st.sampled_from(get_args(Stop)),
    )  # fmt: skip


@settings(max_examples=50)
@given(explanations(finite))
def test_what_goes_through_a_file_comes_back(found: Explanation) -> None:
    assert Explanation.from_dict(found.to_dict()) == found
    assert Explanation.from_dict(json.loads(to_json(found.to_dict()))) == found


@settings(max_examples=50)
@given(explanations(st.floats()))
def test_what_is_no_number_comes_back_as_none_and_says_the_same(found: Explanation) -> None:
    once = Explanation.from_dict(json.loads(to_json(found.to_dict())))
    assert to_json(once.to_dict()) == to_json(found.to_dict())
    assert math.isfinite(once.height) == math.isfinite(found.height)


@pytest.mark.parametrize("name", NAMES)
def test_an_explanation_of_the_version_before_says_what_it_said(name: str) -> None:
    found = Explanation.from_dict(json.loads((STORED / f"{name}.json").read_text()))
    assert found.words() == (STORED / f"{name}.txt").read_text().strip()
    again = Explanation.from_dict(json.loads(to_json(found.to_dict())))
    assert to_json(again.to_dict()) == to_json(found.to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_the_page_draws_of_it_what_it_drew(name: str, tmp_path: Path) -> None:
    (tmp_path / "explain-34.json").write_bytes((STORED / f"{name}.json").read_bytes())
    (read,) = read_explanations(tmp_path)
    before = json.loads((STORED / "shown.json").read_text())[name]
    assert list(read.losses) == list(before["losses"])
    assert read.losses == before["losses"]
    assert (read.sentences, read.override) == (before["sentences"], before["override"])
    assert (read.verdict, read.clamping_share) == (before["verdict"], before["clamping_share"])
    assert [site.fqn for site in read.sites] == [site["fqn"] for site in before["sites"]]


def test_a_name_may_hold_what_separates_names() -> None:
    """They were once joined to a text and taken apart again, by ", " and ": "."""
    odd = [SiteName("a input, b", "weight"), SiteName("a: b", "input"), SiteName("", "input")]
    plain = Counterfactual(question=Question(kind="actual"), losses={1: 2.0})
    free = Question(kind="unclamped", sites=tuple(sorted(odd)))
    only = [
        Counterfactual(question=Question(kind="unclamped", sites=(site,)), losses={1: 1.0})
        for site in odd
    ]
    rows = [
        SiteShare(fqn=s.fqn, role=s.role, share=0.3, low=0.3, high=0.3, how="shapley") for s in odd
    ]
    found = explained(
        sites=tuple(rows),
        counterfactuals=(plain, Counterfactual(question=free, losses={1: 1.0}), *only),
    )
    back = Explanation.from_dict(json.loads(to_json(found.to_dict())))
    assert [label for label, _ in named_counterfactuals(back)] == [
        "nothing changed",
        "nothing clamped",
        "un-clamped only: a input, b weight",
        "un-clamped only: a: b input",
        "un-clamped only: (the model itself) input",
    ]


def test_one_site_is_not_several() -> None:
    for clamped, said in ((1, "1 site clamped, or would have."), (9, "9 sites clamped, or")):
        found = explained(reproduced=True, clamping_share=1.0, verdict="clamping",
                          clamped_sites=clamped)  # fmt: skip
        assert said in found.words()


def explained(**changes: Any) -> Explanation:
    given: dict[str, Any] = {
        "run": "run", "onset": 7, "last": 9, "height": 2.5, "level": 2.0, "snapshot_step": 5,
        "others": {}, "underflowed": {},
    }  # fmt: skip
    return Explanation(**given | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The spike at steps 7 to 9 (2.50 times the level of 2)"),
        ({"kind": "nonfinite", "height": math.inf}, "(the loss is not finite)"),
        # A loss at zero or below has no ratio; it is as finite as any.
        ({"height": math.nan, "level": -0.5}, "(from a level of -0.5)"),
        ({"level": math.nan}, "(2.50 times its level)"),
    ],
)
def test_how_high_it_rose_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in explained(**changes).words()
    assert (
        said in Explanation.from_dict(json.loads(to_json(explained(**changes).to_dict()))).words()
    )


def test_a_spike_without_a_ratio_was_not_told_from_a_loss_that_is_not_finite() -> None:
    data = {**explained().to_dict(), "height": "nan", "level": -0.5}
    del data["kind"]
    assert "(from a level of -0.5)" in Explanation.from_dict(data).words()


def test_one_sample_has_no_interval_on_paper_either() -> None:
    row = SiteShare(fqn="a", role="input", share=0.5, low=-math.inf, high=math.inf, how="shapley")
    back = SiteShare.from_dict(json.loads(to_json(row.to_dict())))
    assert back == row
    assert explanation_row(back) == ["a", "input", "50 %", "-", "-", "-"]


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.5, "50 %"), (0.996, "100 %"), (0.012, "1 %"), (0.0064, "0.64 %"), (-0.02, "-2 %"),
     (0.0004, "0 %"), (-0.0004, "0 %"), (0.0, "0 %"), (None, "-"), (math.nan, "?")],
)  # fmt: skip
def test_a_share_of_a_spike_is_written_in_one_way(share: float | None, shown: str) -> None:
    assert spike_share(share) == shown


def test_a_small_percentage_keeps_two_figures() -> None:
    assert [percent(share) for share in (2.9e-6, 0.0123, 1.0)] == ["0.00029 %", "1 %", "100 %"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("onset", "7", "expected a whole number for 'onset' of an explanation, got '7'"),
        ("onset", True, "a whole number"),
        ("verdict", "guilty", "one of"),
        ("sites", {"fqn": "a"}, "expected a list for 'sites'"),
        ("sites", [{"fqn": "a", "role": "bias", "share": 1, "low": 1, "high": 1}], "for 'role'"),
        ("counterfactuals", [{"name": "nonsense", "losses": {}}], "a replay named 'nonsense'"),
        ("counterfactuals", [{"name": "actual", "losses": {"x": 1.0}}], "expected steps"),
        ("override", 5, "expected an object for an override, got 5"),
        ("others", {"blocks": "much"}, "expected a number for 'blocks'"),
    ],
)
def test_what_is_none_is_refused_with_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        Explanation.from_dict({**explained().to_dict(), key: value})


def test_a_missing_key_is_named_and_others_are_passed_over() -> None:
    data = explained().to_dict()
    assert Explanation.from_dict({**data, "of a later version": 1}) == explained()
    del data["onset"]
    with pytest.raises(
        AnalysisError, match="expected 'onset' in an explanation, but it is missing"
    ):
        Explanation.from_dict(data)


def test_it_is_public() -> None:
    assert unclamp.Explanation is Explanation
