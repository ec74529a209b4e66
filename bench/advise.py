"""Is the advice right? Advised recipes, trained on seeds that the advice has not seen.

    python -m bench.advise runs/advised [--cases text=5 outlier=5 moe=6 student=6]

For each case a run under dynamic scaling is the log; its advice is trained on the *next* seed, and
compared with dynamic scaling there: final loss, and loss at planted steps. An advice passes where
both differ by at most twice the standard deviation that dynamic scaling has over seeds, at no more
than 1.1 reads an element. A finished run is not repeated.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import student
from unclamp.analysis.advice import Advice, advise
from unclamp.analysis.whatif.recorded import recorded
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog, is_run, read_header
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.loop import RunPlan, train

FIRST_SEED = 100
"""Settings were made with seeds 0 to 2; of what gradients may overshoot, with 40 to 48; of what
underflow may take, and of what is beside an outlier, with mixtures 80 to 84 and student 50."""
FINAL_STEPS = 20
MOST_READS = 1.1
CASES = {"text": 5, "outlier": 5, "moe": 6, "student": 6}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A run's losses: the mean of its last unplanted steps, and of its planted steps."""

    final: float
    planted: float | None


def config_of(case: str) -> tuple[StudyConfig, str]:
    """Return the study of a case, and its scenario."""
    study = StudyConfig.from_toml(default_toml())
    if case != "moe":
        return study, case
    return replace(study, model=replace(study.model, architecture="moe")), "outlier"


def planted_of(case: str) -> Sequence[int]:
    """Return the planted steps of a case."""
    if case == "student":
        return student.RARE_STEPS
    study, scenario = config_of(case)
    return study.marked_steps(scenario)


def trained(out: Path, case: str, arm: str, seed: int, recipe: Recipe) -> Path:
    """Train a run if it is not there."""
    path = out / case / arm / f"seed-{seed}"
    if is_run(path) and read_header(path).status == "finished":
        return path
    shutil.rmtree(path, ignore_errors=True)
    if case == "student":
        student.train(recipe, seed=seed, path=path)
        return path
    study, scenario = config_of(case)
    plan = RunPlan(config=study, scenario=scenario, arm=arm, seed=seed, recipe=recipe, path=path)
    train(plan)
    return path


def loss_of(path: Path, case: str) -> Loss:
    """Return a run's losses."""
    planted = planted_of(case)
    with RunLog.open(path) as log:
        steps = log.steps().to_pydict()
    by_step = dict(zip(steps["step"], steps["loss"], strict=True))
    calm = [loss for step, loss in by_step.items() if step not in planted]
    marked = [by_step[step] for step in planted if step in by_step]
    return Loss(
        final=statistics.fmean(calm[-FINAL_STEPS:]),
        planted=statistics.fmean(marked) if marked else None,
    )


def reads_of(path: Path) -> float:
    """Return the reads an element that a run took."""
    with RunLog.open(path) as log:
        return recorded(log, log.computed_sites()).reads


def advice_of(path: Path) -> Advice:
    """Return the advice that a run's log gives."""
    with RunLog.open(path) as log:
        return advise(log)


def measure(out: Path, cases: dict[str, int], first_seed: int) -> int:
    """Print the table; return how many advices failed."""
    failed = 0
    print("case      seed  verdict           reads   final - dynamic   planted - dynamic  passes")
    for case, number in cases.items():
        seeds = range(first_seed, first_seed + number + 1)
        plain = {s: trained(out, case, "dynamic", s, Recipe.uniform("dynamic")) for s in seeds}
        losses = {seed: loss_of(path, case) for seed, path in plain.items()}
        noise = statistics.stdev(loss.final for loss in losses.values())
        planted = [loss.planted for loss in losses.values() if loss.planted is not None]
        planted_noise = statistics.stdev(planted) if planted else 0.0
        for seed in list(seeds)[1:]:
            advice = advice_of(plain[seed - 1])
            path = trained(out, case, "advised", seed, advice.recipe)
            mine, base, reads = loss_of(path, case), losses[seed], reads_of(path)
            final = mine.final - base.final
            passes = abs(final) <= 2 * noise and reads <= MOST_READS
            shown = "-"
            if mine.planted is not None and base.planted is not None:
                rise = mine.planted - base.planted
                passes &= rise <= 2 * planted_noise
                shown = f"{rise:+.2e} (2 sd {2 * planted_noise:.2e})"
            failed += not passes
            print(
                f"{case:8}  {seed:4}  {advice.verdict:16}  {reads:.4f}  "
                f"{final:+.2e} (2 sd {2 * noise:.2e})  {shown}  {'yes' if passes else 'NO'}",
                flush=True,
            )
    print(f"\n{sum(cases.values()) - failed} of {sum(cases.values())} pass")
    return failed


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.advise", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--cases", nargs="+", default=[f"{k}={v}" for k, v in CASES.items()])
    given = parser.parse_args()
    cases = {name: int(number) for name, number in (c.split("=") for c in given.cases)}
    measure(given.out, cases, given.first_seed)


if __name__ == "__main__":
    main()
