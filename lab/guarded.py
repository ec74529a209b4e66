"""Which history and margin should guarded scaling have by default? Re-casts against underflow.

    .venv/bin/python -m lab.guarded runs/guarded [--seeds 2]

Trains the study's `text` and `outlier` scenarios and a teacher-student regression under guarded
scaling with several settings, beside dynamic and delayed scaling, and prints one table. A run
that is finished is not repeated.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from bench.student import RARE_STEPS, STEPS, steps, student_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unclamp import Delayed, Dynamic, Guarded, Recipe
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat, merge_stats
from unclamp.report.view import build_view
from unclamp.study.config import ArmConfig, StudyConfig, default_toml
from unclamp.study.progress import run_with_progress

HISTORIES, MARGINS = (1, 2, 4, 8, 16, 64), (0, 1, 2)


def recipes() -> dict[str, Recipe]:
    """Return the strategies to compare, by name."""
    named = {"dynamic": Recipe.uniform(Dynamic())}
    named |= {f"delayed-{n}": Recipe.uniform(Delayed(history_len=n)) for n in (16, 64)}
    for n in HISTORIES:
        for margin in MARGINS:
            scaling = Guarded(history_len=n, margin=margin)
            named[f"guarded-{n}-m{margin}"] = Recipe.uniform(scaling)
    return named


def teacher_student(recipe: Recipe, seed: int) -> dict[str, float]:
    """Train a student beside its teacher; return its losses, and shares of all casts."""
    teacher, student = student_of(recipe, seed)
    (ledger,) = find_ledgers(student)
    total = torch.zeros_like(ledger.pending)
    ledger.subscribe(lambda update: merge_stats(total, update.stats))
    rare: list[float] = []
    for step, loss in steps(teacher, student):
        if step in RARE_STEPS and step > STEPS // 2:
            rare.append(loss.item())
    counts = total.sum(0)
    return {
        "rare loss": sum(rare) / len(rare),
        "re-cast": float(counts[Stat.RECAST] / counts[Stat.CASTS]),
        "underflow": float(counts[Stat.UNDERFLOWED] / counts[Stat.ELEMENTS]),
    }


def studies(out: Path, seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Run both scenarios; return figures by scenario and arm."""
    base = StudyConfig.from_toml(default_toml()).to_dict()
    arms = {name: ArmConfig(recipe=recipe) for name, recipe in recipes().items()}
    data = {**base, "seeds": list(range(seeds)), "arms": {}}
    data["arms"] = {n: {"recipe": a.recipe.to_dict()} for n, a in arms.items() if a.recipe}
    config = StudyConfig.from_dict(data)
    if not run_with_progress(config, out, jobs=None, console=Console(stderr=True)):
        raise SystemExit(130)
    return {
        scenario.name: {
            arm.name: {
                "gap": arm.final_gap.mean if arm.final_gap else 0.0,
                "planted": arm.planted_ratio[0] if arm.planted_ratio else float("nan"),
                "re-cast": arm.recasts / max(arm.casts, 1),
                "underflow": arm.underflow_share or 0.0,
            }
            for arm in scenario.arms
        }
        for scenario in build_view(out).scenarios
    }


def rows(out: Path, seeds: int) -> Iterator[list[str]]:
    """Yield a row of the table for each strategy."""
    found = studies(out, seeds)
    torch.set_num_threads(1)
    for name, recipe in track(recipes().items(), "teacher-student", console=Console(stderr=True)):
        text, outlier = found["text"][name], found["outlier"][name]
        student = teacher_student(recipe, seed=0)
        yield [
            name,
            *(f"{100 * each['re-cast']:.2f}" for each in (text, outlier, student)),
            *(f"{100 * each['underflow']:.4f}" for each in (text, outlier, student)),
            f"{text['gap']:+.4f}",
            f"{outlier['planted']:.3f}",
            f"{student['rare loss']:.2e}",
        ]


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    three = ("text", "outlier", "student")
    table = Table("strategy", *(f"re-cast % {n}" for n in three), *(f"uflow % {n}" for n in three),
                  "text gap", "planted", "rare loss", box=None)  # fmt: skip
    for row in rows(arguments.out, arguments.seeds):
        table.add_row(*row)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
