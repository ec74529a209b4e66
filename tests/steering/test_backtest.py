"""A rule tried on planted logs: what it finds is counted by brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truths.ladders import KINDS, MAX, Ladder, series
from unclamp import AnalysisError, Delayed, Dynamic, Guarded, Rule, SiteName, backtest
from unclamp.analysis.steering import Backtest
from unclamp.runlog import Header, RunLogWriter

STEPS = 120
RULE = Rule(ladder=(Delayed(4), Guarded(), Dynamic()), floor=10, reads=2.0)
PLANTED = {f"layers.{i}.{kind}": (kind, fmt) for i, (kind, fmt) in enumerate(
    (kind, fmt) for kind in KINDS for fmt in ("e4m3fn", "e5m2"))}  # fmt: skip


def write(path: Path, amaxes: dict[str, list[float | None]], **header: Any) -> Path:
    """Write a log of sites that cast `index + 1` elements each, in one scaling or another."""
    fmts = [PLANTED.get(name, ("", "e4m3fn"))[1] for name in amaxes]
    with RunLogWriter(path, header=Header(unclamp_version="0", **header)) as writer:
        count = len(amaxes)
        writer.add("sites", {"site": range(count), "fqn": list(amaxes), "role": ["input"] * count,
                             "format": fmts, "scaling": ["dynamic"] * count,
                             "format_max": [MAX[f] for f in fmts]})  # fmt: skip
        for step in range(max(map(len, amaxes.values()))):
            there = [(i, a[step]) for i, a in enumerate(amaxes.values()) if a[step] is not None]
            zero = [0] * len(there)
            writer.add("casts", {"step": [step] * len(there), "site": [i for i, _ in there],
                                 "amax": [a for _, a in there], "scale": [1.0] * len(there),
                                 "elements": [i + 1 for i, _ in there], "saturated": zero,
                                 "underflowed": zero, "nonfinite": zero, "recast": zero,
                                 "saturated_error": [0.0] * len(there),
                                 "microsteps": [1] * len(there)})  # fmt: skip
    return path


@pytest.fixture(scope="module")
def planted() -> dict[str, list[float | None]]:
    return {name: series(kind, STEPS, 3) for name, (kind, _) in PLANTED.items()}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, planted: dict[str, list[float | None]]) -> Path:
    return write(tmp_path_factory.mktemp("logs") / "run", planted)


@pytest.fixture(scope="module")
def ladders(planted: dict[str, list[float | None]]) -> list[Ladder]:
    made = [Ladder(fmt=fmt, length=4, floor=10) for _, fmt in PLANTED.values()]
    for ladder, amaxes in zip(made, planted.values(), strict=True):
        for step, amax in enumerate(amaxes):
            ladder.step(step, amax)
    return made


def test_a_log_is_played_as_brute_force_plays_it(log: Path, ladders: list[Ladder]) -> None:
    (run,) = backtest(log, RULE).runs
    said = [(d.site.fqn, d.step, d.kind) for d in run.decisions]
    expected = [
        (fqn, step, kind)
        for fqn, ladder in zip(PLANTED, ladders, strict=True)
        for step, kind, _ in ladder.said
    ]
    assert sorted(said) == sorted(expected)
    assert run.casts == sum(len(ladder.history) for ladder in ladders)
    assert run.clamped == sum(ladder.clamped for ladder in ladders)
    assert (run.first, run.missed) == (sum(ladder.harmful for ladder in ladders), 0)
    assert (run.ups, run.downs, run.held) == tuple(
        sum(kind == wanted for _, _, kind in expected) for wanted in ("up", "down", "held")
    )


def test_reads_are_those_of_the_rung_of_each_moment(log: Path, ladders: list[Ladder]) -> None:
    """By hand: 1, and 1 more for a repeated cast and for each cast of a dynamic site."""
    (run,) = backtest(log, RULE).runs
    extra = [ladder.repeated + _on_dynamic(ladder) for ladder in ladders]
    assert run.reads_a_cast == pytest.approx(1 + sum(extra) / run.casts)
    elements = [(i + 1) * len(ladder.history) for i, ladder in enumerate(ladders)]
    read = sum((i + 1) * more for i, more in enumerate(extra)) + sum(elements)
    assert run.reads == pytest.approx(read / sum(elements))


def _on_dynamic(ladder: Ladder) -> int:
    """Return the casts that a site made as dynamic; such sites cast at every step."""
    began, casts = None, 0
    for step, _, rung in ladder.said:
        if rung == 2:
            began = step
        elif began is not None:
            casts, began = casts + step - began, None
    return casts + (0 if began is None else STEPS - 1 - began)


def outliers(*steps: int) -> list[float | None]:
    return [50.0 if step in steps else 1.0 for step in range(STEPS)]


def test_a_way_up_and_back_that_avoided_nothing_is_false(tmp_path: Path) -> None:
    """Of three sites one avoids an outlier, one goes up in vain, one stays up till the end."""
    amaxes = {"a": outliers(20, 28), "b": outliers(20), "c": outliers(115)}
    (run,) = backtest(write(tmp_path / "run", amaxes), RULE).runs
    assert (run.ups, run.downs, run.false, run.idle) == (3, 2, 1, 2)
    assert run.avoided == 1
    assert backtest(tmp_path / "run", RULE).false_share == pytest.approx(1 / 3)


def test_a_long_way_in_vain_is_idle_and_not_false(tmp_path: Path) -> None:
    slow = Rule(ladder=RULE.ladder, floor=60, reads=2.0)
    (run,) = backtest(write(tmp_path / "run", {"a": outliers(20)}), slow).runs
    assert (run.ups, run.downs, run.false, run.idle) == (1, 1, 0, 1)


def test_clamps_that_change_nothing_are_missed(tmp_path: Path) -> None:
    path = write(tmp_path / "run", {"a": outliers(20, 40, 60)})
    waits = Rule(ladder=RULE.ladder, casts=2, of=21, reads=2.0)
    (run,) = backtest(path, waits).runs
    assert (run.missed, run.first, [d.step for d in run.decisions]) == (1, 1, [40])
    ceiling = Rule(ladder=(Delayed(4), Dynamic()), reads=1.0)
    (run,) = backtest(path, ceiling).runs
    assert (run.missed, run.ups, run.held) == (3, 0, 1)
    assert any("without a switch up" in said for said in backtest(path, waits).sentences)


def test_prices_of_a_log_decide_where_the_rule_asks_for_them(tmp_path: Path) -> None:
    """The price of a cast is that of its two parts; a log without prices has none to go by."""
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        writer.add("sites", {"site": [0], "fqn": ["a"], "role": ["input"], "format": ["e4m3fn"],
                             "scaling": ["delayed"], "format_max": [448.0]})  # fmt: skip
        for step in range(20):
            parts = {5: (0.02, 0.01), 7: (0.06, None), 9: (0.03, 0.04)}.get(step, (None, None))
            writer.add("casts", {"step": [step], "site": [0], "amax": [1.0], "scale": [1.0],
                                 "elements": [4], "saturated": [0], "underflowed": [0],
                                 "nonfinite": [0], "recast": [0], "saturated_error": [0.0],
                                 "microsteps": [1], "price_clamp": [parts[0]],
                                 "price_rounding": [parts[1]]})  # fmt: skip
    priced = Rule(ladder=RULE.ladder, price=0.05, reads=2.0)
    (run,) = backtest(tmp_path / "run", priced).runs
    assert [(d.step, d.reason, d.price) for d in run.decisions] == [
        (7, "price", 0.06),
        (9, "price", 0.07),
    ]
    assert backtest(tmp_path / "run", RULE).ups == 0
    without = write(tmp_path / "other", {"a": [1.0] * 20})
    assert backtest(without, priced).ups == 0


def test_a_late_decision_is_in_force_a_step_later(tmp_path: Path) -> None:
    """Two outliers, each beyond the one before: the second comes before the switch does."""
    amaxes: list[float | None] = [1.0] * STEPS
    amaxes[20], amaxes[21], amaxes[22] = 50.0, 5000.0, 5e5
    path = write(tmp_path / "run", {"a": amaxes})
    at_once, late = (backtest(path, RULE, late=late).runs[0] for late in (0, 1))
    assert [d.step for d in late.decisions] == [d.step for d in at_once.decisions]
    assert (at_once.clamped, late.clamped) == (1, 2)
    assert (at_once.first, late.first, late.missed) == (1, 2, 0)


def test_only_counted_sites_are_none_of_it(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        columns = {"site": [0, 1], "fqn": ["a", "attn.qk"], "role": ["input"] * 2,
                   "format": ["e4m3fn"] * 2, "scaling": ["delayed"] * 2, "format_max": [448.0] * 2,
                   "only_counted": [False, True]}  # fmt: skip
        writer.add("sites", columns)
        for step in range(5):
            zero = [0, 0]
            writer.add("casts", {"step": [step] * 2, "site": [0, 1], "amax": [1.0, 9.0**step],
                                 "scale": [1.0] * 2, "elements": [8] * 2, "saturated": zero,
                                 "underflowed": zero, "nonfinite": zero, "recast": zero,
                                 "saturated_error": [0.0] * 2, "microsteps": [1] * 2})  # fmt: skip
    found = backtest(tmp_path / "run", RULE)
    assert (list(found.sites), found.ups) == ([SiteName("a", "input")], 0)


def test_a_backtest_is_read_back_from_its_file(log: Path, tmp_path: Path) -> None:
    found = backtest([log, log], RULE, late=1)
    found.save(tmp_path / "tested.json")
    read = Backtest.load(tmp_path / "tested.json")
    assert (read.rule, read.late, read.sites) == (RULE, 1, found.sites)
    assert read.sentences == found.sentences
    assert [run.limits for run in read.runs] == [run.limits for run in found.runs]


def test_what_is_no_log_of_the_model_is_refused(log: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"b": [1.0] * 3})
    with pytest.raises(AnalysisError, match="expected logs of one model"):
        backtest([log, other], RULE)
    with pytest.raises(AnalysisError, match="has no casts"):
        backtest(write(tmp_path / "empty", {"a": [None] * 3}), RULE)
    with pytest.raises(AnalysisError, match="at least one log"):
        backtest([], RULE)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(AnalysisError, match="expected what `unclamp backtest"):
        Backtest.load(tmp_path / "x.json")
    with pytest.raises(AnalysisError, match="cannot read the backtest"):
        Backtest.load(tmp_path / "none.json")


def test_ranks_are_decided_by_their_largest_amax(tmp_path: Path) -> None:
    """An outlier that one rank alone sees is in the maximum over ranks."""
    writers = [
        RunLogWriter(
            tmp_path / "run",
            header=Header(unclamp_version="0", world_size=2, run_id="r"),
            rank=rank,
        )
        for rank in range(2)
    ]
    for rank, writer in enumerate(writers):
        writer.add("sites", {"site": [rank], "fqn": ["a"], "role": ["input"], "format": ["e4m3fn"],
                             "scaling": ["delayed"], "format_max": [448.0]})  # fmt: skip
        for step in range(12):
            amax = 9.0 if (step, rank) == (5, 1) else 1.0
            writer.add("casts", {"step": [step], "site": [rank], "amax": [np.float32(amax)],
                                 "scale": [1.0], "elements": [4], "saturated": [0],
                                 "underflowed": [0], "nonfinite": [0], "recast": [0],
                                 "saturated_error": [0.0], "microsteps": [1]})  # fmt: skip
    for writer in writers:
        writer.close()
    (run,) = backtest(tmp_path / "run", RULE).runs
    assert [(d.step, d.kind) for d in run.decisions] == [(5, "up")]
    assert run.casts == 12
