"""The arm `autopilot`: closed loop on a tiny model whose planted outlier comes again and again."""

from dataclasses import replace
from pathlib import Path

import pytest

from unclamp import Delayed, Rule, RunLog, backtest
from unclamp.errors import StudyError
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.loop import RunPlan, train

PLANTED = [8, 15, 22]
RULE = Rule(floor=20)


def config() -> StudyConfig:
    base = StudyConfig.from_toml(default_toml()).to_dict()
    return StudyConfig.from_dict(
        base
        | {
            "model": {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2},
            "data": {"batch_size": 2, "seq_len": 32},
            "outlier": {"first_step": PLANTED[0], "every": 7},
            "steps": 26,
            "arms": base["arms"]
            | {
                "delayed": {"recipe": {"input": {"scaling": "delayed", "history_len": 4}}},
                "autopilot": {"from": "delayed", "autopilot": "ladder=delayed(4) > guarded, "
                              "floor=20"},
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train the arm `delayed`, and steered by a rule that was tried on that log."""
    out, study = tmp_path_factory.mktemp("study"), config()
    recipe = study.arms["delayed"].recipe
    plans = [
        RunPlan(
            config=study, scenario="outlier", arm=arm, seed=0, recipe=recipe,
            path=out / arm / "seed-0", rule=study.arms[arm].autopilot,
        )
        for arm in ("delayed", "autopilot")
    ]  # fmt: skip
    train(plans[0])
    rule = study.arms["autopilot"].autopilot
    assert rule is not None
    plans[1].backtest.parent.mkdir()
    backtest(plans[0].path, rule).save(plans[1].backtest)
    train(plans[1])
    return {plan.arm: plan.path for plan in plans}


def planted_clamps(path: Path) -> dict[int, float]:
    """Return the largest overshoot of clamped inputs of the planted product, by planted step."""
    with RunLog.open(path) as log:
        rows = log.sql(
            "SELECT step, max(amax * scale / format_max) AS overshoot FROM casts "
            "JOIN sites USING (rank, site) WHERE fqn LIKE '%down_proj' AND role = 'input' "
            "AND saturated > 0 AND amax * scale > 2 * format_max GROUP BY step ORDER BY step"
        ).to_pylist()
    return {row["step"]: row["overshoot"] for row in rows}


def test_outliers_clamp_once_and_never_again(runs: dict[str, Path]) -> None:
    assert set(PLANTED) <= set(planted_clamps(runs["delayed"]))
    steered = planted_clamps(runs["autopilot"])
    assert PLANTED[0] in steered
    assert not {step for step in steered if step > PLANTED[0]}


def test_the_log_of_the_closed_loop_says_what_was_read(runs: dict[str, Path]) -> None:
    """A site that went up is cast by guarded scaling: it repeats a cast and clamps none."""
    with RunLog.open(runs["autopilot"]) as log:
        (count,) = log.sql(
            "SELECT count(*) AS casts, sum(recast) AS again FROM casts "
            "JOIN sites USING (rank, site) WHERE NOT only_counted"
        ).to_pylist()
        switched = log.switches().to_pylist()
        header = log.header
    assert 1 + count["again"] / count["casts"] < 1.2
    assert {(s["fqn"].rsplit(".", 1)[1], s["role"]) for s in switched} >= {("down_proj", "input")}
    assert header.metadata["autopilot"].startswith("ladder=delayed(4)")


def test_both_arms_are_alike_until_the_first_decision(runs: dict[str, Path]) -> None:
    losses, first = [], 0
    for path in runs.values():
        with RunLog.open(path) as log:
            losses.append(log.steps()["loss"].to_pylist())
            first = log.sql("SELECT min(step) AS step FROM switches").to_pylist()[0]["step"]
    assert losses[0][:first] == losses[1][:first]


def test_an_arm_is_read_back_with_its_rule() -> None:
    study = config()
    assert StudyConfig.from_dict(study.to_dict()) == study
    default = StudyConfig.from_toml(default_toml()).arms["autopilot"]
    assert (default.from_arm, default.autopilot) == ("delayed", Rule())
    rule = study.arms["autopilot"].autopilot
    assert rule is not None
    assert rule == replace(RULE, ladder=rule.ladder)
    assert rule.ladder[0] == Delayed(4)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"autopilot": True}, "has autopilot without from"),
        ({"from": "delayed", "autopilot": False}, "expected autopilot = true"),
        ({"from": "delayed", "autopilot": True, "switch_worst": 2}, "no switch_worst"),
        ({"from": "delayed", "autopilot": 3}, "expected a str"),
        ({"from": "nobody", "autopilot": True}, "must be an arm with a recipe"),
    ],
)
def test_a_wrong_arm_is_refused_with_a_reason(arm: dict[str, object], said: str) -> None:
    base = StudyConfig.from_toml(default_toml()).to_dict()
    with pytest.raises(StudyError, match=said):
        StudyConfig.from_dict(base | {"arms": base["arms"] | {"mine": arm}})
