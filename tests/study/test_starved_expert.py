"""A starved expert in FP8: its stale scale clamps what comes late, costs the loss, and is named."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unclamp.explain import Limits, explain_spike
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.report import build_view
from unclamp.runlog import RunLog
from unclamp.scaling import Delayed, HighPrecision
from unclamp.study.arms import switch_to_dynamic, worst_sites
from unclamp.study.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutlierConfig,
    StudyConfig,
    default_toml,
)
from unclamp.study.loop import RunPlan, train
from unclamp.study.models import build_model, convert_arm
from unclamp.study.outlier import GAIN, TILT
from unclamp.study.starved import EXPERT, LOUD, LOUDER

SITE = SiteName("model.layers.1.mlp.experts.down_proj.3", "input")
FIRST, EVERY, STEPS, SEEDS = 20, 4, 36, (0, 1)
ARMS = ("hp", "dynamic", "delayed", "guarded")
WIDTH = 32


def study() -> StudyConfig:
    """Weights that hardly move, so that what reaches the expert is known by hand."""
    return replace(
        StudyConfig.from_toml(default_toml()),
        scenarios=("outlier",),
        seeds=SEEDS,
        steps=STEPS,
        data=DataConfig(batch_size=4, seq_len=64),
        model=ModelConfig(
            architecture="moe", hidden_size=WIDTH, intermediate_size=32, layers=2, heads=2
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        outlier=OutlierConfig(first_step=FIRST, every=EVERY),
    )


def planned(arm: str, seed: int, path: Path, **changes: Any) -> RunPlan:
    config = study()
    recipe = config.arms[arm].recipe
    plan = RunPlan(
        config=config, scenario="outlier", arm=arm, seed=seed, recipe=recipe, path=path / str(seed)
    )
    return replace(plan, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    root = tmp_path_factory.mktemp("starved")
    found = {}
    for arm in ARMS:
        for seed in SEEDS:
            plan = planned(arm, seed, root / arm)
            train(plan)
            found[arm, seed] = plan.path
    return found


def losses(run: Path) -> np.ndarray:
    with RunLog.open(run) as log:
        return np.array(log.steps()["loss"].to_pylist())


def casts_of(run: Path, site: SiteName) -> dict[int, dict[str, Any]]:
    """Return the rows of a site in which anything was cast, by step."""
    with RunLog.open(run) as log:
        rows = log.sql(
            "SELECT step, elements, saturated, recast, amax, amax * scale / format_max AS overshoot"
            f" FROM casts JOIN sites USING (rank, site) WHERE fqn = '{site.fqn}' AND "
            f"role = '{site.role}' AND elements > 0"
        ).to_pylist()
    return {row["step"]: row for row in rows}


def visits() -> list[int]:
    return study().marked_steps("outlier")


@pytest.mark.parametrize("arm", ARMS[1:])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_expert_sees_tokens_at_marked_steps_alone(
    arm: str, seed: int, runs: dict[tuple[str, int], Path]
) -> None:
    assert sorted(casts_of(runs[arm, seed], SITE)) == visits()
    other = SiteName(SITE.fqn.replace(".3", ".0"), "input")
    assert len(casts_of(runs[arm, seed], other)) > len(visits())


@pytest.mark.parametrize("seed", SEEDS)
def test_delayed_scaling_clamps_each_visit_but_the_first_by_what_follows_by_hand(
    seed: int, runs: dict[tuple[str, int], Path]
) -> None:
    """The scale is that of the last visit, whose activation is an eighth."""
    assert len(visits()) == len(LOUD)
    rows = casts_of(runs["delayed", seed], SITE)
    seen = GAIN * TILT * math.sqrt(WIDTH)
    gated = seen * seen / (1 + math.exp(-seen))
    for number, step in enumerate(visits()):
        amax = rows[step]["amax"]
        assert amax == pytest.approx(gated * 8**number / 128, rel=0.2)
        assert rows[step]["overshoot"] == pytest.approx(8 if number else 1, rel=0.2)
        seen_before = [rows[earlier]["amax"] for earlier in visits()[:number]] or [amax]
        assert rows[step]["overshoot"] == pytest.approx(amax / max(seen_before), rel=1e-5)
        assert (rows[step]["saturated"] > 0) == (number > 0)
    for arm in ("dynamic", "guarded"):
        kept = casts_of(runs[arm, seed], SITE)
        assert all(row["saturated"] == 0 for row in kept.values())
    recast = [casts_of(runs["guarded", seed], SITE)[step]["recast"] > 0 for step in visits()]
    assert recast == [False, True, True, True]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_of_delayed_scaling_is_higher_at_these_visits_and_equal_otherwise(
    seed: int, runs: dict[tuple[str, int], Path]
) -> None:
    curves = {arm: losses(runs[arm, seed]) for arm in ARMS}
    late = visits()[1:]
    ratio = curves["delayed"] / curves["dynamic"]
    assert (ratio[late] > 1.1).all()
    others = np.setdiff1d(np.arange(STEPS), late)
    assert ratio[others] == pytest.approx(1, abs=2e-3)
    for arm in ("hp", "guarded"):
        assert curves[arm] / curves["dynamic"] == pytest.approx(1, abs=2e-3)


def test_the_table_of_sites_names_the_expert(runs: dict[tuple[str, int], Path]) -> None:
    view = build_view(runs["delayed", 0])
    assert view.run is not None
    assert SITE.fqn in {row.fqn for row in view.run.sites[:4]}


def test_switching_the_worst_sites_to_dynamic_mends_the_expert(
    runs: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    config = study()
    delayed = [runs["delayed", seed] for seed in SEEDS]
    worst = worst_sites(delayed, config, "mixed")
    assert (SITE.fqn, SITE.role) in worst
    base = config.arms["delayed"].recipe
    assert base is not None
    train(planned("mixed", 0, tmp_path, recipe=switch_to_dynamic(base, worst)))
    assert losses(tmp_path / "0") == pytest.approx(losses(runs["dynamic", 0]), rel=2e-3)
    assert casts_of(tmp_path / "0", SITE)[visits()[1]]["saturated"] == 0
    other = SiteName(SITE.fqn.replace(f".{EXPERT}", ".0"), SITE.role)
    assert casts_of(tmp_path / "0", other)  # whose scaling nobody changed


def test_explain_names_the_expert(tmp_path: Path) -> None:
    """Of a run that learns, so that its second visit is above the level and has a snapshot.

    In FP8 are the experts of the last layer, so that few sites are to be asked.
    """
    recipe = Recipe.uniform(HighPrecision()).override(
        "model.layers.1.mlp.experts.*", input=Delayed(), weight=Delayed(), grad_output=Delayed()
    )
    config = replace(
        study(),
        steps=40,
        optimizer=OptimizerConfig(),
        outlier=OutlierConfig(first_step=30, every=6),
    )
    train(planned("delayed", 0, tmp_path, config=config, recipe=recipe))
    found = explain_spike(tmp_path / "0", limits=Limits(replays=40))
    assert found.onset == 36
    assert found.reproduced
    assert found.verdict == "clamping"
    assert found.named == [SITE]


def test_routers_are_left_out_on_purpose_and_named() -> None:
    config = study()
    recipe = config.arms["delayed"].recipe
    assert recipe is not None
    report = convert_arm(build_model(config.model), recipe, config.model)
    for layer in range(config.model.layers):
        assert f"model.layers.{layer}.mlp.gate" in report.skipped
    assert LOUDER == 8
