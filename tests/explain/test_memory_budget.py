"""Little memory for snapshots: what lies before a spike is kept, or its loss is told."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unclamp.errors import UnclampWarning
from unclamp.explain import Snapshots, Training
from unclamp.explain.ring import GIB
from unclamp.explain.store import find_snapshots, read_facts, read_snapshot
from unclamp.explain.training import size_bytes, take_state

BATCH = torch.zeros(4)


class Events:
    """A list of events, as a recorder takes them."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | None, dict[str, Any]]] = []

    def event(self, kind: str, step: int | None = None, **data: Any) -> None:
        self.told.append((kind, step, data))

    def of(self, kind: str) -> list[tuple[int | None, dict[str, Any]]]:
        return [(step, data) for told, step, data in self.told if told == kind]


class StepLater:
    """Hands over each loss a step later, as losses on a GPU are."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, float]] = []

    def put(self, step: int, loss: float) -> list[tuple[int, float]]:
        ready, self._waiting = self._waiting, [(step, loss)]
        return ready

    def rest(self) -> list[tuple[int, float]]:
        ready, self._waiting = self._waiting, []
        return ready


def train(
    run: Path,
    *,
    states: float,
    spikes: tuple[int, ...] = (),
    steps: int = 70,
    batch: torch.Tensor = BATCH,
    **options: Any,
) -> Events:
    """Follow a training whose weight counts its steps, with memory for so many states."""
    model = nn.Linear(200, 200)
    nn.init.zeros_(model.weight)
    training = Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0))
    events = Events()
    budget = states * size_bytes(take_state(training)) / GIB
    with Snapshots(training, run, budget_gib=budget, recorder=events, **options) as snapshots:
        for n in range(steps):
            snapshots.before(n, batch)
            model.weight.data += 1
            snapshots.after(n, 1.0 + 0.01 * (n % 3) + (5 if n in spikes else 0))
    return events


def written(run: Path) -> list[tuple[int, int]]:
    facts = [read_facts(path) for path in find_snapshots(run)]
    return sorted((one["step"], one["last_step"]) for one in facts)


def test_a_spike_s_start_outlives_the_next_state_that_does_not_fit_beside_it(
    tmp_path: Path,
) -> None:
    # States before steps 0, 10, ..., one at a time: that of 50 is due before 45 + 8 is over.
    events = train(tmp_path, states=1.5, spikes=(45, 46))
    assert written(tmp_path) == [(40, 53)]
    (path,) = find_snapshots(tmp_path)
    snapshot = read_snapshot(path)
    assert snapshot.state["model"]["weight"].unique().tolist() == [40.0]
    assert list(snapshot.batches) == list(range(40, 54))
    assert [step for step, _ in events.of("snapshot")] == [40]


def test_a_state_that_did_not_fit_is_taken_once_the_spike_is_written(tmp_path: Path) -> None:
    # That of 50 is taken before 54, and no other is due before the spike at 58.
    train(tmp_path, states=1.5, spikes=(45, 58), steps=75)
    assert written(tmp_path) == [(40, 53), (54, 66)]


def test_batches_do_not_push_a_spike_s_start_out(tmp_path: Path) -> None:
    # Each batch is a tenth of a state. That of 50 fits beside that of 40 and ten batches, with
    # eleven and more it does not.
    size = 200 * 201 * 4
    train(tmp_path, states=3.05, spikes=(48,), batch=torch.zeros(size // 40))
    assert (40, 56) in written(tmp_path)


def test_a_spike_whose_states_are_gone_is_told_and_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loss of step 49 is heard after the state of 50 was taken, in place of that of 40.
    monkeypatch.setattr("unclamp.explain.snapshots.LateLoss", StepLater)
    with pytest.warns(UnclampWarning, match="spike at step 49 has no snapshot") as caught:
        events = train(tmp_path, states=1.5, spikes=(49, 89), steps=110)
    assert sum("has no snapshot" in str(one.message) for one in caught) == 1
    assert written(tmp_path) == []
    lost = [(step, data) for step, data in events.of("snapshot") if "error" in data]
    assert [step for step, _ in lost] == [49, 89]
    assert "raise budget_gib" in lost[0][1]["error"]


def test_no_warning_where_memory_suffices(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events = train(tmp_path, states=20, spikes=(45,))
    assert (40, 53) in written(tmp_path)
    assert not [data for _, data in events.of("snapshot") if "error" in data]


def test_with_all_written_each_is_whole_and_those_without_room_are_left_out(
    tmp_path: Path,
) -> None:
    # Each is complete 18 steps later and makes room for the next: 0 at 18, so the next is at 19.
    train(tmp_path, states=1.5, write="all")
    assert written(tmp_path) == [(0, 18), (19, 37), (38, 56), (57, 69)]
