"""A recipe with chosen sites scaled otherwise: one function for observe, explain and study."""

from pathlib import Path

import pytest

from unclamp import Delayed, Dynamic, Guarded, HighPrecision, Recipe, SiteName
from unclamp.errors import RecipeError
from unclamp.explain.mend import make_override
from unclamp.names import ROLES
from unclamp.study.arms import switch_to_dynamic

BASE = (
    Recipe(input_format="e5m2", grad_weight=HighPrecision(), warmup_steps=2)
    .override("up", weight=HighPrecision(), accumulate="hopper", grad_output_format="e4m3fn")
    .override("layers.*", input=Guarded(), note="an earlier reason")
)
SITES = [SiteName("layers.0.up", "input"), SiteName("b", "grad_output"), SiteName("b", "weight")]


def test_only_the_named_operands_change() -> None:
    mended = BASE.at_sites(SITES)
    for fqn in ("layers.0.up", "layers.1.up", "layers.0.down", "b", "x.b", "c"):
        before, after = BASE.plan(fqn), mended.plan(fqn)
        assert (before.gemms, before.smooth) == (after.gemms, after.smooth)
        for role in ROLES:
            assert before.operands[role].format == after.operands[role].format
            is_named = SiteName(fqn, role) in SITES
            expected = Dynamic() if is_named else before.operands[role].scaling
            assert after.operands[role].scaling == expected
    assert mended.warmup_steps == 2


def test_a_name_with_the_signs_of_a_glob_is_that_name_alone() -> None:
    mended = Recipe().at_sites([SiteName("experts[0].up*", "input")], "guarded")
    assert mended.plan("experts[0].up*").operands["input"].scaling == Guarded()
    for other in ("experts0.up*", "experts[0].upper", "x.experts[0].up*"):
        assert mended.plan(other).operands["input"].scaling == Delayed()


def test_the_model_itself_can_be_the_layer() -> None:
    mended = Recipe().at_sites([SiteName("", "input")])
    assert mended.plan("").operands["input"].scaling == Dynamic()
    assert mended.plan("a").operands["input"].scaling == Delayed()


def test_notes_are_kept_by_files_and_change_nothing() -> None:
    mended = BASE.at_sites(SITES, notes={"b": 'clamped "much"\nand often'})
    assert mended.rules[0].note == 'clamped "much"\nand often'
    assert Recipe.from_toml(mended.to_toml()) == mended
    assert "an earlier reason" in BASE.to_toml()
    assert mended.plan("b") == BASE.at_sites(SITES).plan("b")
    with pytest.raises(RecipeError, match="text for a rule's note"):
        Recipe.from_toml('[[override]]\nmatch = "a"\nnote = 3\nsmooth = false')


SHORT = Recipe().override("late", smooth=False).override("b", accumulate="hopper")


@pytest.mark.parametrize("fqn", ["a.up", "b", 'odd "\\" name', "tab\tname", "\U0001f980", "\x7f"])
@pytest.mark.parametrize("base", [Recipe(), SHORT, BASE])
def test_what_explain_prints_can_be_pasted_into_a_recipe_file(
    fqn: str, base: Recipe, tmp_path: Path
) -> None:
    site = SiteName(fqn, "input")
    block = make_override([site], "dynamic", recipe=base, removed=None).toml
    text, head = base.to_toml(), "[[override]]"
    before = text.replace(head, f"{block}\n{head}", 1) if head in text else f"{text}\n{block}"
    (tmp_path / "recipe.toml").write_text(before, encoding="utf-8")
    mended = Recipe.load(tmp_path / "recipe.toml")
    assert mended.rules[1:] == base.rules
    assert mended.plan(fqn).operands["input"].scaling == Dynamic()
    # After the others it is read too, and decides for what none of them matches.
    (tmp_path / "recipe.toml").write_text(f"{text}\n{block}", encoding="utf-8")
    appended = Recipe.load(tmp_path / "recipe.toml")
    assert appended.rules == (*base.rules, mended.rules[0])
    changes = base.rule_for(fqn) is None
    assert (appended.plan(fqn).operands["input"].scaling == Dynamic()) == changes


def test_a_note_alone_is_no_override() -> None:
    with pytest.raises(RecipeError, match="changes nothing"):
        Recipe().override("a", note="because")


def test_study_and_explain_mend_with_it() -> None:
    by_hand = BASE.at_sites(SITES)
    assert switch_to_dynamic(BASE, [(site.fqn, site.role) for site in SITES]) == by_hand
    pasted = make_override(SITES, "dynamic", recipe=BASE, removed=None).toml
    rules = Recipe.from_toml(pasted).rules
    assert [rule.match for rule in rules] == [rule.match for rule in by_hand.rules[:2]]
    for fqn in ("b", "layers.0.up"):
        there = next(rule for rule in rules if rule.matches(fqn))
        here = by_hand.rule_for(fqn)
        assert here is not None
        assert {**there.scalings} == {**here.scalings}


def test_a_scaling_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'dynamic'"):
        Recipe().at_sites(SITES, "dynamical")


def test_printed_it_is_toml() -> None:
    assert Recipe.from_toml(str(BASE)) == BASE
    in_python = Recipe(input=Delayed(reduce=lambda history: history[:, 0]))
    assert str(in_python) == repr(in_python)
