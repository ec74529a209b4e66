"""Underflow after an outlier: named with the smallest set that mends it, by training anew."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truths.redundant import RedundantCase
from truths.trainings import explain, losses_with, record
from truths.underflows import OUTLIER, UnderflowCase, trained
from unclamp.analysis.counterfactual import Override, Underflow
from unclamp.analysis.explanation import Explanation, Verdict
from unclamp.analysis.horizon import Asked, Horizon
from unclamp.explain.rewind import mends
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.scaling import Dynamic, PerBlock, Scaling

BLOCKS = Dynamic(granularity=PerBlock(1, 32))
SILENT = UnderflowCase()
LOUD = UnderflowCase(read=10.0, seed=1)
PARALLEL = UnderflowCase(branches=2, parts=(1.0, 0.7), decoys=2, seed=2)


def explained(case: UnderflowCase, run: Path, **limits: Any) -> tuple[list[float], Explanation]:
    losses = record(case, run, every=4, keep=6, after=8)  # pyright: ignore[reportArgumentType]
    return losses, explain(case, run, **limits)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("case", [SILENT, LOUD, pytest.param(PARALLEL, marks=pytest.mark.slow)])
def test_the_smallest_set_that_underflows_is_named(case: UnderflowCase, tmp_path: Path) -> None:
    losses, found = explained(case, tmp_path / "run")
    mended = trained(case, dict.fromkeys(case.culprits, BLOCKS))
    level = losses[OUTLIER - 1]
    for n in case.harmed:  # by training anew: the planted sites and no fewer
        assert losses[n] > 5 * level
        assert mended[n] < 1.2 * level
        for site in case.culprits if len(case.culprits) > 1 else ():
            assert trained(case, {site: BLOCKS})[n] > 2 * level
    assert found.verdict == "underflow"
    assert found.named == case.culprits
    assert found.underflow is not None
    assert list(found.underflow.by_step) == [n for n in case.harmed if n <= found.last]
    assert found.underflow.removed == pytest.approx(1.0, abs=0.05)
    assert sum(s.share for s in found.sites if s.named) == pytest.approx(1.0, abs=0.05)
    assert all(site.underflow > 0.2 for site in found.sites if site.named)
    assert found.replays <= 40
    assert "underflow is the cause there" in found.words()


@pytest.mark.parametrize("case", [SILENT, LOUD])
def test_the_remedy_of_underflow_mends_and_ruins_no_other_step(
    case: UnderflowCase, tmp_path: Path
) -> None:
    """Dynamic scaling would mend the steps after the outlier, and ruin the outlier's own."""
    losses, found = explained(case, tmp_path / "run")
    assert found.override is not None
    assert found.override.removed is not None
    pasted = Recipe.from_toml(case.recipe.to_toml() + "\n" + found.override.toml)
    training = case.build(pasted)
    anew = [case.step(training, batch).item() for batch in case.batches()]
    steps = [n for n in case.harmed if n <= found.last]
    rise = sum(losses[n] - losses[OUTLIER - 1] for n in steps)
    removed = sum(losses[n] - anew[n] for n in steps) / rise
    assert found.override.removed == pytest.approx(removed, abs=0.03)
    assert removed > 0.8
    assert anew[OUTLIER] < losses[OUTLIER] + 0.2
    ruined = trained(case, dict.fromkeys(case.culprits, Dynamic()))
    assert ruined[OUTLIER] > losses[OUTLIER] + 0.5
    assert found.override.scaling == ("blocks" if case is SILENT else "short history")


def test_shares_are_told_a_step_where_signs_differ(tmp_path: Path) -> None:
    losses, found = explained(LOUD, tmp_path / "run")
    assert found.others["blocks"] < 0.1  # the mean over the steps says that it is no use
    mended = trained(LOUD, dict.fromkeys(LOUD.culprits, BLOCKS))
    assert mended[OUTLIER] > 10 * losses[OUTLIER]
    words = found.words()
    assert f"By step: at steps {OUTLIER + 1} to {found.last} 100 % of it is gone" in words
    assert f"at step {OUTLIER} the loss is higher" in words
    whole = max(
        (c for c in found.counterfactuals if c.question.kind == "blocks"),
        key=lambda c: len(c.question.sites),
    )
    assert whole.by_step[OUTLIER + 2] == pytest.approx(1.0, abs=0.05)


