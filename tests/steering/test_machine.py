"""The machine decides as brute force does, site by site, on planted amaxes."""

from typing import Any

import numpy as np
import pytest

from truths.ladders import KINDS, Ladder, series
from unclamp import Delayed, Dynamic, Guarded, HighPrecision, PerBlock, SiteName
from unclamp.analysis.steering import Decision, Machine, Rule
from unclamp.formats import get_format

STEPS = 90
RULES: dict[str, dict[str, Any]] = {
    "at once": {"length": 4, "floor": 0},
    "two of five": {"length": 4, "floor": 12, "casts": 2, "of": 5},
    "strict": {"length": 3, "floor": 5, "tolerance": 0.0, "recasts": 2, "recasts_of": 4},
    "long": {"length": 16, "floor": 20},
}


def rule_of(length: int, **settings: Any) -> Rule:
    return Rule(ladder=(Delayed(length), Guarded(), Dynamic()), reads=2.0, **settings)


def column(values: list[float | None]) -> np.ndarray:
    return np.array([-1 if value is None else value for value in values], np.float32)


def names(count: int) -> list[SiteName]:
    return [SiteName(str(i), "input") for i in range(count)]


def machine_of(rule: Rule, count: int = 1, fmt: str = "e4m3fn") -> Machine:
    return Machine(rule, names(count), [get_format(fmt)] * count)


def decided(machine: Machine, amaxes: list[float | None]) -> list[Decision]:
    return [d for i, a in enumerate(amaxes) for d in machine.step(i, column([a]))[0]]


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2"])
def test_decisions_are_those_of_brute_force(settings: dict[str, Any], fmt: str) -> None:
    """All kinds of series at once, as sites of one machine that goes by them independently."""
    planted = [series(kind, STEPS, seed) for kind in KINDS for seed in range(4)]
    ladders = [Ladder(fmt=fmt, **settings) for _ in planted]
    machine = machine_of(rule_of(**settings), len(planted), fmt)
    found: list[list[tuple[int, str, int]]] = [[] for _ in planted]
    for step in range(STEPS):
        made, _ = machine.step(step, column([each[step] for each in planted]))
        for each in made:
            found[int(each.site.fqn)].append(
                (step, each.kind, machine.rule.ladder.index(each.after))
            )
        for ladder, each in zip(ladders, planted, strict=True):
            ladder.step(step, each[step])
        assert machine.rung.tolist() == [ladder.rung for ladder in ladders]
    assert found == [ladder.said for ladder in ladders]
    assert sum(map(len, found)) > 10  # the planted series do make it move


def test_no_clamp_error_exceeds_the_bound_that_decides() -> None:
    """Of random tensors, those whose elements are all alike reach it."""
    random = np.random.default_rng(0)
    for _ in range(200):
        x = np.abs(random.standard_cauchy(1000))
        limit = x.max() / random.uniform(1, 20)
        lost = np.square(np.maximum(x - limit, 0)).sum() / np.square(x).sum()
        assert lost <= (1 - limit / x.max()) ** 2


def test_a_decision_carries_what_it_was_made_from() -> None:
    rule = rule_of(4, floor=6)
    (up, down) = decided(machine_of(rule), [1.0, 1.0, 8.0, *[1.0] * 10])[:2]
    assert (up.step, up.kind, up.reason) == (2, "up", "clamped")
    assert (up.before, up.after) == (Delayed(4), Guarded())
    assert (up.amax, up.overshoot, up.clamp_error) == (8.0, 8.0, pytest.approx(49 / 64))
    assert (up.spoke, up.of) == (1, 1)
    assert (down.step, down.kind, down.reason, down.clean) == (8, "down", "clean", 6)
    assert "overshoot 8.00x, clamp error up to 76.6 %" in up.text
    assert up.to_dict()["before"] == "delayed(4)"


