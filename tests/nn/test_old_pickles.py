"""Whole models that an earlier version pickled: what it did not know is as in a new model."""

import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import unclamp
from unclamp import Delayed, Recipe
from unclamp.nn import Ledger, find_ledgers

HISTORY_LEN, STEPS = 4, 3
ADDED = ("unmatched", "kept", "steps", "evaluated", "gone", "shared", "observes", "inspection",
         "_asked", "details", "_listeners", "_switch_listeners", "coverage",
         "is_apart")  # fmt: skip
"""What a ledger's pickle got from version to version."""


def trained() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=HISTORY_LEN)))
    train(model, STEPS)
    return model


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 2.0**step)).sum().backward()
        optimizer.step()


def as_pickled_without(model: nn.Module, missing: set[str], **others: Any) -> nn.Module:
    """Return a model out of a pickle in which its ledger lacks some keys, and has others."""

    class Old(pickle.Pickler):
        def reducer_override(self, obj: object) -> Any:
            if not isinstance(obj, Ledger):
                return NotImplemented
            state = {k: v for k, v in obj.__getstate__().items() if k not in missing}
            return (Ledger.__new__, (Ledger,), {**state, **others})

    stream = io.BytesIO()
    Old(stream).dump(model)
    return pickle.loads(stream.getvalue())


def check(model: nn.Module, *, updates: int) -> None:
    """Check that a model evaluates, copies, pickles and trains on as one that was never pickled."""
    (ledger,) = find_ledgers(model)
    own = trained()
    state, expected = model.state_dict(), own.state_dict()
    expected["unclamp_updates"] = torch.tensor(updates, dtype=torch.float64)
    assert all(torch.equal(value, state[key]) for key, value in expected.items())
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), own.eval()(x))
    counts = unclamp.evaluation_counts(model)
    assert counts.elements == 3 * 4 + 4 * 4
    assert counts.age == 0
    for each in (model.train(), own.train()):
        train(each, 2)
    assert ledger.updates == updates + 2
    for key, value in own.state_dict().items():
        if key != "unclamp_updates":
            assert torch.equal(value, model.state_dict()[key])
    again = pickle.loads(pickle.dumps(model))
    assert find_ledgers(again)[0].updates == updates + 2


@pytest.mark.parametrize("key", ADDED)
def test_a_pickle_without_a_key_has_what_a_new_ledger_has(key: str) -> None:
    model = trained()
    assert key in find_ledgers(model)[0].__getstate__()
    check(as_pickled_without(model, {key}), updates=0 if key == "steps" else STEPS)


def test_a_pickle_from_before_the_steps_were_shared_keeps_their_number() -> None:
    older = as_pickled_without(trained(), {"steps", "evaluated"}, updates=STEPS)
    check(older, updates=STEPS)


def test_a_pickle_without_any_of_them_loads() -> None:
    check(as_pickled_without(trained(), set(ADDED), updates=STEPS), updates=STEPS)


def test_every_value_of_a_new_ledger_has_a_default() -> None:
    """What is not in the list of keys was in every pickle, or is never pickled."""
    always = {"recipe", "layout", "ring", "scale", "block_amax", "pending", "_nothing_pending",
              "captured", "_clean_version"}  # fmt: skip
    state = Ledger().__getstate__()
    assert state.keys() - always == set(ADDED)
