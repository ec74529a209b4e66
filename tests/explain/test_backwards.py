"""Which answers from older starts count, by planted shares and placebos."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from unclamp.analysis.horizon import Asked, Clamped, Horizon
from unclamp.explain.backwards import Answer, Backwards
from unclamp.explain.game import BudgetSpent
from unclamp.explain.noise import Noise

CHAOS = (0.6, 0.55, 0.3, 0.4, 0.5)


def planted_start(
    step: int, gone: float, moved: tuple[float, ...] = (0.0, 0.0), *, is_spent: bool = False
) -> Any:
    def noise() -> Noise:
        if is_spent:
            raise BudgetSpent
        return Noise(moved=moved)

    return SimpleNamespace(
        snapshot=SimpleNamespace(step=step, facts={"sites": []}),
        steps=100 - step,
        without_clamping=lambda: gone,
        noise=noise,
        plain=lambda: None,
        comes_back=lambda plain: True,
    )


def test_only_snapshots_that_the_log_covers_are_passed_over() -> None:
    """Nothing clamped from step 35 on, where the log begins; the snapshot of 60 is not replayed."""
    starts = {step: planted_start(step, 0.01) for step in (60, 30)}
    start = planted_start(90, 0.02)
    backwards = Backwards(
        Answer(start=start, gone=0.02, noise=Noise(moved=(0.0, 0.0))),
        clamped_before=lambda step: Clamped(begins=35),
        begin=lambda snapshot: starts[snapshot.step],
        on_answer=lambda horizon: None,
    )
    backwards.ask([starts[60].snapshot])
    assert [each.step for each in backwards.horizon.asked] == [90]
    assert backwards.horizon.before() == (
        "Steps before 90 were not replayed. The log, which begins at step 35, shows nothing "
        "clamped before."
    )
    backwards.ask([starts[60].snapshot, starts[30].snapshot])
    assert [each.step for each in backwards.horizon.asked] == [90, 30]
    assert backwards.horizon.stop == "no older snapshot"


@pytest.mark.parametrize(
    ("near", "older", "best", "reach", "stop", "hidden"),
    [
        (0.02, planted_start(40, 0.95, CHAOS), 90, 90, "chaos", 0.95),
        (0.02, planted_start(40, 0.09, (0.9, 0.9)), 90, 90, "chaos", 0.09),
        (0.02, planted_start(40, 0.95, is_spent=True), 90, 90, "budget", 0.95),
        (0.02, planted_start(40, 0.02, is_spent=True), 90, 90, "budget", 0.02),
        (0.02, planted_start(40, 0.95), 40, 40, "found", None),
        (0.095, planted_start(40, 0.19), 40, 40, "no older snapshot", None),
        (0.85, planted_start(40, 0.91), 40, 40, "found", None),
        (0.02, planted_start(40, 0.03), 90, 40, "no older snapshot", None),
        (0.3, planted_start(40, 0.31, is_spent=True), 90, 40, "no older snapshot", None),
    ],
)
def test_an_answer_that_chaos_hides_carries_no_verdict_further_back(
    near: float, older: Any, best: int, reach: int, stop: str, hidden: float | None
) -> None:
    start = planted_start(90, near)
    backwards = Backwards(
        Answer(start=start, gone=near, noise=Noise(moved=(0.0, 0.0))),
        clamped_before=None,
        begin=lambda snapshot: older,
        on_answer=lambda horizon: None,
    )
    backwards.ask([older.snapshot])
    found = backwards.horizon
    assert (backwards.best.start.snapshot.step, found.first_step) == (best, reach)
    assert found.stop == stop
    assert (found.hidden and found.hidden.removed) == hidden
    if hidden is not None:
        assert "whether clamping before step 90 is the cause is not known" in found.before()
        assert f"from step 40 on {100 * hidden:.0f} % of it is gone, but" in found.before()
    assert Horizon.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_before_step_0_there_is_nothing_to_know() -> None:
    late = Horizon(
        asked=(Asked(step=0, steps=50, removed=0.0),),
        clamped=Clamped(begins=35),
        stop="no older snapshot",
    )
    assert not late.is_open
    assert late.before() == "No step comes before."
