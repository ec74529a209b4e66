"""The same steps again: bit for bit without a change, and otherwise only where it clamps."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import unclamp
from truths.trainings import SPIKE, Case, explain, record
from unclamp.errors import ReplayError
from unclamp.explain import Snapshots, explain_spike
from unclamp.explain.replay import Replay, same_losses
from unclamp.explain.screening import Screening, free_gradients
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.store import FACTS_FILE, find_snapshots, read_snapshot
from unclamp.names import SiteName
from unclamp.policy import unclamped
from unclamp.scaling import Delayed, Dynamic, Guarded, HighPrecision, Static


def replay(case: Case, run: Path) -> tuple[Replay, Snapshot]:
    record(case, run)
    snapshot = read_snapshot(find_snapshots(run)[-1])
    return Replay(case.build(), case.step, snapshot), snapshot


@pytest.mark.parametrize("case", [Case(dropout=0.2), Case(paths=((1.0, 1.0),))])
def test_losses_come_back_bit_for_bit_after_any_counterfactual(case: Case, tmp_path: Path) -> None:
    again, snapshot = replay(case, tmp_path / "run")
    assert snapshot.losses[SPIKE] > 2
    free = {key: unclamped(again.original(key)) for key in again.sites}
    for changes in ({}, free, {key: HighPrecision() for key in again.sites}, {}):
        trace = again.run({k: s for k, s in changes.items() if s}, last=snapshot.last_step)
        if not changes:
            assert trace.losses == snapshot.losses
        else:
            assert trace.losses[SPIKE] < 0.9 * snapshot.losses[SPIKE]


def test_un_clamping_who_does_not_clamp_changes_no_bit(tmp_path: Path) -> None:
    again, snapshot = replay(Case(), tmp_path / "run")
    plain = again.run({}, last=snapshot.last_step)
    idle = [key for key in again.sites if key not in plain.sites]
    assert len(idle) >= 8
    free = {key: Guarded(history_len=16, margin=0) for key in idle}
    assert again.run(free, last=snapshot.last_step).losses == snapshot.losses


def test_a_replay_leaves_random_generators_and_threads_alone(tmp_path: Path) -> None:
    again, snapshot = replay(Case(dropout=0.2), tmp_path / "run")
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again.run({}, last=snapshot.last_step)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_clamp_downstream_of_a_clamp_is_found(tmp_path: Path) -> None:
    """It never clamps while the one before it does: the guarded twin counts that it would."""
    again, _ = replay(Case(paths=((1.0, 1.0),)), tmp_path / "run")
    hidden = SiteName("paths.0.2", "input")
    plain = again.run({}, last=SPIKE).sites
    assert hidden not in plain or plain[hidden].overshoot < 2
    free = {key: unclamped(again.original(key)) for key in again.sites}
    assert again.run({k: s for k, s in free.items() if s}, last=SPIKE).sites[hidden].would_clamp


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Delayed(history_len=5, margin=2), Guarded(history_len=5, margin=2)),
        (Delayed(power_of_two=True), Guarded(history_len=16, margin=0, power_of_two=True)),
        (Static(scale=2.0), Dynamic()),
        (Dynamic(), None),
        (Guarded(), None),
        (HighPrecision(), None),
    ],
)
def test_un_clamped_is_the_smallest_change(before: Any, after: Any) -> None:
    assert unclamped(before) == after


def test_switches_before_the_snapshot_are_replayed(tmp_path: Path) -> None:
    case, training = Case(seed=3), Case(seed=3).build()
    with (
        unclamp.Recorder(training.model, tmp_path / "run") as recorder,
        Snapshots(training, tmp_path / "run", every=5, after=2) as snapshots,
    ):
        for n, batch in snapshots.follow(case.batches()):
            if n == 7:
                unclamp.switch(training.model, "paths.1.*", scaling=Dynamic())
            loss = case.step(training, batch)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)
    found = explain(case, tmp_path / "run")
    assert found.reproduced
    assert found.named == case.culprits


def test_screening_is_the_first_order_effect(tmp_path: Path) -> None:
    """Against a finite difference: the clamped part is given back by a hair."""
    case = Case(paths=((1.0,), (1.0,)), parts=(1.0, 0.5), size=24.0)
    again, snapshot = replay(case, tmp_path / "run")
    screening = Screening(again.training.model)
    free = free_gradients(again)
    watched = again.run(free, last=SPIKE, watching=screening.watching)
    assert watched.losses[SPIKE] == pytest.approx(snapshot.losses[SPIKE], rel=1e-3)
    first, second = (screening.effects[site] for site in case.culprits)
    assert first < 0
    assert 2 < first / second < 8  # the outputs are 1 and 0.5, the loss is quadratic
    decoy = screening.effects[SiteName("paths.2.1", "input")]
    assert decoy == 0
    rise = snapshot.losses[SPIKE] - snapshot.losses[SPIKE - 1]
    # A quadratic falls at first twice as fast as on average.
    assert first + second == pytest.approx(-2 * rise, rel=0.1)


# ---- what is missing, in one sentence --------------------------------------------------------


def break_nothing(run: Path) -> None:
    pass


def drop_snapshots(run: Path) -> None:
    shutil.rmtree(run / "snapshots")


def change_facts(run: Path, **changes: object) -> None:
    *_, path = find_snapshots(run)
    facts = json.loads((path / FACTS_FILE).read_text())
    (path / FACTS_FILE).write_text(json.dumps(facts | changes))


def change_recipe(run: Path) -> None:
    change_facts(run, recipe=unclamp.Recipe.uniform(Dynamic()).to_dict())


def change_format(run: Path) -> None:
    *_, path = find_snapshots(run)
    sites = json.loads((path / FACTS_FILE).read_text())["sites"]
    sites[0]["format"] = "e5m2"
    change_facts(run, sites=sites)


def change_version(run: Path) -> None:
    change_facts(run, schema_version=99, unclamp_version="9.0")


def damage(run: Path) -> None:
    *_, path = find_snapshots(run)
    (path / "skeleton.pt").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("case", "break_it", "spike", "message"),
    [
        (
            Case(),
            drop_snapshots,
            None,
            "holds no snapshots, so nothing can be replayed: train with",
        ),
        (Case(paths=()), break_nothing, None, "has no spike, so there is nothing to explain"),
        (Case(), break_nothing, 2, "got 2; it has 1 at step 34"),
        (Case(), change_recipe, None, "under another recipe than the build function uses"),
        (Case(), change_format, None, "another model or recipe: it differs in the FP8 operand"),
        (Case(), change_version, None, r"written by unclamp 9\.0"),
        (Case(), damage, None, "is damaged"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(
    case: Case,
    break_it: Callable[[Path], None],
    spike: int | None,
    message: str,
    tmp_path: Path,
) -> None:
    record(case, tmp_path / "run")
    break_it(tmp_path / "run")
    with pytest.raises(ReplayError, match=message) as raised:
        explain_spike(tmp_path / "run", spike, build=partial(case.build), step=case.step)
    assert "\n" not in str(raised.value)


def test_a_step_function_that_returns_nothing_is_told_to_return_its_loss(tmp_path: Path) -> None:
    case = Case()
    record(case, tmp_path / "run")

    def step(training: unclamp.Training, batch: object) -> None:
        case.step(training, batch)  # pyright: ignore[reportArgumentType]

    with pytest.raises(ReplayError, match="got None; end the step function with `return loss`"):
        explain_spike(tmp_path / "run", build=partial(case.build), step=step)


def test_functions_that_no_other_process_can_find_have_to_be_given(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    with pytest.raises(ReplayError, match="name it with --build MODULE:FUNCTION"):
        explain_spike(tmp_path / "run")
    with pytest.raises(ReplayError, match=r"cannot find the build function 'no\.where:f'"):
        explain_spike(tmp_path / "run", build="no.where:f", step="truths.trainings:step")
    with pytest.raises(ReplayError, match="expected MODULE:FUNCTION for the build"):
        explain_spike(tmp_path / "run", build="nowhere", step="truths.trainings:step")


def test_another_model_is_refused(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    with pytest.raises(ReplayError, match="another model or recipe"):
        explain(Case(paths=((1.0, 1.0),)), tmp_path / "run")


def test_missing_batches_are_refused(tmp_path: Path) -> None:
    again, snapshot = replay(Case(), tmp_path / "run")
    with pytest.raises(ReplayError, match="lacks the batch of step 38: keep more steps"):
        again.run({}, last=snapshot.last_step + 1)


def test_a_spike_before_all_snapshots_says_what_there_is(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run", keep=1)
    *_, path = find_snapshots(tmp_path / "run")
    change_facts(tmp_path / "run", step=36)
    with pytest.raises(ReplayError, match="has the state and batches of steps 36 to 37"):
        explain(Case(), tmp_path / "run")
    assert path.exists()


def loud_step(training: Any, batch: Any) -> torch.Tensor:
    return 2 * Case().step(training, batch)


def quiet_step(training: Any, batch: Any) -> torch.Tensor:
    # Another comment.
    return Case().step(training, batch)


def test_code_that_changed_since_is_refused_unless_told(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run", build=Case().build, step=quiet_step)
    with pytest.raises(ReplayError, match="step function has changed since"):
        explain_spike(tmp_path / "run", build=Case().build, step=loud_step)
    found = explain_spike(tmp_path / "run", build=Case().build, step=quiet_step)
    assert found.reproduced


def test_a_step_that_is_not_deterministic_is_named_and_not_attributed(tmp_path: Path) -> None:
    case = Case(deterministic=False)
    record(case, tmp_path / "run")
    found = explain(case, tmp_path / "run")
    assert (found.verdict, found.reproduced) == ("not reproduced", False)
    assert found.sites == ()
    assert found.replays == 2
    words = found.words()
    assert "the step function is not deterministic" in words
    assert "The loss of step 30 was" in words
    told = explain(case, tmp_path / "run", anyway=True)
    assert told.reproduced is False
    assert told.named == case.culprits


def test_what_differs_of_the_machine_is_said(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    *_, path = find_snapshots(tmp_path / "run")
    losses = json.loads((path / FACTS_FILE).read_text())["losses"]
    losses["31"] = (float.fromhex(losses["31"]) + 1e-7).hex()
    change_facts(tmp_path / "run", losses=losses, torch="1.0")
    found = explain(Case(), tmp_path / "run")
    assert found.reproduced is False
    assert "The loss of step 31 was" in found.differences[0]
    assert "Two replays agree with each other" in found.differences[1]
    assert f"torch 1.0 then, {torch.__version__} now" in found.differences[2]


def test_losses_that_are_no_number_are_alike() -> None:
    nan = float("nan")
    assert same_losses({1: nan, 2: 1.0}, {1: nan, 2: 1.0})
    assert not same_losses({1: nan}, {1: 1.0})
    assert not same_losses({1: 1.0}, {1: 1.0 + 2e-16 * 2})