def test_the_way_back_is_counted_on_the_lower_rung_and_not_on_the_own() -> None:
    """Guarded scaling clamps nothing; delayed would have, every fifth step, and was avoided."""
    machine = machine_of(rule_of(4, floor=5))
    amaxes: list[float | None] = [1.0, 1.0, *([9.0, 1, 1, 1, 1] * 6)]
    (up,) = decided(machine, amaxes)
    assert (up.step, up.kind) == (2, "up")
    assert machine.avoided(machine.sites[0]) == 5


def test_each_relapse_doubles_the_way_back() -> None:
    """An outlier each 40 updates: the site comes back after 5, 10, 20, and then no more."""
    said = decided(
        machine_of(rule_of(4, floor=5)), [9.0 if i % 40 == 39 else 1.0 for i in range(400)]
    )
    stays = [b.step - a.step for a, b in zip(said[::2], said[1::2], strict=False)]
    assert stays == [5, 10, 20]
    assert [each.kind for each in said] == ["up", "down"] * 3 + ["up"]


def test_the_ceiling_holds_back_the_smaller_overshoot() -> None:
    """Two sites of ten may be dynamic: (8 + 2 * 2) / 10 = 1.2 reads a cast."""
    rule = Rule(ladder=(Delayed(4), Dynamic()), reads=1.2, floor=3)
    machine = machine_of(rule, 10)
    machine.step(0, np.ones(10, np.float32))
    amax = np.ones(10, np.float32)
    amax[[1, 4, 7]] = 5, 9, 7
    decisions, _ = machine.step(1, amax)
    assert [(d.kind, d.site.fqn) for d in decisions] == [("up", "4"), ("up", "7"), ("held", "1")]
    assert machine.reads() == pytest.approx(1.2)
    assert decisions[-1].reads == pytest.approx(1.3)
    assert "stays, not" in decisions[-1].text
    amax[[4, 7]] = 1
    amax[1] = 40
    assert machine.step(2, amax)[0] == []  # told once
    quiet = np.ones(10, np.float32)
    for step in (3, 4):  # the others come back, and there is room
        machine.step(step, quiet)
    machine.step(5, quiet)
    amax[1] = 200
    assert [(d.kind, d.site.fqn) for d in machine.step(6, amax)[0]] == [("up", "1")]


def test_a_site_never_goes_below_the_rung_that_it_began_on() -> None:
    rule = rule_of(4, floor=0)
    machine = Machine(rule, names(2), [get_format("e4m3fn")] * 2, start=[1, 0])
    for step in range(40):
        machine.step(step, column([9.0 if step == 5 else 1.0] * 2))
    assert machine.rung.tolist() == [1, 0]


def test_a_price_sends_up_from_any_rung_and_for_good() -> None:
    ladder = (Delayed(4), Dynamic(), Dynamic(PerBlock(1, 128)), HighPrecision())
    machine = Machine(
        Rule(ladder=ladder, price=0.5, reads=2.0, floor=0), names(2), [get_format("e4m3fn")] * 2
    )
    said = []
    for step in range(40):
        prices = np.array([0.6 if step in (3, 4, 9) else 0.1, np.nan])
        said += machine.step(step, np.ones(2, np.float32), prices=prices)[0]
    assert [(d.step, d.site.fqn, d.kind, d.reason, d.price) for d in said] == [
        (3, "0", "up", "price", 0.6),
        (4, "0", "up", "price", 0.6),
        (9, "0", "up", "price", 0.6),
    ]
    assert machine.rung.tolist() == [3, 0]


def test_a_machine_that_is_restored_goes_on_as_it_would_have() -> None:
    planted = [series(kind, STEPS, 7) for kind in KINDS]
    rule = rule_of(4, floor=6)
    whole, first, second = (machine_of(rule, len(planted)) for _ in range(3))

    def run(machine: Machine, steps: range) -> list[Decision]:
        return [d for s in steps for d in machine.step(s, column([p[s] for p in planted]))[0]]

    expected = run(whole, range(STEPS))
    said = run(first, range(41))
    second.restore(first.state())
    assert said + run(second, range(41, STEPS)) == expected
    with pytest.raises(ValueError, match="same rule and sites"):
        machine_of(rule, 3).restore(first.state())
