"""How far back an answer reaches: causes long before a spike, and what is said where none is found.

The truth of a planted case is what training from the start gives, never a replay.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import unclamp
from truths.delays import SPIKE, STEPS, DelayCase
from truths.trainings import Case, explain, losses_with, record
from unclamp.analysis import Spike
from unclamp.analysis.explanation import Explanation
from unclamp.analysis.horizon import Asked, Clamped, Horizon, clamped_before
from unclamp.explain import Snapshots
from unclamp.explain.game import Game, Window
from unclamp.explain.ranks import ALONE
from unclamp.explain.replay import Trace
from unclamp.explain.store import FACTS_FILE, SKELETON_FILE, find_snapshots, read_facts
from unclamp.explain.watch import trains
from unclamp.names import SiteName
from unclamp.runlog import RunLog

GRADIENT = DelayCase(through="grad_output", delay=12, seed=3)
WEIGHT = DelayCase(through="weight", delay=12, seed=4)
OPTIMIZER = DelayCase(through="optimizer", delay=16, seed=5)


def recorded(case: DelayCase, run: Path, **settings: Any) -> list[float]:
    return record(case, run, **{"every": 4, "keep": 6, **settings})


@pytest.mark.parametrize("case", [GRADIENT, WEIGHT, OPTIMIZER])
def test_a_clamp_long_before_the_spike_is_named(case: DelayCase, tmp_path: Path) -> None:
    losses = recorded(case, tmp_path / "run")
    free = losses_with(case, case.culprits)[SPIKE]
    floor = min(free, float(np.median(losses[SPIKE - 9 : SPIKE])))
    gone = (losses[SPIKE] - free) / (losses[SPIKE] - floor)
    assert gone > 0.5  # by training anew
    found = explain(case, tmp_path / "run")
    assert found.reproduced
    assert found.verdict == ("clamping" if gone >= 0.9 else "mostly clamping")
    assert found.named == case.culprits
    assert found.clamping_share == pytest.approx(gone, abs=0.1)
    assert found.horizon is not None
    assert found.horizon.asked[0].removed < 0.1  # the latest snapshot alone would say otherwise
    assert found.snapshot_step <= case.harm
    assert "the clamping that matters lies before" in found.words()


def test_harm_that_the_spike_does_not_read_is_not_blamed(tmp_path: Path) -> None:
    case = DelayCase(through="weight", delay=8, other="bad batch", seed=6)
    losses = recorded(case, tmp_path / "run")
    assert losses_with(case, case.suspects)[SPIKE] == pytest.approx(losses[SPIKE], rel=0.02)
    found = explain(case, tmp_path / "run")
    assert found.verdict == "not clamping"
    assert found.named == []
    assert found.horizon is not None
    assert found.first_step < case.harm
    assert found.stated == f"not clamping from step {found.first_step} on"


def test_a_negative_answer_says_what_was_not_replayed(tmp_path: Path) -> None:
    """The only snapshot is of after the harm: no verdict on what lies before."""
    recorded(GRADIENT, tmp_path / "run", keep=2)
    found = explain(GRADIENT, tmp_path / "run")
    assert found.verdict == "not clamping"
    assert found.snapshot_step == found.first_step == 56 > GRADIENT.harm
    horizon = found.horizon
    assert horizon is not None
    assert (horizon.stop, horizon.is_open) == ("no older snapshot", True)
    assert horizon.clamped is not None
    assert horizon.clamped.hardest == GRADIENT.harm
    assert horizon.clamped.sites[0] == GRADIENT.culprits[0]
    words = found.words()
    assert "from step 56 on clamping is not the cause." in words
    assert "Steps before 56 were not replayed: there is no older snapshot" in words
    assert f"largest clamp error at step {GRADIENT.harm} (real.out grad_output)" in words


def test_where_nothing_clamped_before_nothing_older_is_asked(tmp_path: Path) -> None:
    """All sites but a decoy's are guarded; it clamps at the spike alone, as the log shows."""
    case = Case(other="bad batch", paths=((0.0,),), scaling=unclamp.Delayed(margin=1))
    record(case, tmp_path / "run", keep=6)
    seen = clamped_before(tmp_path / "run", 30)
    assert seen == Clamped()
    found = explain(case, tmp_path / "run")
    assert found.verdict == "not clamping"
    assert found.horizon == Horizon(
        asked=found.horizon.asked[:1] if found.horizon else (), clamped=seen, stop="nothing clamped"
    )
    assert found.replays == 6
    assert "The log shows nothing clamped before." in found.words()