def test_bad_batches_while_a_decoy_underflows_are_not_underflow(tmp_path: Path) -> None:
    case = UnderflowCase(other="bad batches", seed=3)
    losses, found = explained(case, tmp_path / "run")
    everywhere = dict.fromkeys(UnderflowCase(branches=2).culprits, BLOCKS)
    anew = trained(case, dict[SiteName, Scaling](everywhere))
    assert anew[OUTLIER + 2] == pytest.approx(losses[OUTLIER + 2], rel=0.02)
    assert found.verdict == "not clamping"
    assert found.underflow is None
    assert found.override is None


def test_where_either_of_two_sites_mends_it_both_are_told(tmp_path: Path) -> None:
    case = RedundantCase()
    losses = record(case, tmp_path / "run", every=5, keep=4)
    at, level = case.spike, losses[case.spike - 1]
    for site in case.culprits:  # by training anew
        assert losses_with(case, [site])[at] < 1.1 * level
    found = explain(case, tmp_path / "run")
    assert found.verdict == "clamping"
    assert found.override is not None
    assert len(found.named) == len(found.override.instead) == 1
    assert {*found.named, *found.override.instead} == set(case.culprits)
    assert "either alone removes it" in found.words()
    assert Explanation.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("verdict", "removed", "sites", "said"),
    [
        ("clamping", 0.95, "b",
         "Un-clamping b input in its place does too: either alone removes it."),
        ("partly clamping", 0.28, "b",
         "Un-clamping b input in its place removes as much: either alone does."),
        ("underflow", 0.95, "bc",
         "Putting b input, c input into blocks in its place does too: any one alone removes it."),
    ],
)  # fmt: skip
def test_what_else_mends_it_is_said_as_what_it_is(
    verdict: Verdict, removed: float, sites: str, said: str
) -> None:
    found = in_words(
        verdict,
        removed,
        override=Override(
            sites=(SiteName("a", "input"),),
            scaling="dynamic",
            removed=removed,
            toml="",
            python=None,
            instead=tuple(SiteName(site, "input") for site in sites),
        ),
        underflow=Underflow(by_step={7: removed}, elevated=3, removed=removed),
    )
    assert said in found.words()


@pytest.mark.parametrize(
    ("verdict", "share", "said"),
    [
        ("underflow", 0.45, "45 % of it is gone: from step 5 on clamping is a part of the cause."),
        ("underflow", 0.05, "5 % of it is gone: from step 5 on clamping is not the cause."),
        ("not clamping", 0.15, "15 % of it is gone: from step 5 on clamping is not the cause."),
    ],
)
def test_clamping_is_a_part_of_a_spike_of_underflow_where_a_part_goes_with_it(
    verdict: Verdict, share: float, said: str
) -> None:
    horizon = Horizon(asked=(Asked(step=5, steps=5, removed=share),))
    assert said in in_words(verdict, share, horizon=horizon, noise=0.01).words()


def in_words(verdict: Verdict, share: float, **changes: Any) -> Explanation:
    given: dict[str, Any] = {
        "run": "run", "onset": 7, "last": 9, "height": 2.5, "level": 2.0, "snapshot_step": 5,
        "others": {}, "underflowed": {}, "reproduced": True,
    }  # fmt: skip
    return Explanation(**given, **changes, verdict=verdict, clamping_share=share)


def test_a_training_goes_back_from_underflow_too() -> None:
    override = Override(sites=(), scaling="dynamic", removed=0.86, toml="", python=None)
    assert mends(override)
    assert not mends(replace(override, removed=0.4))
    assert not mends(replace(override, added=0.4))
