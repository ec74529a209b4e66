"""What a spike is counted from: calm steps that lie in no other spike, and a level of any size."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from truths.delays import SPIKE, DelayCase, ShiftCase, TrainCase
from truths.levels import LevelCase, Reported
from truths.trainings import AnyCase, explain, losses_with, record
from unclamp import explain_spike
from unclamp.analysis import find_spikes
from unclamp.analysis.explanation import Explanation
from unclamp.analysis.horizon import Asked, Clamped, Horizon, clamped_before
from unclamp.explain import Limits
from unclamp.explain.backwards import Answer, Backwards
from unclamp.explain.chain import earlier_snapshots
from unclamp.explain.game import Game, Window
from unclamp.explain.investigate import investigate
from unclamp.explain.noise import Noise
from unclamp.explain.ranks import ALONE
from unclamp.explain.replay import Trace
from unclamp.explain.store import find_snapshots, read_facts, read_snapshot
from unclamp.explain.watch import SpikeWatch, calm_steps, level_before


def second(case: AnyCase, run: Path, **limits: Any) -> Explanation:
    return explain_spike(run, 2, build=case.build, step=case.step, limits=Limits(**limits))


# ---- calm steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [11, pytest.param(3, marks=pytest.mark.slow)])
def test_a_far_cause_behind_the_second_spike_of_a_train_is_named(seed: int, tmp_path: Path) -> None:
    """Seven of the nine steps before the second spike lie in the first."""
    case = TrainCase(seed=seed)
    losses = record(case, tmp_path / "run", every=4, keep=6)
    first, last = find_spikes(losses)
    assert (first.onset, first.end, last.onset) == (case.long[0], case.long[-1], SPIKE)
    calm = losses[SPIKE - 1]
    free = losses_with(case, case.culprits)  # by training anew
    assert losses[SPIKE] > 1.3 * calm
    assert all(free[n] < 1.1 * calm for n in (*case.long, SPIKE))
    found = second(case, tmp_path / "run")
    assert found.onset == SPIKE
    assert found.snapshot_step <= case.harm < case.long[0]
    assert found.verdict == "clamping"
    assert found.named == case.culprits
    assert found.clamping_share == pytest.approx(1.0, abs=0.1)


def test_a_loss_that_rose_for_good_is_a_level_of_its_own(tmp_path: Path) -> None:
    """To the detector the rise is one spike of 72 steps, and the new level from its 50th on."""
    case = ShiftCase()
    losses = record(case, tmp_path / "run", every=4, keep=6)
    assert [spike.onset for spike in find_spikes(losses)] == [case.risen, case.spike]
    level = losses[case.spike - 1]
    free = losses_with(case, case.culprits)  # by training anew
    assert losses[case.spike] > 1.4 * level > 2 * losses[case.risen - 1]
    assert free[case.spike] < 1.1 * level
    found = second(case, tmp_path / "run")
    assert found.level == pytest.approx(level, rel=0.05)
    assert found.verdict == "clamping"
    assert found.named == case.culprits
    assert found.clamping_share == pytest.approx(1.0, abs=0.1)


def test_steps_in_a_spike_are_not_calm_and_earlier_ones_take_their_place() -> None:
    losses = [1.0 + 0.01 * (n % 3) for n in range(70)]
    losses[50:58] = [2.0] * 8
    losses[60] = 3.0
    spikes = find_spikes(losses)
    assert calm_steps(range(60), spikes) == [*range(43, 50), 58, 59]
    assert calm_steps(range(54, 60), spikes) == [58, 59]
    assert calm_steps(range(54, 58), spikes) == []
    assert level_before(list(range(70)), losses, 60) == 1.01
    watch = SpikeWatch()
    for n, loss in enumerate(losses[:61]):
        watch.hear(n, loss)
    assert calm_steps(range(60), watch.spikes) == [*range(43, 50), 58, 59]
    assert watch.level_before(60) == 1.01


def planted_start(step: int, gone: float) -> Any:
    return SimpleNamespace(
        snapshot=SimpleNamespace(step=step, facts={"sites": []}),
        steps=100 - step,
        without_clamping=lambda: gone,
        noise=lambda: Noise(moved=(0.0, 0.0)),
        plain=lambda: None,
        comes_back=lambda plain: True,
    )


@pytest.mark.parametrize(
    ("older", "asked", "stop"),
    [
        ([80, 70], [90], "no calm step"),
        ([80, 40], [90, 40], "no older snapshot"),
        ([80, 40, 30], [90, 40, 30], "no older snapshot"),
    ],
)
def test_a_start_without_a_calm_step_is_passed_over(
    older: list[int], asked: list[int], stop: str
) -> None:
    """Steps 50 to 99 lie in a spike, so that nothing from 80 and 70 tells a part of the next."""
    backwards = Backwards(
        Answer(start=planted_start(90, 0.02), gone=0.02, noise=Noise(moved=(0.0, 0.0))),
        clamped_before=lambda step: Clamped(steps=9, last=step - 1, hardest=step - 1),
        begin=lambda snapshot: planted_start(snapshot.step, 0.01),
        on_answer=lambda horizon: None,
        is_measurable=lambda step: step < 50,
    )
    backwards.ask([planted_start(step, 0.01).snapshot for step in older])
    assert [each.step for each in backwards.horizon.asked] == asked
    assert backwards.horizon.stop == stop
    if stop == "no calm step":
        assert backwards.horizon.before() == (
            "Steps before 90 were not replayed: no step between an older snapshot and the spike is "
            "calm, so that a part of the spike is not told from a better training. The log shows "
            "clamped elements in 9 steps before, the last of them step 89, and the largest clamp "
            "error at step 89."
        )


def test_where_no_calm_step_is_left_the_answer_is_not_a_negative_one(tmp_path: Path) -> None:
    """All steps that older snapshots reach back to lie in another spike."""
    case = DelayCase(through="grad_output", delay=12, seed=3)
    losses = record(case, tmp_path / "run", every=4, keep=4)
    assert losses_with(case, case.culprits)[SPIKE] < 0.8 * losses[SPIKE]  # clamping is the cause
    (spike,) = find_spikes(losses)
    before = replace(spike, onset=24, peak=24, end=SPIKE - 1, recovery=None)
    paths = find_snapshots(tmp_path / "run")
    assert min(read_facts(path)["step"] for path in paths) > before.onset
    latest = read_snapshot(max(paths, key=lambda path: read_facts(path)["step"]))
    found = investigate(
        case.build(),
        case.step,
        latest,
        spike=spike,
        level=level_before(list(range(len(losses))), losses, SPIKE),
        spikes=[before, spike],
        run=tmp_path / "run",
        older=earlier_snapshots(paths, latest),
        clamped_before=partial(clamped_before, tmp_path / "run"),
    )
    assert found.horizon is not None
    assert found.horizon.stop == "no calm step"
    assert found.verdict == found.stated == "unknown"
    assert found.named == []
    words = found.words()
    assert "With nothing clamped from step 56 on 0 % of it is gone." in words
    assert "no step between an older snapshot and the spike is calm" in words
    assert f"largest clamp error at step {case.harm} (real.out grad_output)" in words
    assert "not the cause" not in words
    assert "part of the cause" not in words
    assert Explanation.from_dict(found.to_dict()) == found


# ---- levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reported", ["zero", "tiny", "below zero", "around zero"])
def test_a_spike_above_a_level_of_any_size_is_explained(reported: Reported, tmp_path: Path) -> None:
    case = LevelCase(reported=reported)
    losses = record(case, tmp_path / "run")
    free = losses_with(case, case.culprits)  # by training anew
    rise = losses[case.spike] - losses[case.spike - 1]
    assert rise > 2
    assert losses[case.spike] - free[case.spike] == pytest.approx(rise, rel=0.02)
    found = explain(case, tmp_path / "run")
    assert found.verdict == "clamping"
    assert found.named == case.culprits
    assert found.clamping_share == pytest.approx(1.0, abs=0.02)
    assert found.override is not None
    assert found.override.removed == pytest.approx(1.0, abs=0.02)
    (row,) = (site for site in found.sites if site.named)
    assert row.share == pytest.approx(1.0, abs=0.02)
    assert "? %" not in found.words()


def test_a_spike_at_the_first_step_has_no_level_and_the_reason_is_told(tmp_path: Path) -> None:
    case = LevelCase(reported="broken at once")
    losses = record(case, tmp_path / "run")
    assert math.isnan(losses[0])
    found = explain(case, tmp_path / "run")
    assert found.onset == 0
    assert found.reproduced
    assert found.verdict == "unknown"
    words = found.words()
    assert "came back bit for bit. No calm step comes before the spike, so there is no" in words
    assert "does not rise" not in words
    assert "nan" not in words


def test_a_spike_below_the_level_of_a_falling_loss_is_not_called_unreproduced(
    tmp_path: Path,
) -> None:
    """It falls by 30 % a step: the spike is above the next value, and below the median of nine."""
    case = LevelCase(reported="falling")
    losses = record(case, tmp_path / "run")
    level = sorted(losses[case.spike - 9 : case.spike])[4]
    assert 3 * losses[case.spike - 1] * 0.7 < losses[case.spike] < level
    found = explain(case, tmp_path / "run")
    assert found.onset == case.spike
    assert found.reproduced
    assert found.verdict == "unknown"
    words = found.words()
    assert "came back bit for bit. The mean loss of these steps, " in words
    assert f"is not above the level, {level:.4g}, the median of the latest calm steps" in words


@pytest.mark.parametrize(
    ("level", "spike", "free", "gone"),
    [
        (2.0, 5.0, 2.0, 1.0),
        (2.0, 5.0, 3.5, 0.5),
        (0.0, 3.0, 0.0, 1.0),
        (0.0, 3.0, 2.25, 0.25),
        (0.0, 3.0, 4.5, -0.5),
        (1e-9, 3.0, 2.25, 0.25),
        (-5.0, -1.0, -5.0, 1.0),
        (-5.0, -1.0, -2.0, 0.25),
        (-0.001, 3.0, 1.5, 0.5),
        (0.0, math.nan, 0.0, 1.0),
        (-2.0, math.inf, -2.0, 1.0),
    ],
)
def test_the_share_that_is_gone_is_that_of_the_rise(
    level: float, spike: float, free: float, gone: float, tmp_path: Path
) -> None:
    game, without = played(level, spike, free, tmp_path)
    assert game.rise > 0
    assert game.share_gone(without) == pytest.approx(gone, rel=1e-3)
    assert game.by_step(without)[20] == pytest.approx(gone, rel=1e-3)


@pytest.mark.parametrize("level", [2.0, 0.0, 1e-9, -3.0, -0.001])
def test_what_is_not_finite_is_worse_than_the_spike(level: float, tmp_path: Path) -> None:
    game, without = played(level, level + 3.0, math.nan, tmp_path)
    assert game.share_gone(without) < -0.99
    one, other = (
        Window(first=20, last=20, level=level, peak=level + 3.0).capped(loss)
        for loss in (math.nan, math.inf)
    )
    assert one == other > level + 3.0


def played(level: float, spike: float, free: float, folder: Path) -> tuple[Game, Trace]:
    """Return a game about a spike of one step, and the replay with nothing clamped."""
    no_replay: Any = SimpleNamespace(ranks=ALONE)
    window = Window(first=20, last=20, level=level)
    game = Game(no_replay, window, budget=9, cache=folder / "cache.json")
    plain, without = (
        Trace(
            losses={**dict.fromkeys(range(20), level), 20: loss},
            sites={},
            underflowed=0,
            elements=1,
            seconds=0.0,
        )
        for loss in (spike, free)
    )
    game.begin(plain)
    game.lower_floor(without)
    return game, without


# ---- in words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("near", "said"),
    [
        (0.02, "2 % of it is gone; the clamping that matters lies before."),
        (-0.4, "it is 40 % higher; the clamping that matters lies before."),
        (0.55, "55 % of it is gone; the rest lies before, or is not clamping."),
    ],
)
def test_what_lies_before_is_what_the_nearer_start_leaves(near: float, said: str) -> None:
    asked = (Asked(step=56, steps=5, removed=near), Asked(step=40, steps=21, removed=0.95))
    found = Explanation(
        run="run",
        onset=60,
        last=60,
        height=2.5,
        level=2.0,
        snapshot_step=40,
        others={},
        underflowed={},
        reproduced=True,
        verdict="clamping",
        clamping_share=0.95,
        horizon=Horizon(asked=asked, stop="found"),
    )
    assert f"With nothing clamped from step 56 on {said}" in found.words()