def test_the_budget_ends_the_search_and_is_the_reason_given(tmp_path: Path) -> None:
    recorded(GRADIENT, tmp_path / "run")
    found = explain(GRADIENT, tmp_path / "run", replays=5)
    assert found.horizon is not None
    assert found.horizon.stop == "budget"
    assert found.replays <= 5
    assert "the budget of replays was spent" in found.words()
    assert explain(GRADIENT, tmp_path / "run").named == GRADIENT.culprits


def test_what_the_log_says_was_clamped_is_what_was_clamped(tmp_path: Path) -> None:
    recorded(GRADIENT, tmp_path / "run")
    with RunLog.open(tmp_path / "run") as log:
        names = {row["site"]: SiteName(row["fqn"], row["role"]) for row in log.sites().to_pylist()}
        rows = [r for r in log.casts().to_pylist() if r["saturated"] and r["step"] < 56]
    found = clamped_before(tmp_path / "run", 56)
    assert found.steps == len({row["step"] for row in rows})
    assert found.last == max(row["step"] for row in rows)
    hardest = max(rows, key=lambda row: row["saturated_error"])
    assert (found.hardest, found.sites[0]) == (hardest["step"], names[hardest["site"]])
    assert set(found.sites) == {names[row["site"]] for row in rows}
    assert found.is_complete


def test_a_log_with_few_casts_does_not_show_that_nothing_clamped(tmp_path: Path) -> None:
    training = Case().build()
    with unclamp.Recorder(training.model, tmp_path, casts=7) as recorder:
        for n, batch in enumerate(Case().batches()):
            recorder.step(n, loss=Case().step(training, batch))
    found = clamped_before(tmp_path, 3)
    assert not found.is_complete
    assert Horizon(asked=(Asked(step=3, steps=9, removed=0.0),), clamped=found).is_open
    assert "lacks the casts of many steps" in found.words()


def test_a_log_that_begins_late_does_not_show_that_nothing_clamped_before(tmp_path: Path) -> None:
    training = Case().build()
    with unclamp.Recorder(training.model, tmp_path) as recorder:
        for n, batch in enumerate(Case().batches()):
            recorder.step(n + 35, loss=Case().step(training, batch))
            if n == 9:
                break
    found = clamped_before(tmp_path, 40)
    assert (found.begins, found.covers(35), found.covers(34)) == (35, True, False)
    horizon = Horizon(asked=(Asked(step=40, steps=9, removed=0.0),), clamped=found)
    assert horizon.is_open
    assert "The log, which begins at step 35, shows" in horizon.before()
    earlier = Horizon(
        asked=(Asked(step=30, steps=19, removed=0.0),), clamped=clamped_before(tmp_path, 30)
    )
    assert earlier.is_open
    assert earlier.before().endswith(" The log begins at step 35.")


# ---- in a training loop ----------------------------------------------------------------------


