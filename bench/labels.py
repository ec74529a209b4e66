"""Does clamping of gradients do harm where few labels meet a mean, with nothing planted?

    .venv/bin/python -m bench.labels runs/labels [--seeds 100 101] [--arms delayed dynamic]

Trains scenario `labels` of the study, one run after the other, in the settings that lab/LOG.md
fixed beforehand. A finished run is not repeated, so several of these commands with seeds of their
own can share a folder. Then prints the table over all runs that are there.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from unclamp.recipe import Recipe
from unclamp.runlog import is_run, read_header
from unclamp.scaling import Delayed, Dynamic, Guarded
from unclamp.study.config import (
    ArmConfig,
    DataConfig,
    LabelsConfig,
    ModelConfig,
    OptimizerConfig,
    StudyConfig,
)
from unclamp.study.loop import RunPlan, train

SEEDS = tuple(range(100, 108))
STEPS, AFTER = 360, 100
"""Steps of a run, and the first one whose few-label step counts."""
ARMS: dict[str, Recipe | None] = {
    "dynamic": Recipe.uniform(Dynamic()),
    "delayed": Recipe.uniform(Delayed()),
    "gradients-guarded": Recipe(grad_output=Guarded()),
    "hp": None,
    "guarded": Recipe.uniform(Guarded()),
    "history-1024": Recipe.uniform(Delayed(1024)),
    "margin-4": Recipe.uniform(Delayed(margin=4)),
}
BASELINE = "dynamic"


def config(seeds: Sequence[int] = SEEDS) -> StudyConfig:
    """Return the study, whose batches have 512 labelled bytes, and every 20th has 8."""
    return StudyConfig(
        scenarios=("labels",),
        seeds=tuple(seeds),
        steps=STEPS,
        data=DataConfig(batch_size=4, seq_len=128),
        model=ModelConfig(layers=4, hidden_size=128),
        optimizer=OptimizerConfig(lr=3e-3, grad_clip=1.0),
        labels=LabelsConfig(every=20, labels=8),
        arms={name: ArmConfig(recipe=recipe) for name, recipe in ARMS.items()},
    )


def train_missing(out: Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Train the runs that are not finished, seed by seed, so that every seed has all arms."""
    study = config(seeds)
    plans = [
        RunPlan(
            config=study,
            scenario="labels",
            arm=arm,
            seed=seed,
            recipe=ARMS[arm],
            path=out / arm / f"seed-{seed}",
        )
        for seed in seeds
        for arm in arms
    ]
    todo = [plan for plan in plans if not _is_finished(plan.path)]
    for plan in track(todo, "training", console=Console(stderr=True)):
        shutil.rmtree(plan.path, ignore_errors=True)
        train(plan)
        print(f"finished: {plan.label}", flush=True)


def _is_finished(path: Path) -> bool:
    return is_run(path) and read_header(path).status == "finished"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.labels", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_missing(arguments.out, arguments.seeds, arguments.arms)
