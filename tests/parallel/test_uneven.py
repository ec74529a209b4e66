"""Ranks that do not do the same: other optimizers, more microbatches, forwards of one alone."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unclamp
from patience import PATIENCE_S
from ranks import Failure, outcomes, run_ranks
from unclamp import Delayed, Dynamic, Recipe
from unclamp.nn import Ledger, find_ledgers
from unclamp.nn.apart import Description, difference
from unclamp.numerics import Stat

WIDTH, STEPS, HISTORY = 8, 4, 4
RECIPE = Recipe.uniform(Delayed(history_len=HISTORY))


def _net(middle: type[nn.Module] = nn.PReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), middle(), nn.Linear(WIDTH, WIDTH))


def _inputs(rank: int, steps: int = STEPS) -> Tensor:
    """Return inputs of one rank, `[steps, 4, WIDTH]`; each rank has some of the largest."""
    generator = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(steps, 4, WIDTH, generator=generator)
    return x * 2.0 ** torch.randint(-2, 3, (steps, 1, 1), generator=generator)


def _largest(steps: int = STEPS) -> list[float]:
    """Return the amax of each step over two ranks, newest first."""
    both = torch.stack([_inputs(rank, steps) for rank in range(2)])
    return both.abs().amax((0, 2, 3)).flip(0).tolist()


def _wrapped(net: nn.Module | None = None) -> tuple[nn.Module, nn.Module, Ledger]:
    net = _net() if net is None else net
    unclamp.convert(net, RECIPE)
    return net, DistributedDataParallel(net), find_ledgers(net)[0]


def _state(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.scale.tolist(), ledger.amax_history.tolist(), ledger.updates


# ---- optimizers that own other layers on each rank ---------------------------------------------

OWNED = {
    "none of one rank's": {0: ["0", "2"], 1: ["1"]},
    "each its own": {0: ["0"], 1: ["2"]},
    "a layer and all": {0: ["0", "1", "2"], 1: ["2"]},
}


def _owned(rank: int) -> dict[tuple[str, bool], Any]:
    """Train without moving weights, each rank with an optimizer of its own layers."""
    states = {}
    for name, owners in OWNED.items():
        for late in (False, True):
            net, model, ledger = _wrapped()
            ledger.shared.is_late = late
            own = [p for layer in owners[rank] for p in net.get_submodule(layer).parameters()]
            optimizer = torch.optim.SGD(own, lr=0.0)
            for x in _inputs(rank):
                model(x).square().sum().backward()
                optimizer.step()
            states[name, late] = _state(ledger)
    return states


def test_a_layer_that_has_its_turn_on_one_rank_has_it_on_all() -> None:
    first, second = run_ranks(2, _owned)
    for key in first:
        assert first[key] == second[key]
        scales, histories, updates = first[key]
        assert histories[0][:STEPS] == _largest()
        assert updates == STEPS
        assert all(scale > 0 for scale in scales)


def _halves(rank: int) -> tuple[list[Any], bool]:
    """Each rank steps the same half; what the other half saw stays pending on both ranks."""
    net, model, ledger = _wrapped()
    halves = [torch.optim.SGD(net.get_submodule(i).parameters(), lr=0.0) for i in "02"]
    states = []
    for step, x in enumerate(_inputs(rank)):
        model(x).square().sum().backward()
        halves[1].step()
        if step % 2:
            halves[0].step()
        states.append(ledger.history_of(0).tolist()[:2])
    return states, ledger.has_pending


def test_a_half_that_is_not_stepped_stays_pending() -> None:
    first, second = run_ranks(2, _halves)
    assert first == second
    amaxes = _largest()[::-1]
    early, late = max(amaxes[:2]), max(amaxes[2:])
    assert first[0] == [[0.0, 0.0], [early, 0.0], [early, 0.0], [late, early]]


# ---- forwards of one rank alone ----------------------------------------------------------------


def _microbatches(rank: int) -> tuple[Any, float]:
    """One rank has more microbatches in the first step; the last of them is the largest."""
    net, model, ledger = _wrapped()
    clamped: list[float] = []
    ledger.subscribe(lambda update: clamped.append(float(update.stats[:, Stat.SATURATED].sum())))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    x = torch.ones(4, WIDTH)
    for number in range(2 + rank):
        with model.no_sync():  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            model(x * 2**number).square().sum().backward()
    model(x).square().sum().backward()
    optimizer.step()
    return _state(ledger), clamped[0]


def _alone(rank: int) -> list[Any]:
    """One rank looks at shapes before the model is wrapped, and evaluates with gradients after."""
    states = []
    for looks in (False, True):
        net = _net()
        unclamp.convert(net, RECIPE)
        if looks:
            with torch.no_grad():
                net(_inputs(0)[0])
            net.eval()(_inputs(0)[0])
            net.train()
        model = DistributedDataParallel(net)
        if looks and rank == 0:
            model.eval()(_inputs(0)[0])
            model.train()
        (ledger,) = find_ledgers(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=2**-10)
        for x in _inputs(rank):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(_state(ledger))
    return states


def _averaged(rank: int) -> Any:
    """A frozen teacher and an average stand beside the training; a warning would be an error."""
    net, model, ledger = _wrapped()
    teacher = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-10)
    for x in _inputs(rank):
        with torch.no_grad():
            aim = teacher(x)
        (model(x) - aim - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            average = copy.deepcopy(net).eval()
            with torch.no_grad():
                average(x)
    return _state(ledger)


def _train_joined(rank: int) -> None:
    net, model, _ = _wrapped()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with model.join():  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        for x in _inputs(rank, 2 + rank):
            model(x).square().sum().backward()
            optimizer.step()


def _joined(rank: int) -> None:
    with pytest.raises(unclamp.ConvertError, match=r"got DistributedDataParallel\.join\(\)"):
        _train_joined(rank)


def _several(rank: int) -> tuple[Any, ...]:
    _joined(rank)
    return _microbatches(rank), _alone(rank), _averaged(rank)


def test_ranks_may_differ_in_what_others_need_not_wait_for() -> None:
    first, second = run_ranks(2, _several)
    microbatches, alone, averaged = zip(first, second, strict=True)
    assert microbatches[0] == microbatches[1]
    (_, histories, updates), clamped = microbatches[0]
    assert (histories[0][0], updates, clamped) == (4.0, 1, 0.0)
    assert alone[0] == alone[1]
    assert alone[0][0] == alone[0][1]  # whoever looked before
    assert averaged[0] == averaged[1]


# ---- ranks in several groups -------------------------------------------------------------------


def _pairs(rank: int, late: bool) -> None:
    """Two pairs have a layer each, and all four have the other; one rank switches its own."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    net = _net(nn.ReLU)
    unclamp.convert(net, RECIPE, group={"0": pair, "2": dist.group.WORLD})
    (ledger,) = find_ledgers(net)
    ledger.shared.is_late = late
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for step, x in enumerate(_inputs(rank)):
        if step == 1 and rank == 3:
            unclamp.switch(net[0], input=Dynamic())
        net(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_ranks_of_other_groups_are_told_too(late: bool) -> None:
    found = outcomes(4, _pairs, late, collective_s=20)
    assert all(isinstance(failed, Failure) for failed in found)
    assert [failed.kind for failed in found] == ["ConvertError"] * 4
    for failed in found[:2]:
        assert "some that share other layers differ" in failed.text
    for failed in found[2:]:
        assert "ranks 2 and 3 differ: rank 3 at 0 input has Dynamic" in failed.text


def _description(rank: int, updates: int) -> Description:
    return Description(rank=rank, updates=updates, sites={}, contents=[])


def test_of_two_ranks_neither_is_the_odd_one() -> None:
    two = difference([_description(0, 3), _description(1, 4)])
    assert "ranks 0 and 1 differ: rank 1 has made 4 updates, and rank 0 3" in two
    three = difference([_description(0, 4), _description(1, 3), _description(2, 3)])
    assert "differ:" not in three
    assert "rank 0 has made 4 updates, and rank 1 3" in three


# ---- the compiler ------------------------------------------------------------------------------


class _Around(nn.Module):
    """Something to compile on both sides of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.sin()).cos()


def _broken_graph(rank: int) -> tuple[int, bool]:
    """A product that shares its dynamic scale runs between two graphs."""
    warnings.simplefilter("ignore")  # of torch's compiler, of what it does itself
    net = _Around()
    unclamp.convert(net, Recipe.uniform(Dynamic(shared=True)), group=dist.group.WORLD)
    graphs: list[Any] = []

    def backend(graph: Any, _examples: Any) -> Any:
        graphs.append(graph)
        return graph

    x = _inputs(rank)[0]
    made = torch.compile(net, backend=backend)(x)
    return len(graphs), torch.equal(made, net(x))


def test_what_shares_breaks_a_graph() -> None:
    assert run_ranks(2, _broken_graph) == [(2, True)] * 2


def test_the_compiler_is_not_loaded_with_us() -> None:
    code = (
        "import sys; from unclamp import Recorder, convert; print('torch._dynamo' in sys.modules)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert made.stdout.strip() == "False", made.stderr
