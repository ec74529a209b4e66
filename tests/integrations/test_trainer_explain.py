"""A spike of a run of transformers' Trainer: was it the clamping?"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_explained
import unclamp
from hf_explained import SPIKE, build, made
from hf_training import differing, everything, recorded, trainer
from unclamp.explain import Limits
from unclamp.integrations.transformers import attach

RECIPE = unclamp.Recipe.uniform(unclamp.Delayed())


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train with the planted example, and explain the spike with the trainer at hand."""
    folder = tmp_path_factory.mktemp("spiked")
    own, attached = made(RECIPE, folder / "run", snapshots={"every": 5}, build=build)
    own.train()
    before = everything(own)
    answer = attached.explain()
    return {"run": folder / "run", "trainer": own, "before": before, "answer": answer}


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step."""
    return {step: loss for step, loss, *_ in recorded(run)}


def test_the_planted_clamp_is_named_and_training_anew_without_it_has_no_spike(
    spiked: dict[str, Any], tmp_path: Path
) -> None:
    answer = spiked["answer"]
    assert answer.onset == SPIKE
    assert answer.reproduced
    assert answer.verdict == "clamping"
    named = {str(site) for site in answer.named}
    assert "layers.0 input" in named
    recipe = RECIPE
    for site in answer.named:
        unclamped: dict[str, Any] = {site.role: unclamp.Guarded()}
        recipe = recipe.override(f"^{site.fqn}", **unclamped)
    anew, _ = made(recipe, tmp_path / "anew")
    anew.train()
    before, after = losses(spiked["run"]), losses(tmp_path / "anew")
    level = sorted(before[step] for step in range(SPIKE - 9, SPIKE))[4]
    rise, left = before[SPIKE] - level, after[SPIKE] - level
    assert rise > 0.5 * level
    assert left < 0.1 * rise


def test_the_trainer_is_as_it_was_after_the_explanation(spiked: dict[str, Any]) -> None:
    assert differing(spiked["before"], everything(spiked["trainer"])) == []


def test_another_process_finds_the_build_function_by_its_name(spiked: dict[str, Any]) -> None:
    answer = unclamp.explain_spike(spiked["run"])
    assert answer.verdict == "clamping"
    assert answer.named == spiked["answer"].named
    assert answer.to_dict()["counterfactuals"] == spiked["answer"].to_dict()["counterfactuals"]


def test_a_build_function_that_is_named_afterwards_serves(tmp_path: Path) -> None:
    own, _ = made(RECIPE, tmp_path / "run", snapshots=True)
    own.train()
    file = f"{hf_explained.__file__}:build"
    answer = unclamp.explain_spike(tmp_path / "run", build=file)
    assert answer.verdict == "clamping"
    with pytest.raises(unclamp.ReplayError, match="does not name a build function"):
        unclamp.explain_spike(tmp_path / "run")


def test_replays_come_back_with_dropout_accumulation_and_bf16(tmp_path: Path) -> None:
    own = trainer(
        tmp_path, bf16=True, gradient_accumulation_steps=2, max_steps=12, learning_rate=0.05
    )
    attached = attach(own, RECIPE, tmp_path / "run", snapshots={"write": "all", "every": 4})
    own.train()
    worst = max(losses(tmp_path / "run").items(), key=lambda each: (each[0] > 6, each[1]))[0]
    answer = attached.explain(at=worst, limits=Limits(replays=4))
    assert answer.reproduced, answer.differences


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    with pytest.raises(unclamp.ReplayError, match="name one"):
        attach(own, RECIPE, snapshots=True)
    with pytest.raises(unclamp.UnsupportedError, match="goes back in the data"):
        attach(own, RECIPE, tmp_path / "run", snapshots={"on_spike": "explain"})
    assert not unclamp.nn.find_ledgers(own.model)
    attached = attach(own, RECIPE, tmp_path / "run", snapshots=True)
    with pytest.raises(unclamp.ReplayError, match=r"explain\(\) after"):
        attached.explain()
    assert torch.is_grad_enabled()
