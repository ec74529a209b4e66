"""Updates in a CUDA graph: the logic, on a CPU; `bench/gpu.py` replays a real one."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)

from unclamp.names import ROLES
from unclamp.nn import Ledger, Site, convert, find_ledgers
from unclamp.nn.update import Update
from unclamp.numerics import Stat
from unclamp.recipe import Recipe
from unclamp.scaling import Delayed, PerRow, Static

INPUT = 0


def made() -> tuple[nn.Linear, Ledger, list[Update]]:
    layer = nn.Linear(4, 3)
    convert(layer, Recipe.uniform(Delayed(history_len=4)))
    ledger = find_ledgers(layer)[0]
    heard: list[Update] = []
    ledger.subscribe(heard.append)
    return layer, ledger, heard


def replay(layer: nn.Linear, ledger: Ledger, amax: float) -> None:
    """Do to the device what a replay of a captured step does, and call no listener."""
    layer(torch.full((2, 4), amax)).sum().backward()
    ledger.update(captured=True)


def test_a_captured_update_fills_histories_and_scales():
    layer, ledger, _ = made()
    for amax in (1.0, 4.0, 2.0):
        replay(layer, ledger, amax)
    assert ledger.amax_history[INPUT].tolist() == [2.0, 4.0, 1.0, 0.0]
    assert ledger.scale[INPUT] == 112
    assert not ledger.has_pending


def test_listeners_hear_of_a_replay_when_the_recorder_asks():
    layer, ledger, heard = made()
    replay(layer, ledger, 3.0)
    assert heard == []
    ledger.replayed()
    replay(layer, ledger, 5.0)
    ledger.replayed()
    assert [float(update.stats[INPUT, Stat.AMAX]) for update in heard] == [3.0, 5.0]


def test_replays_write_into_the_same_tensors():
    layer, ledger, _ = made()
    replay(layer, ledger, 3.0)
    first = ledger.captured._seen[None]
    replay(layer, ledger, 5.0)
    second = ledger.captured._seen[None]
    assert second[0] is first[0]


def test_two_updates_in_one_graph_are_heard_each_and_count_as_one_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    convert(model, Recipe.uniform(Delayed(history_len=4)))
    (ledger,) = find_ledgers(model)
    heard: list[Update] = []
    ledger.subscribe(heard.append)
    for amax in (1.0, 2.0):
        model(torch.full((2, 4), amax)).sum().backward()
        for product in (0, 1):  # each optimizer's
            ledger.update(frozenset({product}), captured=True)
        ledger.replayed()
    assert [update.stats[:, Stat.CASTS].tolist() for update in heard] == [
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
    ] * 2
    assert ledger.amax_history[0, :2].tolist() == [2.0, 1.0]
    assert ledger.count() == 2


def test_no_number_is_looked_at_where_weights_have_no_data():
    _, ledger, _ = made()
    with FakeTensorMode():
        weight = nn.Linear(4, 3).weight
        for _ in range(6):
            ledger.clock.unseen.look(0, weight, ledger)


def test_replays_are_counted_on_the_device_and_saved():
    layer, ledger, _ = made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    for _ in range(2):
        replay(layer, ledger, 1.0)
    assert ledger.updates == 1
    assert layer.state_dict()["unclamp_updates"] == 3
    other, twin, _ = made()
    replay(other, twin, 1.0)
    other.load_state_dict(layer.state_dict())
    assert twin.count() == 3


def test_an_optimizer_outside_of_the_graph_updates_though_nothing_seems_pending():
    layer, ledger, heard = made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    ledger.captured.is_in_graph = True  # as a commit that is captured leaves it
    ledger.pending[INPUT, Stat.AMAX] = 7.0
    ledger._mark(pending=False)  # a replay raises no version
    optimizer.step()
    assert len(heard) == 1
    assert ledger.amax_history[INPUT, 0] == 7.0
    optimizer.step()  # nothing pending: nothing enters a history
    assert ledger.amax_history[INPUT].tolist() == [7.0, 0.0, 0.0, 0.0]


def test_without_a_graph_nothing_is_replayed():
    layer, ledger, heard = made()
    layer(torch.ones(2, 4)).sum().backward()
    ledger.replayed()
    assert heard == []
    assert ledger.count() == 0


@pytest.mark.parametrize("length", [16, 1024])
def test_an_update_looks_at_no_number(length: int):
    """Tensors without data stand in for a device's: a look at one would raise."""
    delayed = Delayed(history_len=length)
    by_row = Delayed(
        history_len=length,
        granularity=PerRow(),
        power_of_two=True,
        reduce=lambda history: history.amax(1),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        ledger = Ledger()
        operands = Recipe(input=Static(scale=2.0), weight=by_row, grad_output=delayed).plan("")
        ledger.add(
            [
                Site.of("", role, operands.operands[role], shape=(8, 4) if role == "weight" else ())
                for role in ROLES
            ]
        )
        ledger.inspect("always")
        assert ledger.details is not None
        for captured in (True, False):
            ledger.details.add_(1)
            ledger.pending.add_(1)
            ledger.update(captured=captured)
            assert not ledger.has_pending
        assert isinstance(ledger.scale, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            ledger.scale[0].item()
