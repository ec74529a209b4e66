"""A part of the benchmark's planted cases, and the study's own scenario.

The truth of a case is found without a replay: by training anew from the start.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from truths.llamas import SPIKE as LLAMA_SPIKE
from truths.llamas import LlamaCase
from truths.trainings import SPIKE, Case, explain, losses_with, record
from unclamp.explain import Limits, explain_spike
from unclamp.names import SiteName
from unclamp.scaling import Delayed
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.loop import RunPlan, build_model, train
from unclamp.study.outlier import down_projection


def test_the_truth_is_what_training_anew_gives(tmp_path: Path) -> None:
    """Un-clamped from the start, the planted sites make no spike; any one of them leaves one."""
    case = Case(paths=((3.0, 1.0), (1.0,)))
    plain = losses_with(case, [])
    assert plain == record(case, tmp_path / "run")
    level = plain[SPIKE - 1]
    assert losses_with(case, case.culprits)[SPIKE] < 1.1 * level
    for site in case.culprits:
        others = [other for other in case.culprits if other != site]
        assert losses_with(case, others)[SPIKE] > 1.5 * level


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        LlamaCase(seed=0),
        LlamaCase(layout="first", seed=4, scaling=Delayed(history_len=4)),
        LlamaCase(layout="parallel", seed=6),
        LlamaCase(layout="series", seed=10),
        Case(seed=21, paths=((2.0, 2.0, 1.0),), decoys=2),
        Case(seed=33, paths=((1.0,), (1.0,), (1.0,)), decoys=3, size=128.0),
        Case(seed=35, paths=((3.0, 1.0), (2.0,))),
    ],
)
def test_planted_sets_are_named_and_their_shares_add_up(
    case: Case | LlamaCase, tmp_path: Path
) -> None:
    record(case, tmp_path / "run", lead=4)
    found = explain(case, tmp_path / "run")
    assert found.named == case.culprits
    assert found.clamped_sites > len(case.culprits)
    at = SPIKE if isinstance(case, Case) else LLAMA_SPIKE
    plain, free = losses_with(case, [])[at], losses_with(case, case.culprits)[at]
    assert found.clamping_share is not None
    without = plain - found.clamping_share * (plain - min(free, found.level))
    assert without == pytest.approx(free, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["bad batch", "learning rate"])
def test_a_llama_with_another_cause_is_not_blamed_on_clamping(other: str, tmp_path: Path) -> None:
    case = LlamaCase(layout="decoys", other=other, seed=53)
    record(case, tmp_path / "run")
    found = explain(case, tmp_path / "run")
    assert found.verdict == "not clamping"
    assert found.clamped_sites > 5


@pytest.mark.slow
def test_a_run_of_the_study_is_explained_by_its_folder_alone(tmp_path: Path) -> None:
    base = StudyConfig.from_toml(default_toml())
    study = replace(base, steps=50)
    plan = RunPlan(
        config=study,
        scenario="outlier",
        arm="delayed",
        seed=0,
        recipe=study.arms["delayed"].recipe,
        path=tmp_path / "run",
    )
    train(plan)
    found = explain_spike(tmp_path / "run", limits=Limits(replays=50))
    assert found.reproduced
    assert found.verdict == "clamping"
    assert found.named == [SiteName(down_projection(build_model(study.model)), "input")]
    gradients = [s for s in found.sites if s.role == "grad_output" and s.overshoot > 50]
    assert gradients  # they clamp by more, and caused nothing
    assert all(abs(site.share) < 0.02 for site in gradients)
