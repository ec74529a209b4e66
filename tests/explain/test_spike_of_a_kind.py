"""A spike among several kinds of batches is explained from the level of its own kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import unclamp
from truths.curves import two_kinds
from truths.trainings import SPIKE, STEPS, Batch, Case, batch, explain, losses_with, record
from unclamp.analysis import find_spikes
from unclamp.explain import Snapshots, Training
from unclamp.explain.watch import SpikeWatch, kin_of, level_before
from unclamp.runlog import RunLog


@dataclass(frozen=True, kw_only=True)
class TwoKinds(Case):
    """Every fifth batch is "hard": its targets lie far from what the model says."""

    def batches(self) -> Iterator[Batch]:
        for number in range(STEPS):
            x, target, rate = batch(self, number)
            yield x, target + 3 if group_of(number) else target, rate


def group_of(step: int) -> str | None:
    return "hard" if step % 5 == 0 else None


def test_the_spike_is_counted_from_the_level_of_its_own_kind(tmp_path: Path) -> None:
    case = TwoKinds(seed=1)
    losses = record(case, tmp_path / "run", group_of=group_of)
    easy = [losses[n] for n in range(SPIKE) if group_of(n) is None]
    level = float(np.median(easy[-9:]))
    assert min(loss for n, loss in enumerate(losses[:SPIKE]) if group_of(n)) > 2 * level
    free = losses_with(case, case.culprits)[SPIKE]
    gone = (losses[SPIKE] - free) / (losses[SPIKE] - min(free, level))
    found = explain(case, tmp_path / "run")
    assert found.reproduced
    assert (found.onset, found.level) == (SPIKE, pytest.approx(level))
    assert found.verdict == "clamping"
    assert found.named == case.culprits
    assert found.clamping_share == pytest.approx(gone, abs=0.1)
    assert "It is a spike among batches without a group: its level is that of" in found.words()


def test_snapshots_and_recorder_take_a_number_for_a_kind_alike(tmp_path: Path) -> None:
    def number_of(step: int) -> int:
        return int(step % 5 == 0)

    record(TwoKinds(seed=1), tmp_path / "run", group_of=number_of)
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["group"].to_pylist() == [str(number_of(n)) for n in range(STEPS)]


def test_the_level_is_the_median_of_the_last_calm_losses_of_the_kind() -> None:
    losses, groups = two_kinds(4)
    losses[[1100, 1160]] *= 3
    of_kind = [n for n in range(0, 1160, 20) if n != 1100]
    expected = float(np.median([losses[n] for n in of_kind[-9:]]))
    found = level_before(list(range(2000)), losses.tolist(), 1160, groups)
    assert found == pytest.approx(expected)


def test_spikes_heard_as_they_come_are_those_found_afterwards() -> None:
    losses, groups = two_kinds(6)
    losses[[700, 701, 1000, 1333, 1660]] *= 1.8
    watch, onsets = SpikeWatch(), []
    for step, (loss, group) in enumerate(zip(losses.tolist(), groups, strict=True)):
        watch.name(step, group)
        onset = watch.hear(step, loss)
        onsets += [] if onset is None else [onset]
    found = find_spikes(losses, groups=groups)
    assert onsets == [spike.onset for spike in found]
    assert {(s.onset, s.group) for s in found} >= {(1000, "answers"), (1333, None)}
    spike = watch.spike_at(1000)
    assert (
        watch.kin_of(spike) == kin_of(spike.group, range(2000), groups) == set(range(0, 2000, 20))
    )
    watch.forget_from(1000)
    for step in range(1000, 2000):
        watch.name(step, groups[step])
        onset = watch.hear(step, float(losses[step]))
        assert (onset is not None) == (step in onsets)


def test_steps_of_other_kinds_within_the_spike_do_not_count(tmp_path: Path) -> None:
    losses, groups = two_kinds(2, every=4)
    losses[1000:1012:4] *= 2
    (spike,) = [s for s in find_spikes(losses, groups=groups) if s.onset == 1000]
    kin = kin_of(spike.group, range(2000), groups)
    assert kin is not None
    assert [n for n in range(spike.onset, spike.end + 1) if n in kin][:3] == [1000, 1004, 1008]
    assert kin_of(spike.group, range(2000), [None] * 2000) is None


class Told:
    """A recorder that has just recorded each step with its group."""

    def __init__(self, groups: list[str | None]) -> None:
        self.groups = groups
        self.events: list[tuple[str, int | None]] = []

    def group_of(self, step: int) -> str | None:
        return self.groups[step]

    def event(self, kind: str, step: int | None = None, **data: object) -> None:
        self.events.append((kind, step))


def test_snapshots_take_the_group_that_the_recorder_was_given(tmp_path: Path) -> None:
    """A group given to the recorder alone must not make every other kind's batch a spike."""
    losses, groups = two_kinds(3, steps=200)
    model = torch.nn.Linear(2, 2)
    training = Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    recorder = Told(groups)
    with Snapshots(training, tmp_path / "run", recorder=recorder, every=10) as snapshots:
        for step, loss in enumerate(losses):
            snapshots.before(step, torch.zeros(1))
            snapshots.after(step, float(loss))
    assert [step for kind, step in recorder.events if kind == "snapshot"] == []
    assert recorder.group_of(20) == "answers"


def test_a_recorder_knows_the_group_of_its_latest_step(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    unclamp.convert(model, unclamp.Recipe())
    with unclamp.Recorder(model, tmp_path / "run") as recorder:
        recorder.step(4, loss=1.0, group="answers")
        assert recorder.group_of(4) == "answers"
        assert recorder.group_of(3) is None
        recorder.step(5, loss=1.0)
        assert recorder.group_of(5) is None
