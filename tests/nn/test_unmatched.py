"""What a user is told of a conversion that did less than was asked, and where."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import unclamp
from unclamp import Delayed, Dynamic, Guarded, Recipe, UnclampWarning, convert
from unclamp.nn import find_ledgers
from unclamp.nn.unmatched import kept_note, notes_on


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught]


def test_a_model_with_nothing_to_convert_says_each_reason_once_with_a_few_names() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)), nn.Embedding(3, 2))
    with pytest.warns(UnclampWarning) as caught:
        convert(model, Recipe(), skip=["*"])
    assert warned(list(caught)) == [
        "no layer is in FP8: 0, 1, 2 and 2 more: matches skip '*'; "
        "5: not a linear layer (Embedding)"
    ]


def test_many_reasons_are_cut() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    with pytest.warns(UnclampWarning, match=r"5: matches skip '5'; and 3 more reasons$"):
        convert(model, Recipe(), skip=list("012345678"))


@pytest.mark.parametrize("what", ["convert", "observe", "recorder"])
def test_the_warning_names_the_line_of_the_user(what: str, tmp_path: Path) -> None:
    calls = {
        "convert": lambda: convert(nn.ReLU(), Recipe()),
        "observe": lambda: unclamp.observe(nn.ReLU()),
        "recorder": lambda: unclamp.Recorder(nn.ReLU(), tmp_path / "run").close(),
    }
    with pytest.warns(UnclampWarning) as caught:
        calls[what]()
    assert [w.filename for w in caught] == [__file__]


def test_the_same_recipe_again_is_silent_overrides_included() -> None:
    recipe = Recipe().override("0", input=Dynamic())
    model = stack()
    convert(model, recipe)
    unclamp.switch(model, "2", input=Dynamic())
    assert convert(model, recipe).unmatched == {}


def test_another_recipe_on_converted_layers_says_what_they_keep() -> None:
    model = stack()
    convert(model, Recipe.uniform(Guarded()))
    with pytest.warns(UnclampWarning, match="2 layers were converted already") as caught:
        convert(model, Recipe.uniform(Dynamic()))
    (text,) = warned(list(caught))
    assert "such as 0: input guarded e4m3fn" in text
    assert "unclamp.switch" in text
    assert "unclamp.revert" in text


def test_another_warm_up_is_another_recipe() -> None:
    model = stack()
    convert(model, Recipe(warmup_steps=3))
    with pytest.warns(UnclampWarning, match="converted already"):
        convert(model, Recipe(warmup_steps=4))


def test_layers_that_another_recipe_leaves_as_they_are_are_no_reason_to_warn() -> None:
    model = stack()
    convert(model, Recipe(), skip=["2"])
    convert(model, Recipe().override("2", input=Dynamic()))
    other = stack()
    convert(other, Recipe(), skip=["2"])
    convert(other, Recipe.uniform(Dynamic()), skip=["0"])
    assert unclamp.revert(other).reverted == ("0", "2")


def test_the_ledger_remembers_what_matched_nothing_in_words() -> None:
    model = stack()
    recipe = Recipe().override("mlp.down_proj", input=Dynamic())
    with pytest.warns(UnclampWarning):
        convert(model, recipe, skip=["lm_head"])
    expected = [
        "The skip glob 'lm_head' matched no layer: nothing was left out for it.",
        "The override 'mlp.down_proj' matched no layer: this run is plain delayed.",
    ]
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (ledger,) = find_ledgers(twin)
        assert notes_on(ledger.unmatched, recipe) == expected


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe().override("x", smooth=False).override("0", input=Dynamic()), "as it would be"),
        (Recipe(weight=Dynamic()).override("x", input=Dynamic()), "as it would be without it"),
        (Recipe.uniform(Dynamic()).override("x", input=Delayed()), "plain dynamic"),
    ],
)
def test_a_run_is_called_plain_only_where_that_says_it_all(recipe: Recipe, said: str) -> None:
    model = stack()
    with pytest.warns(UnclampWarning):
        convert(model, recipe)
    (note,) = notes_on(find_ledgers(model)[0].unmatched, recipe)
    assert said in note


def test_a_glob_that_a_later_conversion_matches_is_no_longer_noted() -> None:
    model = stack()
    recipe = Recipe().override("2", input=Dynamic())
    with pytest.warns(UnclampWarning, match="only layers that were skipped"):
        convert(model, recipe, skip=["2"])
    (ledger,) = find_ledgers(model)
    assert list(ledger.unmatched) == ["2"]
    convert(model, recipe)
    assert ledger.unmatched == {}


def test_layers_that_kept_an_earlier_recipe_are_noted() -> None:
    model = stack()
    convert(model, Recipe(), skip=["2"])
    with pytest.warns(UnclampWarning, match="1 layer was converted already"):
        convert(model, Recipe.uniform(Dynamic()))
    note = kept_note(find_ledgers(model)[0].kept)
    assert note == "1 layer was converted with an earlier recipe, and kept it: 0."
    assert torch.isfinite(model(torch.ones(1, 4))).all()


def test_of_two_overrides_with_one_glob_the_second_is_named() -> None:
    recipe = Recipe().override("0", input=Dynamic()).override("0", weight=Dynamic())
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UnclampWarning, match="'0': the second override for this glob"):
        report = convert(model, recipe)
    assert notes_on(report.unmatched, recipe) == [
        "The second override '0' decided nothing: the first one does."
    ]


def test_the_layers_of_a_block_are_listed_once_however_many_blocks() -> None:
    model = nn.Sequential(*(stack() for _ in range(30)), nn.Linear(2, 2))
    with pytest.warns(UnclampWarning, match="'up': override matches no linear layer") as caught:
        convert(model, Recipe().override("up", input=Dynamic()))
    assert warned(list(caught))[0].endswith("The model's linear layers: 0.0 x60, 30")
    with pytest.warns(UnclampWarning, match=r"The model's linear layers: 0, 2$"):
        convert(stack(), Recipe().override("up", input=Dynamic()))


class OwnAttention(nn.Module):
    def __init__(self, *, is_known: bool) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        if is_known:
            self.inner = unclamp.Attention()


@pytest.mark.parametrize("glob", ["*.qk", "*.pv.*"])
def test_a_rule_for_an_attention_that_is_not_known_says_how_it_would_be(glob: str) -> None:
    recipe = Recipe().override(glob, scaling="dynamic")
    with pytest.warns(UnclampWarning, match=r"unclamp\.attention\(self, q, k, v, \.\.\.\)"):
        convert(OwnAttention(is_known=False), recipe)
    with pytest.warns(UnclampWarning, match="'rope': override") as caught:
        convert(OwnAttention(is_known=True), Recipe().override("rope", scaling="dynamic"))
    assert "unclamp.attention" not in warned(list(caught))[0]


def test_a_report_has_a_line_for_most_of_a_bank_and_one_for_each_exception() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
            self.down = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    def said(skip: list[str]) -> list[str]:
        text = str(convert(Bank(), Recipe().override("up.2", input="dynamic"), skip=skip))
        return [line.strip().partition(" delayed")[0] for line in text.splitlines()[1:]]

    assert said([]) == [
        "up.2: input dynamic e4m3fn, weight",
        "up.*, 7 of 8, the others: input",
        "down.*, 8 of them: input",
    ]
    assert said(["down.*"])[-1] == "skipped down.*, 8 of them: matches skip 'down.*'"
