"""Switching while training: nothing is forgotten, and it is written down."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import unclamp
from unclamp import (
    ConvertError,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerRow,
    Recipe,
    RecipeError,
    Static,
    convert,
    switch,
)
from unclamp.nn import find_ledgers


def made(scaling=None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    convert(model, Recipe.uniform(scaling or Delayed(history_len=4)))
    return model


def train(model: nn.Module, first: int, steps: int) -> None:
    optimizer = SGD(model.parameters(), lr=0.0)
    for step in range(first, first + steps):
        torch.manual_seed(step)
        model(torch.randn(5, 6) * (step % 3 + 1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module) -> list[Tensor]:
    (ledger,) = find_ledgers(model)
    return [ledger.scale.clone(), ledger.amax_history.clone()]


def test_delayed_dynamic_delayed_is_delayed():
    steady, switched = made(), made()
    for model in (steady, switched):
        train(model, 0, 3)
    switch(switched, scaling=Dynamic())
    for model in (steady, switched):
        train(model, 3, 3)
    switch(switched, scaling=Delayed(history_len=4))
    # Weights and the first input are the same in both; the rest depends on the casts before it.
    for index in (0, 1, 4):
        assert torch.equal(state(steady)[1][index, :4], state(switched)[1][index, :4])
    (a,), (b,) = find_ledgers(steady), find_ledgers(switched)
    assert a.scale[0] == b.scale[0]
    x = torch.randn(5, 6)
    assert torch.equal(steady[0](x), switched[0](x))


def test_a_switch_works_from_the_next_cast_on_and_for_named_roles_alone():
    model = made()
    train(model, 0, 2)
    report = switch(model, "0", input=Dynamic())
    x = torch.randn(5, 6) * 1000
    (ledger,) = find_ledgers(model)
    model(x).sum().backward()
    saturated = ledger.pending[:, unclamp.numerics.Stat.SATURATED]
    assert saturated[0] == 0
    assert saturated[3] > 0
    assert {fqn: list(roles) for fqn, roles in report.switched.items()} == {"0": ["input"]}
    assert "0: input delayed -> dynamic" in str(report)
    assert "recompiles once" in str(report)


def test_a_longer_history_remembers_from_what_is_there_and_shrinking_forgets_nothing():
    model = made(Delayed(history_len=4))
    train(model, 0, 6)
    before = find_ledgers(model)[0].history_of(0)
    switch(model, "0", input=Guarded(history_len=9))
    (ledger,) = find_ledgers(model)
    assert ledger.history_of(0)[:4].equal(before)
    train(model, 6, 5)
    assert (ledger.history_of(0) > 0).all()
    switch(model, "0", input=Delayed(history_len=1))
    assert ledger.scale[0] == 448 / ledger.history_of(0)[0]
    train(model, 11, 1)
    switch(model, "0", input=Delayed(history_len=9))
    assert ledger.scale[0] == 448 / ledger.history_of(0).max()


def test_margin_and_reduction_of_the_new_scaling_count_at_once():
    model = made(Delayed(history_len=4))
    train(model, 0, 4)
    (ledger,) = find_ledgers(model)
    history = ledger.history_of(0)
    switch(model, "0", input=Delayed(history_len=4, margin=2, reduce="most_recent"))
    assert ledger.scale[0] == 448 / history[0] / 4
    switch(model, "0", input=Delayed(history_len=4, power_of_two=True))
    assert torch.frexp(ledger.scale[0]).mantissa == 0.5


def test_from_static_to_delayed_forgets_the_static_scale():
    model = made(Static(scale=3.0))
    switch(model, scaling=Delayed())
    assert (find_ledgers(model)[0].scale == 0).all()
    model = made(Static(scale=3.0))
    train(model, 0, 1)
    switch(model, "0", input=Delayed())
    (ledger,) = find_ledgers(model)
    assert ledger.scale[0] == 448 / ledger.history_of(0)[0]
    switch(model, "0", input=Static(scale=5.0))
    assert ledger.scale[0] == 5


def test_to_high_precision_and_back():
    model, plain = made(), made()
    unclamp.revert(plain)
    switch(model, scaling=HighPrecision())
    x = torch.randn(5, 6)
    assert torch.equal(model(x), plain(x))
    switch(model, scaling=Dynamic())
    assert not torch.equal(model(x), plain(x))


def test_other_blocks_start_a_history_of_their_own_and_leave_the_others():
    model = made()
    train(model, 0, 3)
    (ledger,) = find_ledgers(model)
    before = {index: ledger.history_of(index) for index in range(6)}
    model(torch.randn(5, 6)).sum().backward()
    switch(model, "0", weight=Delayed(history_len=4, granularity=PerRow()))
    assert ledger.has_pending
    assert ledger.history_of(1).shape == (14, 4)
    assert (ledger.history_of(1) == 0).all()
    assert all(ledger.history_of(i).equal(before[i]) for i in range(6) if i != 1)
    SGD(model.parameters(), lr=0.0).step()
    train(model, 3, 1)
    assert (ledger.history_of(1)[:8, 0] > 0).all()
    scales = ledger.scale_of(1)
    switch(model, "0", weight=Dynamic(granularity=PerRow()))
    train(model, 4, 1)
    assert (ledger.history_of(1)[:8, :2] > 0).all()  # rows go on while they are dynamic
    switch(model, "0", weight=Delayed(history_len=4, granularity=PerRow()))
    assert torch.equal(ledger.scale_of(1), scales)
    switch(model, "0", weight=Dynamic())
    assert ledger.history_of(1).shape == (16,)


def test_a_switch_between_forward_and_backward_keeps_what_the_forward_made():
    torch.manual_seed(0)
    grads = []
    for switches in (False, True):
        model = made(Dynamic())
        x = torch.ones(5, 6, requires_grad=True)
        y = model(x)
        if switches:
            switch(model, input=Dynamic(granularity=PerRow()), weight=HighPrecision())
        y.sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_a_switch_is_an_event_of_the_coming_step(tmp_path):
    model = made()
    optimizer = SGD(model.parameters(), lr=0.0)
    with unclamp.Recorder(model, tmp_path / "run") as recorder:
        for step in range(4):
            if step == 2:
                switch(model, "2", input=Dynamic(), weight=Delayed(reduce=torch.amax))
            model(torch.randn(5, 6)).sum().backward()
            optimizer.step()
            recorder.step(loss=1.0)
    with unclamp.RunLog.open(tmp_path / "run") as log:
        (event,) = log.events().to_pylist()
    assert (event["kind"], event["step"]) == ("switch", 2)
    sites = json.loads(event["data"])["sites"]
    assert [(s["fqn"], s["role"]) for s in sites] == [("2", "input"), ("2", "weight")]
    assert sites[0]["before"]["scaling"] == "delayed"
    assert sites[0]["after"] == {
        "scaling": "dynamic",
        "margin": 0,
        "power_of_two": False,
        "shared": False,
        "granularity": "tensor",
    }
    assert sites[1]["after"]["reduce"] == "amax"


def test_what_has_the_scaling_already_is_left_out_and_no_event(tmp_path):
    model = made(Dynamic())
    with unclamp.Recorder(model, tmp_path / "run"):
        assert switch(model, scaling=Dynamic()).switched == {}
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.events().num_rows == 0


def test_a_glob_without_a_layer_is_an_error_that_lists_the_layers():
    model = made()
    with pytest.raises(ConvertError, match=r"matches no converted layer.*0, 2"):
        switch(model, "layers.*", input=Dynamic())
    with pytest.raises(ConvertError, match="it has: none"):
        switch(nn.Linear(2, 2), input=Dynamic())


def test_a_switch_without_or_with_a_senseless_scaling_changes_nothing():
    model = made()
    with pytest.raises(RecipeError, match="needs a scaling"):
        switch(model, "0")
    with pytest.raises(RecipeError, match="other tokens"):
        switch(model, "0", weight=Dynamic(), input=Delayed(granularity=PerRow()))
    (ledger,) = find_ledgers(model)
    assert all(site.operand.scaling == Delayed(history_len=4) for site in ledger.sites)


def test_a_switch_to_rows_between_forward_and_backward_measures_no_wrong_row():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, Recipe.uniform(Dynamic()))
    y = model(torch.randn(4, 8, requires_grad=True))
    switch(model, weight=Delayed(granularity=PerRow()))
    y.sum().backward()
    SGD(model.parameters(), lr=0.0).step()
    assert (find_ledgers(model)[0].history_of(1) == 0).all()
