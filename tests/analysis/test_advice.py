"""Advice on planted logs: what needs more than delayed scaling gets it, and nothing else does."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from test_cli import assert_one_clear_line, unclamp
from truths.amax_logs import Site, write_amaxes
from unclamp.analysis.advice import Advice, advise, reasons
from unclamp.analysis.advice.groups import kind_of
from unclamp.analysis.advice.tails import tail, trend
from unclamp.errors import AnalysisError
from unclamp.recipe import Recipe
from unclamp.rule import ROLES
from unclamp.runlog import RunLog
from unclamp.scaling import Delayed, Guarded

STEPS = 600
NAMES = [f"layers.{i}.{kind}" for i in range(3) for kind in ("up_proj", "down_proj")]


def calm(seed: int, steps: int = STEPS, noise: float = 0.05) -> dict[Site, np.ndarray]:
    """Return amaxes that stay within some percent of 1."""
    generator = np.random.default_rng(seed)
    return {
        (name, role): np.exp(noise * generator.standard_normal(steps))
        for name in NAMES
        for role in ROLES
    }


def advice_on(path: Path, amaxes: Mapping[Site, np.ndarray], **asked: float) -> Advice:
    with RunLog.open(write_amaxes(path, amaxes)) as log:
        return advise(log, **asked)  # type: ignore[arg-type]


def test_a_calm_run_says_that_it_does_not_matter(tmp_path: Path) -> None:
    advice = advice_on(tmp_path / "run", calm(0))
    assert advice.verdict == "does not matter"
    assert advice.recipe == Recipe.uniform(Delayed())
    assert advice.reads == 1.0
    assert reasons(advice)[0].startswith("It does not matter here")


@pytest.mark.parametrize(
    ("role", "outlier"),
    [("input", 5.0), ("weight", 5.0), ("grad_output", 40.0), *((role, 300.0) for role in ROLES)],
)
def test_only_the_kind_of_layer_that_needs_it_is_guarded(
    outlier: float, role: str, tmp_path: Path
) -> None:
    amaxes = calm(1)
    amaxes["layers.1.down_proj", role][100::70] *= outlier
    advice = advice_on(tmp_path / "run", amaxes)
    assert advice.verdict == "matters"
    expected = {"down_proj": {role: Guarded()}, "up_proj": {}}
    for name in NAMES:
        for each in ROLES:
            wanted = expected[name.split(".")[-1]].get(each, Delayed())
            assert advice.recipe.plan(name).operands[each].scaling == wanted
    first = advice.groups[0]
    assert (first.group.match, first.group.role) == ("*.down_proj", role)
    assert first.hardest == "layers.1.down_proj"
    assert first.first_hard == 100
    # Outliers come at 100, 170, ...: each outruns a history of 16, and none is a false one.
    assert first.hard == len(range(100, STEPS, 70))
    assert first.overshoot == pytest.approx(outlier, rel=0.3)
    assert 1.0 < advice.reads < 1.01
    assert f"down_proj {role}" in " ".join(reasons(advice))
    assert Recipe.from_toml(advice.recipe.to_toml()) == advice.recipe


def test_a_longer_history_is_advised_where_that_is_enough(tmp_path: Path) -> None:
    """An outlier every 40 steps, the first at once: 16 forget it, 128 do not."""
    amaxes = calm(2)
    amaxes["layers.0.up_proj", "input"][0::40] = 9
    advice = advice_on(tmp_path / "run", amaxes)
    assert advice.recipe.plan("layers.2.up_proj").operands["input"].scaling == Delayed(128)
    assert advice.reads == 1.0


def test_mild_clamping_is_tolerated_up_to_what_the_user_says(tmp_path: Path) -> None:
    amaxes = calm(3)
    amaxes["layers.0.up_proj", "weight"][50::60] *= 2  # loses at most a quarter of its squares
    with RunLog.open(write_amaxes(tmp_path / "run", amaxes)) as log:
        assert advise(log).verdict == "does not matter"
        assert advise(log, harm=0.1).verdict == "matters"
        strict = advise(log, harm=0.0).recipe.plan("layers.1.up_proj").operands["weight"]
    assert strict.scaling == Guarded()


def test_gradients_may_overshoot_further(tmp_path: Path) -> None:
    """Gradients that overshot 14 to 25 times did no harm in trainings; inputs are not spared."""
    amaxes = calm(15)
    amaxes["layers.0.up_proj", "grad_output"][50::60] *= 15
    with RunLog.open(write_amaxes(tmp_path / "run", amaxes)) as log:
        assert advise(log).verdict == "does not matter"
        assert advise(log, harm=0.5).verdict == "matters"


def test_an_outlier_is_kept_all_the_way(tmp_path: Path) -> None:
    """It outruns mildly where it comes in and hard further on; at other steps mild is harmless."""
    amaxes = calm(16)
    steps = np.arange(100, STEPS - 70, 70)
    amaxes["layers.0.up_proj", "input"][steps] *= 2.5
    amaxes["layers.0.down_proj", "input"][steps] *= 12
    amaxes["layers.0.up_proj", "grad_output"][steps] *= 12
    amaxes["layers.0.up_proj", "weight"][steps + 35] *= 2.5
    amaxes["layers.0.down_proj", "grad_output"][steps + 35] *= 12
    advice = advice_on(tmp_path / "run", amaxes)
    up = {role: o.scaling for role, o in advice.recipe.plan("layers.1.up_proj").operands.items()}
    assert up == {"input": Guarded(), "weight": Delayed(), "grad_output": Guarded()}
    down = advice.recipe.plan("layers.1.down_proj").operands
    assert down["grad_output"].scaling == Delayed()
    told = {(g.group.match, g.group.role): (g.hard, g.beside) for g in advice.groups}
    assert told["*.down_proj", "input"] == (len(steps), 0)
    assert told["*.up_proj", "input"] == (0, len(steps))
    assert told["*.up_proj", "grad_output"] == (0, len(steps))
    said = f"{len(steps)} are of steps in which values outran theirs harder"
    assert said in " ".join(reasons(advice))


def test_a_short_log_is_too_short(tmp_path: Path) -> None:
    amaxes = calm(4, steps=40)
    amaxes["layers.0.up_proj", "input"][30] *= 100
    advice = advice_on(tmp_path / "run", amaxes)
    assert advice.verdict == "too short"
    assert "too short to say" in reasons(advice)[0]


def test_a_budget_is_kept_and_said(tmp_path: Path) -> None:
    amaxes = calm(5)
    amaxes["layers.0.up_proj", "input"][20::17] *= 100
    with RunLog.open(write_amaxes(tmp_path / "run", amaxes)) as log:
        free, tight = advise(log), advise(log, budget=1.0)
    assert free.reads > 1.0 == tight.reads
    assert tight.verdict == "matters"
    assert "To keep the budget" in " ".join(reasons(tight))


def test_a_rate_that_rises_is_told_and_a_steady_one_is_not(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    rising, steady = calm(6, steps=2000), calm(7, steps=2000)
    chance = np.linspace(0, 0.06, 2000)
    rising["layers.0.up_proj", "input"][generator.random(2000) < chance] *= 3
    steady["layers.0.up_proj", "input"][generator.random(2000) < 0.03] *= 3
    told = advice_on(tmp_path / "rising", rising)
    assert [g.group.match for g in told.groups if g.rises] == ["*.up_proj"]
    assert "more and more often at up_proj input" in " ".join(reasons(told))
    not_told = advice_on(tmp_path / "steady", steady)
    assert not any(g.rises for g in not_told.groups)


def test_steady_rates_are_called_rising_in_about_one_of_forty_cases() -> None:
    generator = np.random.default_rng(8)
    wrong = 0
    for _ in range(200):
        step = np.flatnonzero(generator.random(2000) < 0.02)
        found = trend(step, first=0, last=1999, shortest=16)
        wrong += found.p < 0.05 and found.tau > 0
    assert wrong <= 12  # 5 expected; more than 12 happen in 0.2 % of all cases


def test_the_largest_to_come_lies_in_its_interval() -> None:
    hits = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        seen = 2 ** generator.exponential(0.5, 100)
        found = tail(np.arange(100) * 10, seen, steps=1000, ahead=5000)
        assert found is not None
        assert found.reaches
        future = 2 ** generator.exponential(0.5, generator.poisson(500)).max()
        hits += found.low <= future <= found.high
    assert hits >= 17


def test_a_forecast_ends_at_ten_times_the_log(tmp_path: Path) -> None:
    generator = np.random.default_rng(9)
    seen = 2 ** generator.exponential(0.5, 100)
    found = tail(np.arange(100) * 10, seen, steps=1000, ahead=10**7)
    assert found is not None
    assert (found.steps, found.reaches) == (10_000, False)
    assert tail(np.arange(20), seen[:20], steps=1000, ahead=5000) is None
    advice = advice_on(tmp_path / "run", calm(10, noise=0.0), horizon=10**6)
    assert "below 0.5 %" in " ".join(reasons(advice))  # 3 of 600 steps


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"harm": 1.0}, "harm"), ({"horizon": 0}, "horizon"), ({"budget": 0.5}, "budget")],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, float], said: str, tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match=said):
        advice_on(tmp_path / "run", calm(11, steps=60), **asked)


@pytest.mark.parametrize(
    ("fqn", "glob"),
    [
        ("model.layers.3.mlp.down_proj", "*.mlp.down_proj"),
        ("layers.0.experts.down_proj.5", "^layers.0.experts.down_proj.*"),
        ("lm_head", "^lm_head"),
        ("2", "^2"),
        ("", "^"),
    ],
)
def test_kinds_of_layers(fqn: str, glob: str) -> None:
    assert kind_of(fqn) == glob


def test_the_command_prints_reasons_and_a_recipe_to_paste(tmp_path: Path) -> None:
    amaxes = calm(12)
    amaxes["layers.1.down_proj", "input"][100::70] *= 50
    run = write_amaxes(tmp_path / "run", amaxes, metadata={"tokens_per_step": 1000})
    done = unclamp("advise", run, "--tokens", "3M")
    assert done.returncode == 0, done.stderr
    assert "- It matters" in done.stdout
    assert "3,000 steps are 5 times as long as the log" in " ".join(done.stdout.split())
    toml = done.stdout.split("Recipe.load:\n")[1]
    recipe = Recipe.from_toml(toml)
    assert recipe.plan("layers.0.down_proj").operands["input"].scaling == Guarded()
    data = json.loads(unclamp("advise", run, "--json").stdout)
    assert data["verdict"] == "matters"
    assert Recipe.from_dict(data["recipe"]) == recipe


def test_groups_beyond_the_first_ones_are_told_in_short(tmp_path: Path) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1")
    amaxes = {(f"layers.0.{kind}", "input"): np.ones(STEPS) for kind in kinds}
    for place, site in enumerate(amaxes):
        amaxes[site][100::70] = 50 + 10 * place
    said = reasons(advice_on(tmp_path / "run", amaxes))
    assert sum(": amax outran a history of 16 in" in each for each in said) == 6
    (rest,) = (each for each in said if each.startswith("Likewise"))
    assert rest == (
        "Likewise, in short: k_proj input (up to 60.00x): guarded(2); "
        "q_proj input (up to 50.00x): guarded(2)."
    )


def test_tokens_without_their_number_a_step_are_asked_for(tmp_path: Path) -> None:
    run = write_amaxes(tmp_path / "run", calm(13, steps=60))
    assert_one_clear_line(unclamp("advise", run, "--tokens", "1T"), "--tokens-per-step")
    done = unclamp("advise", run, "--tokens", "much", "--tokens-per-step", "4k")
    assert_one_clear_line(done, "expected a number such as 200B for --tokens, got 'much'")


def test_what_clamping_cost_takes_a_group_off_the_cheap_rungs(tmp_path: Path) -> None:
    """Mild overshoots that the run priced at a tenth of a step's loss, and others at nothing."""
    amaxes = calm(14)
    for name in ("layers.0.up_proj", "layers.0.down_proj"):
        amaxes[name, "input"][[150, 300]] *= 2
    run = write_amaxes(
        tmp_path / "run",
        amaxes,
        priced={
            ("layers.0.up_proj", "input"): 0.2,
            ("layers.1.up_proj", "input"): 0.004,  # at the same step, and not in its place
            ("layers.0.down_proj", "input"): 0.002,
        },
        clamped_at=(150, 300),
        loss=2.0,
    )
    with RunLog.open(run) as log:
        advice = advise(log)
    up = next(g for g in advice.groups if (g.group.match, g.group.role) == ("*.up_proj", "input"))
    assert up.price == pytest.approx(0.1)
    assert advice.verdict == "matters"
    assert advice.recipe.plan("layers.2.up_proj").operands["input"].scaling == Guarded()
    assert advice.recipe.plan("layers.2.down_proj").operands["input"].scaling == Delayed()
    assert "cost up to 10 % of a step's loss" in " ".join(reasons(advice))
