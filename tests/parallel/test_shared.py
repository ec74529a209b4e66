"""What ranks agree on at each step, and what they are told where they do not."""

import functools
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unclamp
from ranks import Failure, outcomes, run_ranks
from unclamp import Delayed, Dynamic, Guarded, PerBlock, Recipe, Static
from unclamp.errors import UnclampWarning
from unclamp.nn import Ledger, find_ledgers

WIDTH = 8
STEPS = 6


def _recipe(scaling: Any = None) -> Recipe:
    return Recipe.uniform(scaling or Delayed(history_len=3))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def _inputs(rank: int, steps: int = STEPS) -> Tensor:
    """Return inputs of one rank, `[steps, 4, WIDTH]`; each step another rank has the largest."""
    generator = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(steps, 4, WIDTH, generator=generator)
    return x * 2.0 ** torch.randint(-2, 3, (steps, 1, 1), generator=generator)


def _step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _made(model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Ledger]:
    net = _net() if model is None else model
    unclamp.convert(net, _recipe())
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    return wrapped, optimizer, find_ledgers(wrapped)[0]


def _state(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.scale.tolist(), ledger.amax_history.tolist(), ledger.updates


# ---- the maximum -------------------------------------------------------------------------------


def _amaxes_of_steps(rank: int) -> tuple[Any, list[float]]:
    """Train with one layer whose input is the data; return its states, and the inputs' amaxes."""
    model, optimizer, ledger = _made()
    states = []
    for x in _inputs(rank):
        _step(model, optimizer, x)
        states.append((ledger.history_of(0).tolist(), float(ledger.scale_of(0))))
    return states, _inputs(rank).abs().amax((1, 2)).tolist()


def test_histories_and_scales_are_those_of_the_largest_amax() -> None:
    """By hand: 448 over the largest of three steps, each the largest of two ranks."""
    found = run_ranks(2, _amaxes_of_steps)
    amaxes = torch.tensor([own for _, own in found]).amax(0)
    assert not torch.equal(amaxes, torch.tensor(found[0][1]))  # each rank has some of the largest
    assert not torch.equal(amaxes, torch.tensor(found[1][1]))
    for states, _ in found:
        for step, (history, scale) in enumerate(states):
            window = [float(amaxes[s]) if s >= 0 else 0.0 for s in range(step, step - 3, -1)]
            assert history == window
            assert scale == float(torch.tensor(448.0) / max(window))


def _uneven(rank: int) -> list[Any]:
    """One rank has no backward in some steps, another none in others, and in one nobody has."""
    net = _net()
    unclamp.convert(net, _recipe(), group=dist.group.WORLD)
    optimizer, (ledger,) = torch.optim.SGD(net.parameters(), lr=0.0), find_ledgers(net)
    states = []
    for step, x in enumerate(_inputs(0)):
        if step == 0 or step % 3 == rank:
            net(x).square().sum().backward()
        if step == rank == 0:  # a step that raises is no step, and hangs nobody
            with pytest.raises(RuntimeError, match="planted"):
                optimizer.step(_raise)
        optimizer.step()
        states.append(_state(ledger))
    return states


def _raise() -> float:
    raise RuntimeError("planted")


def test_a_rank_that_saw_nothing_takes_over() -> None:
    first, second = run_ranks(2, _uneven)
    assert first == second
    updates = [state[2] for state in first]
    assert updates == [1, 2, 2, 3, 4, 4]  # at steps 2 and 5 nobody had anything to update


def _nonfinite(rank: int) -> Any:
    net = _net()
    unclamp.convert(net, _recipe(), group=dist.group.WORLD)
    optimizer, (ledger,) = torch.optim.SGD(net.parameters(), lr=0.0), find_ledgers(net)
    for step, x in enumerate(_inputs(rank, 3)):
        if step == 1 and rank == 0:
            x[0, 0], x[0, 1] = torch.nan, torch.inf
        _step(net, optimizer, x)
    return _state(ledger)


def test_what_is_not_finite_reaches_no_history() -> None:
    first, second = run_ranks(2, _nonfinite)
    assert first == second
    assert torch.tensor(first[1]).isfinite().all()


# ---- optimizers --------------------------------------------------------------------------------


def _two_optimizers(rank: int) -> list[Any]:
    net = _net()
    unclamp.convert(net, _recipe())
    alone = dist.get_world_size() == 1
    model = net if alone else DistributedDataParallel(net, find_unused_parameters=False)
    (ledger,) = find_ledgers(net)
    halves = [torch.optim.SGD(half.parameters(), lr=0.0) for half in (net[0], net[2])]
    states = []
    for step in range(STEPS):
        parts = [_inputs(r)[step] for r in (range(2) if alone else [rank])]
        model(torch.cat(parts)).square().sum().backward()
        for half in halves[step % 2 :]:
            half.step()
        states.append(_state(ledger))
    return states


def test_each_optimizer_updates_its_own_products() -> None:
    several, (one,) = run_ranks(2, _two_optimizers), run_ranks(1, _two_optimizers)
    assert several[0] == several[1] == one


def _zero(rank: int, *, shards: bool) -> Any:
    model, _, ledger = _made()
    with warnings.catch_warnings():  # torch's own import of what is deprecated in torch
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    make: Any = (
        functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
        if shards
        else torch.optim.SGD
    )
    optimizer = make(model.parameters(), lr=2**-10)
    for x in _inputs(rank):
        _step(model, optimizer, x)
    return _state(ledger)


def _zeroes(rank: int) -> tuple[Any, Any]:
    return _zero(rank, shards=True), _zero(rank, shards=False)


def test_the_inner_step_of_zero_triggers_nothing() -> None:
    """Its optimizer steps one that holds this rank's parameters only."""
    found = run_ranks(2, _zeroes)
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    assert found[0][0][2] == STEPS


def _told(rank: int) -> list[Any]:
    """Steps by hand are told; a group by hand is given."""
    net = _net()
    unclamp.convert(net, _recipe(), group={"*": dist.group.WORLD})
    (ledger,) = find_ledgers(net)
    states = []
    for x in _inputs(rank):
        net(x).square().sum().backward()
        unclamp.step(net)
        unclamp.step(net)  # finds nothing to do
        states.append(_state(ledger))
    return states


def test_a_step_that_is_told_is_shared() -> None:
    told, data = run_ranks(2, _told), run_ranks(2, _amaxes_of_steps)
    assert told[0] == told[1]
    assert [(state[1][0][:3], state[0][0]) for state in told[0]] == data[0][0]
    assert told[0][-1][2] == STEPS


# ---- whom ranks share with ---------------------------------------------------------------------


def _unknown(rank: int, group: Any = None) -> tuple[list[str], Any]:
    net = _net()
    unclamp.convert(net, _recipe(), group=group)
    optimizer, (ledger,) = torch.optim.SGD(net.parameters(), lr=0.0), find_ledgers(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in _inputs(rank):
            _step(net, optimizer, x)
    return [str(w.message) for w in told if w.category is UnclampWarning], _state(ledger)


def test_nothing_stands_for_the_world() -> None:
    """Each has its own scales, and is told once how to say otherwise."""
    found = run_ranks(2, _unknown)
    assert found[0][1] != found[1][1]
    for told, _ in found:
        (text,) = told
        assert text.startswith("2 processes train together, and nothing says which of them hold")
        assert "2 layers (0, 2)" in text
        assert "group=..." in text


def test_a_process_that_says_it_is_alone_is() -> None:
    found = run_ranks(2, _unknown, ())
    assert found[0][1] != found[1][1]
    assert [told for told, _ in found] == [[], []]


def _given_by_glob(rank: int) -> Any:
    """Four ranks hold the first layer; two pairs have a second one each."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = _net()
    unclamp.convert(
        net,
        _recipe(),
        group={"2": pairs[rank // 2], "0": [dist.group.WORLD], "9": pairs[1 - rank // 2]},
    )
    optimizer, (ledger,) = torch.optim.SGD(net.parameters(), lr=0.0), find_ledgers(net)
    for x in _inputs(rank):
        _step(net, optimizer, x * (1 + rank // 2))
    return ledger.amax_history[:, 0].tolist()


def test_groups_are_given_by_globs() -> None:
    found = run_ranks(4, _given_by_glob)
    assert [row[:3] for row in found] == [found[0][:3]] * 4
    assert found[0][3:] == found[1][3:]
    assert found[2][3:] == found[3][3:]
    assert found[0][3] != found[2][3]


def _given_wrongly(rank: int) -> None:
    net = _net()
    others = dist.new_group([1])
    for group in ("world", {"*": others}) if rank == 0 else ():
        with pytest.raises(unclamp.ConvertError, match="expected process groups"):
            unclamp.convert(net, _recipe(), group=group)
        assert not find_ledgers(net)


def test_what_is_no_group_of_this_process_is_refused() -> None:
    run_ranks(2, _given_wrongly)


# ---- ranks that differ -------------------------------------------------------------------------

DIFFERENCES = {
    "a switch": (
        "rank 1 at 0 input has Dynamic",
        lambda model: unclamp.switch(model, "0", input=Dynamic()),
    ),
    "blocks": (
        "rank 1 at 2 weight has Delayed",
        lambda model: unclamp.switch(model, "2", weight=Delayed(granularity=PerBlock(4, 4))),
    ),
    "a checkpoint": (
        "rank 1 has made 7 updates, and rank 0 3|rank 1 has made 8 updates, and rank 0 4",
        lambda model: find_ledgers(model)[0].restore_updates(7),
    ),
    "scales": (
        "rank 1 has other amax histories and scales than rank 0",
        lambda model: find_ledgers(model)[0].restore(0, torch.ones(3), None),
    ),
}


def _differ_later(rank: int, name: str, late: bool) -> None:
    model, optimizer, ledger = _made()
    ledger.shared.is_late = late
    for step, x in enumerate(_inputs(rank)):
        if step == 3 and rank == 1:
            DIFFERENCES[name][1](model)
        _step(model, optimizer, x)


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_are_all_told_who_and_in_what(name: str, late: bool) -> None:
    for failed in outcomes(2, _differ_later, name, late, collective_s=20):
        assert isinstance(failed, Failure)
        assert failed.kind == "ConvertError"
        assert re.search(DIFFERENCES[name][0], failed.text)


RECIPES = {
    "another scaling": (_recipe(Guarded(history_len=3)), []),
    "a static one": (_recipe(Static(scale=2.0)), []),
    "another history": (_recipe(Delayed(history_len=4)), []),
    "a layer left out": (_recipe(), ["2"]),
}


def _differ_from_the_start(rank: int, name: str, begins: bool) -> None:
    net = _net()
    recipe, skip = RECIPES[name] if rank == 1 else (_recipe(), [])
    unclamp.convert(net, recipe, skip=skip)
    model = DistributedDataParallel(net, find_unused_parameters=not begins)
    _step(model, torch.optim.SGD(net.parameters(), lr=0.0), _inputs(rank)[0])


@pytest.mark.parametrize("begins", [True, False], ids=["in a forward", "in an update"])
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_with_other_recipes_are_told_before_they_share(name: str, begins: bool) -> None:
    for failed in outcomes(2, _differ_from_the_start, name, begins, collective_s=20):
        assert isinstance(failed, Failure)
        assert failed.kind == "ConvertError"
        assert "rank 1" in failed.text


def _alike(rank: int, late: bool) -> Any:
    """All ranks switch to blocks and back, load what they saved, and go on."""
    model, optimizer, ledger = _made()
    ledger.shared.is_late = late
    updates = []
    for step, x in enumerate(_inputs(rank, 9)):
        if step == 3:
            unclamp.switch(model, weight=Delayed(granularity=PerBlock(4, 4)))
        if step == 5:
            model.load_state_dict(model.state_dict())
        if step == 7:
            unclamp.switch(model, weight=Delayed(), input=Guarded())
        _step(model, optimizer, x)
        updates.append(ledger.updates)
    return _state(ledger), updates


def test_ranks_that_change_alike_go_on() -> None:
    first, second = run_ranks(2, _alike, False)
    assert first == second
    assert first[1] == list(range(1, 10))


def test_where_headers_are_read_late_a_new_length_waits_a_step() -> None:
    first, second = run_ranks(2, _alike, True)
    assert first == second
    assert first[1] == [1, 2, 3, 3, 4, 5, 6, 6, 7]


def _late_and_early(rank: int) -> list[Any]:
    states = []
    for late in (False, True):
        model, optimizer, ledger = _made()
        ledger.shared.is_late = late
        for x in _inputs(rank):
            _step(model, optimizer, x)
        states.append(_state(ledger))
    return states


def test_headers_read_late_change_no_scale() -> None:
    for early, late in run_ranks(2, _late_and_early):
        assert early == late


def _observed(rank: int) -> Any:
    """Observing is one rank's own business."""
    net = _net()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    if rank == 0:
        with unclamp.observe(net, _recipe()):
            for x in _inputs(rank):
                _step(model, optimizer, x)
    else:
        for x in _inputs(rank):
            _step(model, optimizer, x)


def test_one_rank_alone_may_observe() -> None:
    run_ranks(2, _observed)


def test_alone_nothing_is_shared() -> None:
    net = _net()
    unclamp.convert(net, _recipe())
    _step(net, torch.optim.SGD(net.parameters(), lr=0.0), _inputs(0)[0])
    assert find_ledgers(net)[0].shared.parts == []
