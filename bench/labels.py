"""Does clamping of gradients do harm where few labels meet a mean, with nothing planted?

    .venv/bin/python -m bench.labels runs/labels [--seeds 100 101] [--arms delayed dynamic]

Trains scenario `labels` of the study, one run after the other, in the settings that lab/LOG.md
fixed beforehand. A finished run is not repeated, so several of these commands with seeds of their
own can share a folder. Then prints the table over all runs that are there.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from bench.labels_why import AT, why
from unclamp.analysis.paired import paired_difference
from unclamp.recipe import Recipe
from unclamp.report.words import difference_cell
from unclamp.runlog import RunLog, is_run, read_header
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
from unclamp.written import percent

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


QUESTION = "\nHow many words? "


def config(seeds: Sequence[int] = SEEDS, *, question: str = "", steps: int = STEPS) -> StudyConfig:
    """Return the study, whose batches have 512 labelled bytes, and every 20th has 8."""
    return StudyConfig(
        scenarios=("labels",),
        seeds=tuple(seeds),
        steps=steps,
        data=DataConfig(batch_size=4, seq_len=128),
        model=ModelConfig(layers=4, hidden_size=128),
        optimizer=OptimizerConfig(lr=3e-3, grad_clip=1.0),
        labels=LabelsConfig(every=20, labels=8, question=question),
        arms={name: ArmConfig(recipe=recipe) for name, recipe in ARMS.items()},
    )


def train_missing(out: Path, study: StudyConfig, arms: Sequence[str]) -> None:
    """Train the runs that are not finished, seed by seed, so that every seed has all arms."""
    plans = [
        RunPlan(
            config=study,
            scenario="labels",
            arm=arm,
            seed=seed,
            recipe=ARMS[arm],
            path=out / arm / f"seed-{seed}",
        )
        for seed in study.seeds
        for arm in arms
    ]
    todo = [plan for plan in plans if not _is_finished(plan.path)]
    for plan in track(todo, "training", console=Console(stderr=True)):
        shutil.rmtree(plan.path, ignore_errors=True)
        train(plan)
        print(f"finished: {plan.label}", flush=True)


def _is_finished(path: Path) -> bool:
    return is_run(path) and read_header(path).status == "finished"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run says: mean losses, and of its gradients' casts at few-label steps, shares.

    Attributes:
        few: Mean loss over the few-label steps from `AFTER` on.
        ordinary: The same over all other steps from there on.
        clamped: Share of the casts of gradients at these few-label steps that clamped anything.
        error: Mean clamp error of those that did.
        overshoot: Median overshoot of those that did.
        recast: Share of all casts of the run that guarded scaling repeated.
    """

    few: float
    ordinary: float
    clamped: float
    error: float
    overshoot: float
    recast: float


def figures(path: Path) -> Figures:
    """Read a run."""
    is_few = f"step % 20 = 0 AND step >= {AFTER}"
    with RunLog.open(path) as log:
        losses = log.sql(
            f"SELECT avg(loss) FILTER ({is_few}) AS few, "
            f"avg(loss) FILTER (step % 20 <> 0 AND step >= {AFTER}) AS ordinary FROM steps"
        ).to_pylist()[0]
        casts = log.sql(
            "SELECT avg((saturated > 0)::INT) AS clamped, "
            "avg(saturated_error) FILTER (saturated > 0) AS error, "
            "median(amax * scale / format_max) FILTER (saturated > 0) AS overshoot "
            f"FROM casts JOIN sites USING (rank, site) WHERE role = 'grad_output' AND {is_few}"
        ).to_pylist()[0]
        recast = log.sql("SELECT sum(recast) / sum(microsteps) AS recast FROM casts").to_pylist()[0]
    return Figures(**{key: value or 0.0 for key, value in (losses | casts | recast).items()})


def table(out: Path) -> None:
    """Print each run, and each arm against the baseline over the seeds that both have."""
    found = {
        arm: {
            int(path.name.removeprefix("seed-")): figures(path)
            for path in sorted((out / arm).glob("seed-*"))
            if _is_finished(path)
        }
        for arm in ARMS
    }
    print("| seed | " + " | ".join(ARMS) + " |\n|" + "---|" * (len(ARMS) + 1))
    for seed in sorted({seed for runs in found.values() for seed in runs}):
        cells = [f"{runs[seed].few:.3f}" if seed in runs else "-" for runs in found.values()]
        print(f"| {seed} | {' | '.join(cells)} |")
    print(
        f"\n| arm | seeds | loss at few-label steps | minus {BASELINE} | told apart, of "
        f"{len(ARMS) - 1} | other steps, minus {BASELINE} | gradient casts that clamp there | "
        "clamp error | overshoot | re-cast |\n|" + "---|" * 10
    )
    for arm, runs in found.items():
        if not runs:
            continue
        both = [seed for seed in runs if seed in found[BASELINE]]
        few, rest = "-", "-"
        is_apart = "-"
        if arm != BASELINE and both:
            own, other = [runs[s] for s in both], [found[BASELINE][s] for s in both]
            gap = paired_difference([f.few for f in own], [f.few for f in other])
            few = difference_cell(gap)
            is_apart = "yes" if gap.differs_among(len(ARMS) - 1) else "no"
            gap = paired_difference([f.ordinary for f in own], [f.ordinary for f in other])
            rest = difference_cell(gap)
        clamped, error, overshoot, recast, loss = (
            statistics.fmean(getattr(f, name) for f in runs.values())
            for name in ("clamped", "error", "overshoot", "recast", "few")
        )
        print(
            f"| {arm} | {len(runs)} | {loss:.3f} | {few} | {is_apart} | {rest} | "
            f"{percent(clamped)} | {error:.2f} | {overshoot:.1f} | {percent(recast)} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.labels", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--question", action="store_true", help="few-label batches ask a question")
    parser.add_argument("--at", type=int, nargs="*", default=AT, help="steps of --why")
    parser.add_argument("--why", action="store_true", help="measure the mechanism instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    question = QUESTION if arguments.question else ""
    study = config(arguments.seeds, question=question, steps=arguments.steps)
    if arguments.why:
        for seed in arguments.seeds:
            why(study, seed, at=arguments.at)
    else:
        train_missing(arguments.out, study, arguments.arms)
        table(arguments.out)