def test_a_training_goes_back_to_before_a_cause_that_lies_further_back(tmp_path: Path) -> None:
    training, losses = GRADIENT.build(), dict[int, list[float]]()
    with (
        unclamp.Recorder(training.model, tmp_path) as recorder,
        Snapshots(
            training,
            tmp_path,
            build=partial(GRADIENT.build),
            step=GRADIENT.step,
            every=4,
            after=1,
            on_spike="explain",
            recorder=recorder,
        ) as snapshots,
    ):
        for n, batch in snapshots.follow(GRADIENT.batches()):
            loss = GRADIENT.step(training, batch)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)
            losses.setdefault(n, []).append(loss.item())
    with RunLog.open(tmp_path) as log:
        events = log.events().to_pylist()
    (rewind,) = (json.loads(e["data"]) for e in events if e["kind"] == "rewind")
    assert rewind["to"] <= GRADIENT.harm
    assert list(losses) == list(range(STEPS))
    first, second = losses[SPIKE]
    assert first > 1.3 * losses[SPIKE - 1][0]
    assert second < 1.1 * losses[SPIKE - 1][0]


# ---- what ends the search --------------------------------------------------------------------


def scale_otherwise(path: Path) -> None:
    facts = json.loads((path / FACTS_FILE).read_text())
    facts["sites"][0]["scaling"] = {"kind": "dynamic"}
    (path / FACTS_FILE).write_text(json.dumps(facts))


def change_a_loss(path: Path) -> None:
    facts = json.loads((path / FACTS_FILE).read_text())
    step = str(facts["step"])
    facts["losses"][step] = (float.fromhex(facts["losses"][step]) + 1e-7).hex()
    (path / FACTS_FILE).write_text(json.dumps(facts))


def damage(path: Path) -> None:
    (path / SKELETON_FILE).write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("spoil", "stop", "said"),
    [
        (scale_otherwise, "scaling changed", "was taken under another scaling"),
        (change_a_loss, "not reproduced", "the losses from the next older snapshot did not come"),
        (damage, "unreadable", "the next older snapshot could not be used"),
    ],
)
def test_an_older_snapshot_that_is_not_of_these_steps_ends_the_search(
    spoil: Callable[[Path], None], stop: str, said: str, tmp_path: Path
) -> None:
    recorded(GRADIENT, tmp_path / "run")
    for path in find_snapshots(tmp_path / "run"):
        if read_facts(path)["step"] <= GRADIENT.harm:
            spoil(path)
    found = explain(GRADIENT, tmp_path / "run")
    assert found.verdict == "not clamping"
    assert found.horizon is not None
    assert found.horizon.stop == stop
    assert found.first_step > GRADIENT.harm
    assert said in found.words()


@pytest.mark.parametrize(
    ("calm", "at_spike", "gone"),
    [(1.0, 3.0, 0.0), (0.8, 2.8, 0.0), (0.8, 0.8, 1.0), (1.0, 2.0, 0.5), (0.8, 1.8, 0.5)],
)
def test_a_better_training_before_the_spike_is_no_part_of_it(
    calm: float, at_spike: float, gone: float, tmp_path: Path
) -> None:
    """The loss is 1, and 3 at the spike; replayed from far back it may be lower at all steps."""

    def trace(level: float, spike: float) -> Trace:
        losses = {**dict.fromkeys(range(20), level), 20: spike}
        return Trace(losses=losses, sites={}, underflowed=0, elements=1, seconds=0.0)

    window = Window(first=20, last=20, level=1.0, calm=range(11, 20))
    no_replay: Any = SimpleNamespace(ranks=ALONE)
    game = Game(no_replay, window, budget=9, cache=tmp_path / "cache.json")
    game.begin(trace(1.0, 3.0))
    free = trace(calm, at_spike)
    game.lower_floor(free)
    assert game.share_gone(free) == pytest.approx(gone)


# ---- trains ----------------------------------------------------------------------------------


def spike(onset: int, end: int, recovery: int | None, height: float = 2.0) -> Spike:
    return Spike(
        onset=onset,
        peak=onset,
        end=end,
        recovery=recovery,
        height=height,
        sigmas=9.0,
        level=1.0,
        kind="rise",
    )


