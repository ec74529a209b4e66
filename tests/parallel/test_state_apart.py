"""Ranks whose scaling state no longer fits together: each of them gets one error that says how."""

from collections.abc import Callable

import pytest
from torch import nn
from torch.optim import SGD

from ranks import run_ranks
from truths.wrapped import RECIPE, Kind, net, quiet, train, wrapped
from unclamp import ConvertError, Dynamic, Recipe, convert, switch
from unclamp.nn import find_ledgers

ODD = 1


def _loads_another(model: nn.Module) -> None:
    """Load a state of as many updates, and of other amaxes."""
    state = model.state_dict()
    for key in state:
        if key.endswith("2.unclamp_input_amax_history"):
            state[key] = state[key] * 2
    model.load_state_dict(state)


def _loads_an_earlier(model: nn.Module) -> None:
    state = model.state_dict()
    for key in state:
        if key.endswith("unclamp_updates"):
            state[key] = state[key] * 0 + 1
    model.load_state_dict(state)


def _loads_weights(model: nn.Module) -> None:
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in own.items() if "unclamp_" not in k})


def _switches(model: nn.Module) -> None:
    switch(model, "*2", input=Dynamic())


CASES: dict[Callable[[nn.Module], None], str] = {
    _loads_another: "rank 1 has other amax histories and scales than rank 0",
    _loads_an_earlier: "rank 1 has made 1 update, and rank 0 2",
    _loads_weights: "rank 1 has other amax histories and scales than rank 0",
    _switches: "rank 1 at 2 input has Dynamic",
}
CONVERTED = [
    "rank 1 at 0 input has Delayed",
    "rank 1 at 2 input has none, and rank 0 Guarded",
]


@quiet
def _said(rank: int, kind: Kind) -> list[str]:
    said = []
    for one_does in CASES:
        model = wrapped(net(), kind)
        optimizer = SGD(model.parameters(), lr=0.05)
        train(model, optimizer, kind, range(2))
        if rank == ODD:
            one_does(model)
        try:
            train(model, optimizer, kind, range(2, 3))
            said.append(f"nothing after {find_ledgers(model)[0].count()} updates")
        except ConvertError as error:
            said.append(str(error))
    return said


def _converted(rank: int, kind: Kind, is_bare: bool) -> str:
    """Convert with another recipe on one rank, or on that one without a layer, and train."""
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    recipe = RECIPE if is_bare or rank != ODD else Recipe()
    convert(model, recipe, skip=["2"] if is_bare and rank == ODD else [])
    model = wrapped(model, kind)
    try:
        train(model, SGD(model.parameters(), lr=0.05), kind, range(1))
    except ConvertError as error:
        return str(error)
    return "nothing"


@quiet
def _all_of_it(rank: int, kind: Kind) -> list[str]:
    return [*_said(rank, kind), *(_converted(rank, kind, is_bare) for is_bare in (False, True))]


@pytest.mark.parametrize(("kind", "count"), [("ddp", 3), ("fsdp2", 2)])
def test_a_rank_that_stands_apart_is_named_on_all(kind: Kind, count: int) -> None:
    for said in run_ranks(count, _all_of_it, kind):
        for text, expected in zip(said, [*CASES.values(), *CONVERTED], strict=True):
            assert expected in text
