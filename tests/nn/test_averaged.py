"""An average of scaling states shows, whatever its number of updates, and only where it is one."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import unclamp
from truths.kept import drive, fresh
from unclamp import Delayed, PerBlock, Recipe, UnclampWarning
from unclamp.nn import find_ledgers
from unclamp.nn.averaged import is_average

State = dict[str, Tensor]
RECIPES: dict[str, Recipe] = {
    "per tensor": Recipe.uniform(Delayed(history_len=4)),
    "power of two": Recipe.uniform(Delayed(history_len=4, power_of_two=True)),
    "margin": Recipe.uniform(Delayed(history_len=4, margin=2)),
    "blocks": Recipe(weight=Delayed(history_len=4, granularity=PerBlock(4, 3))),
    "most recent": Recipe.uniform(Delayed(history_len=4, reduce="most_recent")),
}


def states(recipe: Recipe, amaxes: list[float]) -> list[State]:
    """Return the states of one training after each of its steps."""
    model = fresh(recipe)
    kept = []
    for amax in amaxes:
        drive(model, amax)
        kept.append({key: value.clone() for key, value in model.state_dict().items()})
    return kept


def mean(some: list[State]) -> State:
    return {key: torch.stack([each[key] for each in some]).mean(0) for key in some[0]}


def loaded(state: State, recipe: Recipe) -> nn.Module:
    model = fresh(recipe).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_averages_of_evenly_spaced_states_are_known_and_states_are_not(name: str) -> None:
    every = states(RECIPES[name], [1.0, 2.0, 3.0, 5.0, 7.0])
    for some in ([0, 2], [0, 2, 4], [1, 2, 3]):
        average = mean([every[i] for i in some])
        assert float(average["0.unclamp_updates"]).is_integer()
        assert unclamp.evaluation_counts(loaded(average, RECIPES[name])).age is None
    for state in every:
        assert unclamp.evaluation_counts(loaded(state, RECIPES[name])).age == 0
        same = mean([state, state, state])
        assert unclamp.evaluation_counts(loaded(same, RECIPES[name])).age == 0


@pytest.mark.parametrize("saved", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_that_is_loaded_under_another_recipe_is_no_average(
    saved: str, dtype: torch.dtype
) -> None:
    state = {k: v.to(dtype) for k, v in states(RECIPES[saved], [1.0, 2.0, 3.0])[-1].items()}
    for recipe in RECIPES.values():
        model = fresh(recipe).to(dtype)
        model.load_state_dict(state)
        assert unclamp.evaluation_counts(model).age == 0


def test_federated_states_with_one_number_of_updates_say_so_where_they_clamp() -> None:
    clients = [states(Recipe(), [1.0, amax])[-1] for amax in (1.0, 1.0, 64.0)]
    server = loaded(mean(clients), Recipe())
    with pytest.warns(UnclampWarning, match="an average of several states"), torch.no_grad():
        server(torch.full((2, 6), 64.0))
    assert "of unknown age" in str(unclamp.evaluation_counts(server))


def test_a_target_network_beside_its_source_marks_itself_alone() -> None:
    torch.manual_seed(0)
    both = nn.ModuleDict({"online": nn.Linear(16, 16), "target": nn.Linear(16, 16)})
    both["target"].load_state_dict(both["online"].state_dict())
    both["target"].requires_grad_(False)
    unclamp.convert(both, Recipe.uniform(Delayed(history_len=4)))
    optimizer = SGD(both["online"].parameters(), lr=1e-3)
    tau = 0.005
    for step in range(12):
        both["online"](torch.rand(8, 16) * 2.0**step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        new, old = both["online"].state_dict(), both["target"].state_dict()
        both["target"].load_state_dict({k: tau * new[k] + (1 - tau) * old[k] for k in new})
        assert unclamp.evaluation_counts(both["online"]).age == 0
    assert unclamp.evaluation_counts(both["target"]).age is None
    assert float(both["online"].state_dict()["unclamp_updates"]) == 12


def test_rounding_of_an_average_of_one_state_with_itself_is_none() -> None:
    (state,) = states(Recipe(), [3.0])
    for tau in (0.005, 0.1, 0.3, 0.7):
        mixed = {key: tau * value + (1 - tau) * value for key, value in state.items()}
        assert unclamp.evaluation_counts(loaded(mixed, Recipe())).age == 0


def test_what_was_not_measured_says_nothing() -> None:
    none = torch.zeros(2)
    assert not is_average(none, torch.zeros(2, 4), none)
    assert not is_average(torch.tensor([448.0]), torch.zeros(1, 0), torch.tensor([448.0]))
    infinite = torch.tensor([[torch.inf, 1.0]])
    assert not is_average(torch.tensor([3.0]), infinite, torch.tensor([3.0]))
    both = torch.tensor([448.0, 300.0]), torch.tensor([[1.0], [1.0]])
    assert is_average(*both, torch.tensor([448.0, 448.0]))


def test_a_part_that_is_loaded_leaves_the_warm_up_of_the_whole() -> None:
    def made(warmup_steps: int) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        unclamp.convert(model, Recipe(warmup_steps=warmup_steps))
        return model

    model = made(2)
    (ledger,) = find_ledgers(model)
    young = copy.deepcopy(model.state_dict())
    for _ in range(4):
        drive(model, 1.0)
    model[0].load_state_dict({k[2:]: v for k, v in young.items() if k.startswith("0.")})
    assert (ledger.updates, ledger.is_warming) == (4, False)
    old = copy.deepcopy(model.state_dict())
    other = made(2)
    (ledger,) = find_ledgers(other)
    other[0].load_state_dict(model[0].state_dict())
    assert (ledger.updates, ledger.is_warming) == (0, True)
    other[1].load_state_dict(model[1].state_dict())  # now the whole is
    assert (ledger.updates, ledger.is_warming) == (4, False)
    model.load_state_dict(young)
    assert find_ledgers(model)[0].updates == 0
    drive(model, 1.0)
    model.load_state_dict(old)
    assert find_ledgers(model)[0].updates == 4


def test_a_copy_of_an_old_average_warns_as_it_does_and_a_pickle_knows_no_age() -> None:
    import pickle

    model = fresh()
    drive(model, 1.0)
    average = copy.deepcopy(model).eval()
    best = copy.deepcopy(model).eval()
    drive(model, 64.0)
    with torch.no_grad():
        for mine, new in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(new, 0.1)
    x = torch.full((2, 6), 8.0)
    with torch.no_grad():
        copy.deepcopy(best)(x)  # meant to be old
        with pytest.warns(UnclampWarning, match="1 update older"):
            copy.deepcopy(average)(x)
        kept = pickle.loads(pickle.dumps(average))
        kept(x)
    counts = unclamp.evaluation_counts(kept)
    assert counts.age is None
    assert "up to date" not in str(counts)
    assert unclamp.evaluation_counts(pickle.loads(pickle.dumps(model))).age == 0
    drive(kept, 1.0)
    assert unclamp.evaluation_counts(kept).age == 0


@pytest.mark.parametrize("was_average", [True, False])
def test_a_pickle_from_before_products_were_marked_keeps_what_it_said(was_average: bool) -> None:
    kept = pickle.dumps(fresh())
    model = pickle.loads(kept)
    (ledger,) = find_ledgers(model)
    state = {key: getattr(ledger.evaluated, key) for key in ("source", "stats")}
    ledger.evaluated.__setstate__({**state, "is_average": was_average})
    assert unclamp.evaluation_counts(model).age == (None if was_average else 0)
