"""A study's verdict, against studies in which the answer is planted."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from truths.runs import write_planted
from truths.studies import PLANTED, SEEDS, STEPS, losses, study
from unclamp.report import build_view
from unclamp.report.arms import NOTHING_CAST, counted_together
from unclamp.report.html import write_page
from unclamp.report.recorded import RunRecord, read_run
from unclamp.report.verdict import study_verdict
from unclamp.report.words import arm_notes, arm_row
from unclamp.runlog import RunLog


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    path = write_planted(tmp_path_factory.mktemp("verdict") / "run", steps=STEPS)
    with RunLog.open(path) as log:
        return read_run(log)[0]


def test_the_hurt_arm_comes_first_with_its_ratio_and_interval(run: RunRecord) -> None:
    view = study(run, {"hp": 1.0, "dynamic": 1.0, "guarded": 1.0, "delayed": 2.4})
    said = study_verdict([view])
    logs = {
        arm: [np.mean(np.log(np.array(losses(arm, s, f))[PLANTED])) for s in range(SEEDS)]
        for arm, f in (("dynamic", 1.0), ("delayed", 2.4))
    }
    want = ttest_rel(logs["delayed"], logs["dynamic"]).confidence_interval(0.95)
    ratio = math.exp(np.mean(logs["delayed"]) - np.mean(logs["dynamic"]))
    assert said[0] == (
        f"delayed is hurt where an amax outruns its history: {ratio:.2f}x the loss of dynamic at "
        f"the 2 planted steps (scenario outlier); 95 %: {math.exp(want.low):.2f}x to "
        f"{math.exp(want.high):.2f}x over 3 seeds."
    )
    assert said[1].startswith("dynamic and guarded are not (at most 1.0")
    gap = view.arms[3].planted_log_ratio
    assert gap is not None
    assert gap.interval == pytest.approx((want.low, want.high), rel=1e-9)


def test_on_plain_text_the_smallest_difference_that_would_show_is_said(run: RunRecord) -> None:
    view = study(run, {"dynamic": 1.0, "guarded": 1.0, "delayed": 1.0}, planted=False)
    (said,) = study_verdict([view])
    finals = {
        arm: [np.mean(losses(arm, seed)[-6:]) for seed in range(SEEDS)]
        for arm in ("dynamic", "guarded", "delayed")
    }
    tests = [ttest_rel(finals[arm], finals["dynamic"]) for arm in ("guarded", "delayed")]
    largest = max((i.high - i.low) / 2 for i in (t.confidence_interval(0.95) for t in tests))
    assert all(test.pvalue > 0.05 for test in tests)
    assert said == (
        "In the final loss (scenario text) no arm can be told from dynamic with 3 seeds (a "
        f"difference over {largest:.3g} would show)."
    )


def test_where_nobody_is_hurt_that_is_the_answer(run: RunRecord) -> None:
    said = study_verdict([study(run, {"dynamic": 1.0, "guarded": 1.0, "delayed": 1.0})])
    assert said[0].startswith(
        "At the 2 planted steps (scenario outlier) guarded and delayed are not hurt (at most 1.0"
    )
    assert not any("is hurt" in line for line in said)


def test_where_every_arm_is_hurt_each_is_named_worst_first(run: RunRecord) -> None:
    said = study_verdict([study(run, {"dynamic": 1.0, "mixed": 1.5, "delayed": 2.4})])
    assert [line.split(" is hurt")[0] for line in said[:2]] == ["delayed", "mixed"]
    assert not any("not hurt" in line or "are not" in line for line in said)


def test_dynamic_itself_may_be_hurt(run: RunRecord) -> None:
    said = study_verdict([study(run, {"hp": 1.0, "dynamic": 2.0, "delayed": 2.0})])
    assert any(line.startswith("dynamic itself is hurt at the 2 planted steps") for line in said)
    assert any(line.startswith("delayed is no worse than dynamic") for line in said)
    assert not any("not hurt" in line for line in said)


def test_a_spike_without_fp8_is_not_laid_at_its_door(run: RunRecord) -> None:
    said = study_verdict([study(run, {"hp": 2.0, "dynamic": 2.0, "delayed": 2.0})])
    assert any(
        line.startswith("hp, which has no FP8, has 6 spikes at planted steps too") for line in said
    )
    assert not any("itself is hurt" in line for line in said)


def test_hp_that_is_worse_than_dynamic_is_said(run: RunRecord) -> None:
    said = study_verdict([study(run, {"hp": 1.5, "dynamic": 1.0, "delayed": 1.0})])
    assert any(line.startswith("hp, which has no FP8, has 1.5") for line in said)


def test_one_seed_is_reported_and_nothing_is_claimed(run: RunRecord) -> None:
    arms = {"hp": 1.0, "dynamic": 1.0, "guarded": 1.0, "delayed": 2.4}
    said = study_verdict([study(run, arms, seeds=1)])
    assert said[0].startswith("At the 2 planted steps (scenario outlier) delayed had 2.")
    assert said[0].endswith("seen with one seed, from which no claim can be made.")
    assert "chance cannot be told" in said[1]
    assert not any("hurt" in line or "95 %" in line for line in said)


def test_seeds_that_disagree_leave_it_open(run: RunRecord) -> None:
    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        loss = losses(arm, seed, (1.0, 1.1, 3.0)[seed]) if arm == "delayed" else record.loss
        return replace(record, loss=list(loss))

    said = study_verdict([study(run, {"dynamic": 1.0, "delayed": 2.0}, change=change)])
    assert said[0].startswith("Whether delayed (")
    assert (
        "is hurt at the 2 planted steps (scenario outlier) cannot be told with 3 seeds" in said[0]
    )


def test_an_arm_that_diverged_is_said_first_and_compared_with_nobody(run: RunRecord) -> None:
    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        if (arm, seed) != ("delayed", 1):
            return record
        return replace(record, loss=[*record.loss[:30], *[math.nan] * 30])

    said = study_verdict([study(run, {"dynamic": 1.0, "delayed": 2.4}, change=change)])
    assert said[0].startswith("The loss of delayed is not finite with 1 of 3 seeds")
    assert not any("hurt" in line or "nan" in line.lower() for line in said)


def test_an_unfinished_study_says_so_before_anything(run: RunRecord) -> None:
    view = study(run, {"dynamic": 1.0, "delayed": 2.4})
    assert study_verdict([view], is_whole=False)[0].startswith("So far")
    assert study_verdict([]) == ["Nothing can be said yet: no run has recorded anything."]


def test_without_dynamic_or_with_one_arm_nobody_is_called_better(run: RunRecord) -> None:
    (said,) = study_verdict([study(run, {"hp": 1.0, "delayed": 2.4})])
    assert said.startswith("There is no arm dynamic in scenario outlier")
    assert "hp: 0 spikes of the loss, no FP8; delayed: 6 spikes of the loss, 15 elements" in said
    (said,) = study_verdict([study(run, {"dynamic": 1.0})])
    assert said.startswith("There is one arm only in scenario outlier")


def test_notes_and_an_arm_without_fp8_reach_verdict_table_and_json(
    run: RunRecord, tmp_path: Path
) -> None:
    note = "The override 'mlp.down_proj' matched no layer."

    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        if arm == "smooth":
            return replace(record, notes=[note])
        if arm == "late":
            return replace(record, sites=[])
        return replace(record, sites=[], has_recipe=True) if arm == "empty" else record

    arms = {"hp": 1.0, "dynamic": 1.0, "smooth": 1.0, "empty": 1.0, "late": 1.0}
    view = study(run, arms, change=change)
    said = study_verdict([view])
    assert said[-2:] == [f"Mind smooth: {note}", f"Mind empty: {NOTHING_CAST}"]
    cells = [arm_row(arm, view)[0] for arm in view.arms]
    assert cells == ["hp (no FP8)", "dynamic", "smooth *", "empty (no FP8) *", "late (no cast)"]
    assert f"* smooth: {note}" in arm_notes(view)
    assert "no FP8: hp trained in high precision, by design." in arm_notes(view)
    assert "no cast: whether late trained in FP8 is not in the log." in arm_notes(view)
    whole = replace(
        build_view(write_planted(tmp_path / "run", steps=20)),
        run=None, scenarios=[view], verdict=said,
    )  # fmt: skip
    data = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert data["verdict"] == said
    assert [arm["notes"] for arm in data["scenarios"][0]["arms"]][2] == [note]
    assert "tokens_per_s" not in data["scenarios"][0]["arms"][0]
    page = write_page(whole, tmp_path / "page.html").read_text()
    assert page.count("&#39;mlp.down_proj&#39; matched no layer") == 2


def test_of_many_comparisons_one_that_barely_stands_out_is_not_claimed(run: RunRecord) -> None:
    """Four arms equal dynamic, and one is off by what is past 95 % of one comparison only."""
    gaps = {"a": [0.010, 0.011, 0.016], "b": [-0.01, 0.02, 0.0], "c": [0.02, -0.01, 0.0],
            "d": [0.01, 0.0, -0.02], "e": [-0.02, 0.01, 0.01]}  # fmt: skip

    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        shift = gaps[arm][seed] if arm in gaps else 0.0
        return replace(clamped(record), loss=[2.0 + seed + shift] * STEPS)

    view = study(run, dict.fromkeys(["dynamic", *gaps], 1.0), planted=False, change=change)
    p = ttest_rel([2 + s + g for s, g in enumerate(gaps["a"])], [2, 3, 4]).pvalue
    assert 0.05 / 5 < p < 0.05
    (said,) = study_verdict([view])
    assert "a (+0.0123) stands apart from dynamic, which among 5 comparisons may be chance" in said
    assert "no other arm can be told from dynamic with 3 seeds" in said
    cells = {arm.name: arm_row(arm, view)[2] for arm in view.arms}
    assert cells["a"].endswith(" may be chance")
    assert not any("differs" in cell for cell in cells.values())
    (harm,) = [line for line in view.findings if line.startswith("a clamped")]
    assert harm.endswith("apart, which among 5 comparisons may be chance.")


def test_comparisons_of_all_scenarios_are_counted_in_each(run: RunRecord) -> None:
    two = [study(run, {"dynamic": 1.0, "a": 1.0, "b": 1.0}, planted=planted)
           for planted in (True, False)]  # fmt: skip
    assert [view.comparisons for view in two] == [4, 2]
    assert [view.comparisons for view in counted_together(two)] == [6, 6]


def test_a_difference_that_all_comparisons_together_allow_is_claimed(run: RunRecord) -> None:
    view = study(run, {"dynamic": 1.0, "delayed": 1.0, "b": 1.0}, planted=False,
                 shifts={"delayed": 0.5})  # fmt: skip
    said = study_verdict([view])
    assert said[0].startswith(
        "In the final loss (scenario text) delayed is above dynamic by 0.5 (95 %: +0.49"
    )
    assert said[1].startswith("2 comparisons with dynamic were made")


def test_one_planted_step_is_no_steps(run: RunRecord) -> None:
    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        return replace(record, planted=[40])

    said = study_verdict([study(run, {"dynamic": 1.0, "delayed": 2.4}, change=change)])
    assert "at the planted step (scenario outlier)" in said[0]
    assert not any("1 planted step" in line for line in said)


def test_differences_are_seed_by_seed_and_thinned_to_nothing_else(run: RunRecord) -> None:
    view = study(run, {"dynamic": 1.0, "delayed": 2.4})
    assert list(view.differences) == ["delayed"]
    band = view.differences["delayed"]
    table = np.array([
        np.array(losses("delayed", s, 2.4)) - losses("dynamic", s) for s in range(SEEDS)
    ])  # fmt: skip
    at = [int(step) for step in band.step]
    assert at == list(range(STEPS))
    assert band.mean == pytest.approx(table.mean(axis=0)[at])
    assert band.low == pytest.approx(table.min(axis=0)[at])
    assert band.high == pytest.approx(table.max(axis=0)[at])


def clamped(record: RunRecord) -> RunRecord:
    sites = [
        replace(s, totals=replace(s.totals, saturated=5, clamped_rows=5)) for s in record.sites
    ]
    return replace(record, sites=sites)


def exact(shifts: dict[str, list[float]], lost: tuple[str, ...] = ()):
    """Return a change of runs: losses of 3 + seed but for a shift a seed; the lost ones end in NaN.

    Shifts are of the loss at planted steps as a factor, and of all others as a difference.
    """

    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        loss = np.full(STEPS, 3.0 + seed)
        if arm in shifts:
            loss += shifts[arm][seed]
            loss[PLANTED] *= 1 + shifts[arm][seed]
        if arm in lost:
            loss[30:] = math.nan
        return replace(record, loss=loss.tolist(), spikes=[])

    return change


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_an_arm_diverged_nothing_is_said_of_every_arm(run: RunRecord, seeds: int) -> None:
    arms = dict.fromkeys(["dynamic", "delayed", "a", "b"], 1.0)
    noise = {"a": [0.001, -0.002, 0.0015], "b": [-0.001, 0.001, 0.002]}
    for shifts, rest in (({}, "a and b equal"), (noise, "a and b cannot be told")):
        view = study(run, arms, seeds=seeds, change=exact(shifts, ("delayed",)))
        said = " ".join(study_verdict([view]))
        lost = "its only seed" if seeds == 1 else "3 of 3 seeds"
        assert f"The loss of delayed is not finite with {lost} (scenario outlier)" in said
        assert "every arm" not in said
        assert "no arm" not in said
        assert "no other arm" not in said
        if seeds == 3:
            assert rest in said
    said = " ".join(study_verdict([study(run, arms, seeds=seeds, change=exact({}))]))
    assert "every arm" in said


def test_where_an_arm_has_no_common_seed_yet_nothing_is_said_of_every_arm(run: RunRecord) -> None:
    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        status = "running" if arm == "delayed" else "finished"
        return replace(exact({"a": [1e-3, -2e-3, 1.5e-3]})(arm, seed, record), status=status)

    view = study(run, dict.fromkeys(["dynamic", "delayed", "a"], 1.0), change=change, planted=False)
    said = " ".join(study_verdict([view], is_whole=False))
    assert "a cannot be told from dynamic with 3 seeds" in said
    assert "no arm" not in said


def test_one_finished_seed_is_told_apart_from_three(run: RunRecord) -> None:
    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        status = "running" if arm == "b" and seed else "finished"
        shifts = {"a": [1e-3, -2e-3, 1.5e-3], "b": [0.004, 0.0, 0.0]}
        return replace(exact(shifts)(arm, seed, record), status=status)

    view = study(run, dict.fromkeys(["dynamic", "a", "b"], 1.0), change=change, planted=False)
    said = " ".join(study_verdict([view], is_whole=False))
    size = ttest_rel([3.001, 3.998, 5.0015], [3, 4, 5]).confidence_interval(0.95)
    assert (
        f"a cannot be told from dynamic with 3 seeds (a difference over "
        f"{(size.high - size.low) / 2:.3g} would show); of b (+0.004) one seed was seen" in said
    )
    assert "with 1 seed" not in said


def test_above_the_bar_but_not_among_all_comparisons_may_be_chance(run: RunRecord) -> None:
    """The interval alone is above 1.05; its p is not below 0.05 over the comparisons made."""
    factors = {"delayed": [1.0, 1.6, 0.7]}
    calm = {name: [0.0, 1e-5, -1e-5] for name in ("a", "b", "c")}

    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        loss = np.full(STEPS, 3.0 + seed)
        loss[PLANTED] *= 1 + {**factors, **calm}.get(arm, [0.0] * 3)[seed]
        return replace(record, loss=loss.tolist(), spikes=[])

    logs = np.log1p(factors["delayed"])
    test = ttest_rel(logs, np.zeros(3))
    view = study(run, dict.fromkeys(["dynamic", *factors, *calm], 1.0), change=change)
    assert 0.05 / view.comparisons < test.pvalue < 0.05
    assert test.confidence_interval(0.95).low > math.log(1.05)
    said = " ".join(study_verdict([view]))
    assert (
        "stands above dynamic at the 2 planted steps (scenario outlier), which among "
        f"{view.comparisons} comparisons may be chance." in said
    )
    assert "delayed is hurt" not in said
    assert "Whether" not in said


@pytest.mark.parametrize(("factor", "wrong"), [
    ([0.80, 0.88, 0.85], "dynamic itself is hurt at"),
    ([2.0, 2.6, 1.7], "the loss of dynamic at planted"),
])  # fmt: skip
def test_training_without_fp8_is_held_to_the_same_rule(
    run: RunRecord, factor: list[float], wrong: str
) -> None:
    def change(arm: str, seed: int, record: RunRecord) -> RunRecord:
        loss = np.full(STEPS, 3.0 + seed)
        loss[PLANTED] *= factor[seed] if arm == "hp" else 1.0
        loss[PLANTED] *= 1 + (1e-5 * (seed - 1) if arm in "abcde" else 0.0)
        return replace(record, loss=loss.tolist(), spikes=[])

    few = study(run, {"dynamic": 1.0, "hp": 1.0}, change=change)
    assert any(wrong in line for line in study_verdict([few]))
    p = ttest_rel(np.log(factor), np.zeros(3)).pvalue
    many = replace(few, name="again")
    more = study(run, dict.fromkeys(["dynamic", "hp", *"abcde"], 1.0), change=change)
    assert 0.05 / few.comparisons > p > 0.05 / (more.comparisons + many.comparisons)
    assert not any(wrong in line for line in study_verdict([more, many]))