def test_spikes_that_follow_closely_are_a_train() -> None:
    apart = [spike(40, 41, 42), spike(62, 62, 63)]  # 21 steps after the end of the first
    assert trains(apart) == [[apart[0]], [apart[1]]]
    close = [spike(40, 41, 42), spike(61, 61, 63), spike(70, 70, 71)]
    assert trains(close) == [close]
    not_back = [spike(40, 41, 95), spike(91, 91, 95)]  # 50 steps, and never back
    assert trains(not_back) == [not_back]
    settled = [spike(40, 41, None), spike(92, 92, None)]
    assert trains(settled) == [[settled[0]], [settled[1]]]
    assert trains([]) == []


def test_of_a_train_the_first_is_explained_though_a_later_one_is_higher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LateSpike(size=32.0)
    record(case, tmp_path / "run", keep=6)
    first = explain(case, tmp_path / "run")
    assert first.onset == 34
    assert "It is the first of 2 spikes that follow closely on one another" in first.words()
    second = unclamp.explain_spike(tmp_path / "run", 2, build=partial(case.build), step=case.step)
    assert second.onset == 38
    assert second.height > first.height
    assert "It is no. 2, not the first, of 2 spikes" in second.words()


class LateSpike(Case):
    """A spike by clamping, and four steps later a higher one by a bad batch."""

    def batches(self) -> Any:
        for n, (x, target, rate) in enumerate(Case.batches(self)):
            yield x, target.flip(0) + 9 if n == 38 else target, rate


# ---- in words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("horizon", "said"),
    [
        (Horizon(asked=(Asked(step=9, steps=3, removed=0.0),)),
         "Steps before 9 were not replayed. Whether anything clamped in them is not known."),
        (Horizon(asked=(Asked(step=9, steps=3, removed=0.0),), clamped=Clamped(), stop="budget"),
         "The log shows nothing clamped before."),
        (Horizon(asked=(Asked(step=9, steps=3, removed=0.0),), stop="budget", clamped=Clamped(
            steps=1, last=4, hardest=4, sites=(SiteName("a", "input"),))),
         "Steps before 9 were not replayed: the budget of replays was spent. The log shows "
         "clamped elements before, at step 4 (a input)."),
        (Horizon(asked=(Asked(step=9, steps=3, removed=0.0),), stop="scaling changed",
                 clamped=Clamped(steps=1200, last=4, hardest=2, is_complete=False,
                                 sites=(SiteName("a", "input"), SiteName("b", "weight")))),
         "Steps before 9 were not replayed: the next older snapshot was taken under another "
         "scaling. The log, which lacks the casts of many steps, shows clamped elements in 1,200 "
         "steps before, the last of them step 4, and the largest clamp error at step 2 (a input)."),
    ],
)  # fmt: skip
def test_what_lies_before_is_said(horizon: Horizon, said: str) -> None:
    assert horizon.before() == said
    assert Horizon.from_dict(json.loads(json.dumps(horizon.to_dict()))) == horizon


def test_no_negative_verdict_is_stated_without_its_horizon(
    explained: Callable[..., Explanation],
) -> None:
    found = explained(verdict="not clamping", clamping_share=0.02)
    assert found.stated == "not clamping from step 5 on"
    asked = (Asked(step=5, steps=5, removed=0.02), Asked(step=1, steps=9, removed=-0.04))
    further = explained(
        verdict="not clamping",
        clamping_share=0.02,
        horizon=Horizon(asked=asked, clamped=Clamped(), stop="nothing clamped"),
    )
    assert further.stated == "not clamping from step 1 on"
    assert (
        "With nothing clamped from step 5 on 2 % of it is gone, from step 1 on it is 4 % higher: "
        "from step 1 on clamping is not the cause. The log shows nothing clamped before. A replay "
        "from step 5 takes 5 steps, and one from step 1 takes 9."
    ) in further.words()


@pytest.fixture
def explained() -> Callable[..., Explanation]:
    given: dict[str, Any] = {
        "run": "run", "onset": 7, "last": 9, "height": 2.5, "level": 2.0, "snapshot_step": 5,
        "others": {}, "underflowed": {}, "reproduced": True,
    }  # fmt: skip
    return lambda **changes: Explanation(**given | changes)
