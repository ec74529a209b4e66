"""States taken before steps: whole, bit for bit, within a budget, and on disk around spikes."""

import json
import os
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import unclamp
from patience import PATIENCE_S
from truths.trainings import SPIKE, STEPS, Case, record
from unclamp.errors import ReplayError, UnclampWarning
from unclamp.explain import Snapshots, Training
from unclamp.explain.chain import earlier_snapshots
from unclamp.explain.ring import Ring
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.store import find_snapshots, read_facts, read_snapshot, write_snapshot
from unclamp.explain.training import Batch, put_state, size_bytes, take_state


def assert_same(one: object, other: object) -> None:
    """Assert that two trees are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def trained(case: Case, steps: int) -> Training:
    training = case.build()
    for n, batch in enumerate(case.batches()):
        if n == steps:
            break
        case.step(training, batch)
    return training


def test_a_state_goes_through_the_disk_and_back_bit_for_bit(tmp_path: Path) -> None:
    case = Case(paths=((1.0, 1.0),), dropout=0.2)
    training = trained(case, 6)
    _ = random.random(), np.random.normal(), torch.rand(3)
    state = take_state(training)
    snapshot = Snapshot(step=6, state=state, facts={}, batches={6: Batch.of({"x": torch.ones(2)})})
    back = read_snapshot(write_snapshot(tmp_path, snapshot))
    assert_same(state, back.state)
    other = case.build()
    put_state(other, back.state)
    assert_same(state, take_state(other))


def test_random_generators_come_back(tmp_path: Path) -> None:
    training = trained(Case(), 2)
    state = take_state(training)

    def draw() -> list[float]:
        return [random.random(), np.random.normal(), torch.rand(()).item(), random.gauss(0, 1)]

    first = draw()
    put_state(training, state)
    assert draw() == first


def test_later_steps_change_nothing_in_a_state() -> None:
    case = Case()
    training = trained(case, 4)
    state = take_state(training)
    kept = take_state(training)
    for batch in case.batches():
        case.step(training, batch)
    assert_same(kept, state)
    put_state(training, state)
    for batch in case.batches():
        case.step(training, batch)
    assert_same(kept, state)


def test_pending_statistics_of_a_skipped_step_are_part_of_the_state() -> None:
    training = trained(Case(), 3)
    training.model(100 * torch.randn(4, 32)).sum().backward()  # no optimizer step, as a scaler does
    state = take_state(training)
    other = Case().build()
    put_state(other, state)
    assert_same(state, take_state(other))
    assert state["pending"][0] is not None


def test_all_dtypes_and_shapes_go_through_the_disk(tmp_path: Path) -> None:
    tree = {
        "float8": torch.randn(5).to(torch.float8_e4m3fn).view(torch.uint8),
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flag": torch.tensor(True),
        "transposed": torch.arange(6).view(2, 3).t(),
        "array": np.arange(3, dtype=np.int32),
        "numbers": [1, 2.5, None, "text", (True, b"bytes"), float("inf")],
        3: {"nested": torch.ones(1)},
    }
    snapshot = Snapshot(step=0, state={}, facts={}, batches={0: Batch.of(tree)})
    back = read_snapshot(write_snapshot(tmp_path, snapshot)).batches[0].tree
    assert isinstance(back["array"], np.ndarray)
    assert back["array"].tolist() == [0, 1, 2]
    assert_same({k: v for k, v in tree.items() if k != "array"},
                {k: v for k, v in back.items() if k != "array"})  # fmt: skip


def test_what_cannot_be_kept_is_named() -> None:
    training = Case().build()
    snapshots = Snapshots(training, "unused")
    with pytest.raises(ReplayError, match="a batch, 'x', got object"):
        snapshots.before(0, {"x": object()})


def test_a_spike_is_kept_with_the_batches_around_it(tmp_path: Path) -> None:
    losses = record(Case(), tmp_path / "run")
    *_, path = find_snapshots(tmp_path / "run")
    snapshot = read_snapshot(path)
    assert (snapshot.step, snapshot.last_step) == (30, SPIKE + 3)
    assert snapshot.losses == {n: losses[n] for n in range(30, SPIKE + 4)}
    with unclamp.RunLog.open(tmp_path / "run") as log:
        events = log.events().to_pylist()
    assert [(e["kind"], e["step"]) for e in events] == [("snapshot", 30), ("spike", SPIKE)]
    assert json.loads(events[0]["data"])["older"] == [20]


def test_older_states_have_the_batches_up_to_the_next_and_lead_to_the_spike(tmp_path: Path) -> None:
    losses = record(Case(), tmp_path / "run", keep=4)
    found = find_snapshots(tmp_path / "run")
    facts = [read_facts(path) for path in found]
    assert [(f["step"], f["last_step"]) for f in facts] == [(0, 19), (20, 29), (30, SPIKE + 3)]
    older = list(earlier_snapshots(found, read_snapshot(found[-1])))
    assert [snapshot.step for snapshot in older] == [20, 0]
    for snapshot in older:
        assert snapshot.losses == {n: losses[n] for n in range(snapshot.step, SPIKE + 4)}
        assert snapshot.last_step == SPIKE + 3


def test_snapshots_do_not_lead_over_a_gap_or_along_another_way(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run", keep=4)
    first, second, latest = find_snapshots(tmp_path / "run")
    spike = read_snapshot(latest)
    assert list(earlier_snapshots([first, latest], spike)) == []  # steps 20 to 29 are missing
    long = read_snapshot(second)
    other = replace(
        long,
        batches={**long.batches, 30: spike.batches[30]},
        losses={**long.losses, 30: spike.losses[30] + 1e-6},
    )
    gone_another_way = write_snapshot(tmp_path / "other", other)
    assert list(earlier_snapshots([first, gone_another_way, latest], spike)) == []


def test_the_disk_budget_is_for_older_states_and_says_what_it_left_out(tmp_path: Path) -> None:
    state = size_bytes(take_state(trained(Case(), 30)))
    batch = size_bytes(next(Case().batches()))
    one = (2.5 * state + (8 + 10 + 1) * batch) / 2**30  # the last, with 8 batches, and one with 10
    for name, budget, steps in (("none", 0.0, [30]), ("one", one, [20, 30])):
        record(Case(), tmp_path / name, keep=4, disk_gib=budget)
        assert [read_facts(p)["step"] for p in find_snapshots(tmp_path / name)] == steps
        with unclamp.RunLog.open(tmp_path / name) as log:
            data = json.loads(log.events().to_pylist()[0]["data"])
        assert data["older"] == steps[:-1]
        assert data["left_out"] == [n for n in (20, 0) if n not in steps]


def test_a_run_without_a_spike_writes_nothing(tmp_path: Path) -> None:
    record(Case(paths=(), decoys=1), tmp_path / "run")
    assert not (tmp_path / "run" / "snapshots").exists()


def test_a_spike_in_the_last_step_is_kept_at_the_end(tmp_path: Path) -> None:
    case, training = Case(), Case().build()
    with Snapshots(training, tmp_path, every=5) as snapshots:
        for n, batch in snapshots.follow(case.batches()):
            snapshots.after(n, case.step(training, batch))
            if n == SPIKE:
                break
    *_, path = find_snapshots(tmp_path)
    assert read_facts(path)["last_step"] == SPIKE


def test_all_snapshots_are_written_where_asked(tmp_path: Path) -> None:
    record(Case(paths=()), tmp_path / "run", write="all", every=10, after=2)
    found = [read_facts(path) for path in find_snapshots(tmp_path / "run")]
    assert [(f["step"], f["last_step"]) for f in found] == [
        (0, 12),
        (10, 22),
        (20, 32),
        (30, STEPS - 1),
    ]


def test_taking_snapshots_changes_no_loss(tmp_path: Path) -> None:
    case = Case(dropout=0.3)
    training = case.build()
    plain = [case.step(training, batch).item() for batch in case.batches()]
    assert record(case, tmp_path / "run", every=2) == plain


def test_a_budget_too_small_for_one_snapshot_says_how_much_is_needed() -> None:
    training = Case().build()
    needed = size_bytes(take_state(training))
    snapshots = Snapshots(training, "unused", budget_gib=1e-6)
    with pytest.raises(ReplayError, match=f"takes {needed:,} bytes and the budget is 1,073"):
        snapshots.before(0, torch.ones(1))


def test_a_budget_for_fewer_snapshots_keeps_the_newest() -> None:
    training = Case().build()
    ring = Ring(keep=5, budget_bytes=2.5 * size_bytes(take_state(training)))
    for step in range(5):
        ring.take(step, training, {})
    assert ring.steps == [3, 4]


@pytest.mark.parametrize("keep", [1, 2, 3, 6])
def test_states_are_held_at_growing_distances(keep: int) -> None:
    model = nn.Linear(1, 1)
    training = Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    ring = Ring(keep=keep, budget_bytes=1e9)
    for n in range(100):
        ring.take(10 * n, training, {})
        ring.add_batch(10 * n, torch.ones(1))
        ages = [(10 * n - step) // 10 for step in reversed(ring.steps)]
        assert len(ages) <= keep
        assert ages[:2] == [0, 1][: min(keep, n + 1)]
        # For each distance of 1, 2, 4, ... there is a state from there to less than twice as far.
        for level in range(keep - 1):
            assert 2**level > n or any(2**level <= age < 2 ** (level + 1) for age in ages)
        assert min(ring.batches_from(0)) == ring.steps[0]


def test_batches_count_towards_the_budget() -> None:
    training = Case().build()
    state = size_bytes(take_state(training))
    ring = Ring(keep=4, budget_bytes=3.5 * state)
    batch = torch.zeros(state // 16)  # a quarter of a state
    for step in range(12):
        if step % 4 == 0:
            ring.take(step, training, {})
        ring.add_batch(step, batch)
        assert ring.size <= 3.5 * state
    assert ring.steps == [8]


def test_a_state_that_is_still_to_be_written_is_held(tmp_path: Path) -> None:
    record(Case(paths=()), tmp_path / "run", write="all", every=4, keep=2, after=9)
    found = [read_facts(path) for path in find_snapshots(tmp_path / "run")]
    assert [f["step"] for f in found] == list(range(0, STEPS, 4))
    assert [f["last_step"] for f in found] == [min(s + 13, STEPS - 1) for s in range(0, STEPS, 4)]


def test_a_half_written_snapshot_is_absent(tmp_path: Path) -> None:
    training = Case().build()
    state = {**take_state(training), "odd": object()}
    with pytest.raises(ReplayError, match="the state, 'odd', got object"):
        write_snapshot(tmp_path, Snapshot(step=0, state=state))
    assert list((tmp_path / "snapshots").glob("*")) == []
    part = tmp_path / "snapshots" / ".step-000000-to-000003.part"
    part.mkdir(parents=True)
    (part / "snapshot.json").write_text("{}")
    assert find_snapshots(tmp_path) == []


def test_a_disk_that_fails_is_a_warning_and_not_the_end_of_the_run(tmp_path: Path) -> None:
    case, training = Case(), Case().build()
    (tmp_path / "snapshots").write_text("in the way")
    snapshots = Snapshots(training, tmp_path, every=5)
    for n, batch in snapshots.follow(case.batches()):
        snapshots.after(n, case.step(training, batch))
    with pytest.warns(UnclampWarning, match="a snapshot was not kept"):
        snapshots.close()


def test_a_loop_that_forgets_a_call_is_told() -> None:
    case, training = Case(), Case().build()
    snapshots = Snapshots(training, "unused")
    with pytest.raises(ReplayError, match=r"call snapshots\.after\(0, loss\)"):
        for _ in snapshots.follow(case.batches()):
            pass
    with pytest.raises(ReplayError, match=r"call snapshots\.before\(7, batch\)"):
        snapshots.after(7, 1.0)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"after": -1}, {"every": 2.5}])
def test_a_number_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ReplayError, match="expected a whole number"):
        Snapshots(Case().build(), "unused", **wrong)  # pyright: ignore[reportArgumentType]


def test_a_training_that_does_not_fit_is_refused() -> None:
    state = take_state(Case().build())
    other = Case(paths=((1.0, 1.0),)).build()
    with pytest.raises(ReplayError, match="its state does not fit"):
        put_state(other, state)
    model = Case().build()
    without = Training(model=model.model, optimizer=model.optimizer)
    with pytest.raises(ReplayError, match="parts of the snapshot"):
        put_state(without, state)


def test_a_plain_model_has_snapshots_too(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    training = Training(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    state = take_state(training)
    with torch.no_grad():
        model.weight.zero_()
    put_state(training, state)
    assert model.weight.abs().sum() > 0


def test_functions_of_a_module_are_named_and_others_are_not(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run", build=partial(Case().build))
    *_, path = find_snapshots(tmp_path / "run")
    assert read_facts(path)["build"] is None


def test_a_program_that_forgets_to_close_ends_and_has_the_snapshot(tmp_path: Path) -> None:
    code = f"""
        from truths.trainings import Case, Snapshots

        case = Case()
        training = case.build()
        snapshots = Snapshots(training, {str(tmp_path)!r}, every=5, after=1)
        for n, batch in snapshots.follow(case.batches()):
            snapshots.after(n, case.step(training, batch))
    """
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths},
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0
    *_, path = find_snapshots(tmp_path)
    assert read_snapshot(path).last_step == SPIKE + 1


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "got None; end the step function with `return loss`"),
        (torch.ones(2), r"got a tensor of shape \[2\]"),
        ("0.5", "got '0.5'"),
        (True, "got True"),
    ],
)
def test_a_loss_that_is_no_number_is_refused_at_its_step(
    loss: object, message: str, tmp_path: Path
) -> None:
    training = trained(Case(), 1)
    with Snapshots(training, tmp_path) as snapshots:
        snapshots.before(0, torch.ones(1))
        with pytest.raises(ReplayError, match=message):
            snapshots.after(0, loss)  # pyright: ignore[reportArgumentType]
        numbers: tuple[Any, ...] = (1, 0.5, np.float32(2), torch.tensor([1.5]))
        for step, number in enumerate(numbers, start=1):
            snapshots.before(step, torch.ones(1))
            snapshots.after(step, number)


def test_snapshots_go_where_the_recorder_numbered_the_run(tmp_path: Path) -> None:
    for number in (1, 2):
        record(Case(), tmp_path / "run-{n}")
        found = find_snapshots(tmp_path / f"run-{number}")
        assert [read_facts(path)["step"] for path in found] == [20, 30]
    with pytest.raises(ReplayError, match=r"a recorder chooses the number.*recorder\.path"):
        Snapshots(Case().build(), tmp_path / "run-{n}")


def test_a_run_that_is_replaced_leaves_none_of_its_snapshots(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    assert find_snapshots(tmp_path / "run") != []
    unclamp.Recorder(Case().build().model, tmp_path / "run", overwrite=True).close()
    assert find_snapshots(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"write": "al"}, "did you mean 'all'"), ({"on_spike": "explian"}, "did you mean 'explain'")],
)
def test_a_misspelt_setting_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        Snapshots(Case().build(), "unused", **wrong)
