"""How far two trainings part that differ in next to nothing: the noise under what-if's errors.

    python -m bench.twins runs/study runs/twins [--twins ulp-0 ulp-1 bfloat16 float16] [--seeds 0 1]

For each scenario and seed of a study its arms train again with weights that were nudged before the
first step: element n of the last norm by one unit in its last place (ulp-n), or all weights by
rounding them to bfloat16 or float16 once, which is much less than what FP8 rounds in every cast. A
finished run is not repeated. `python -m bench.whatif runs/study --twins runs/twins` sets the counts
of a run and of its twins beside what logs predict.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from unclamp.runlog import is_run, read_header
from unclamp.study.config import ModelConfig, StudyConfig, read_study
from unclamp.study.loop import RunPlan, train
from unclamp.study.models import build_model

ARMS = ("delayed", "guarded", "dynamic")
TWINS = ("ulp-0", "ulp-1", "bfloat16", "float16")


def train_twins(
    study: Path, out: Path, *, twins: Sequence[str], seeds: Sequence[int], arms: Sequence[str]
) -> None:
    """Train what is missing of a study's twins, as `out/scenario/arm/seed-n/twin`."""
    config = StudyConfig.from_dict(read_study(study)["config"])
    torch.set_num_threads(1)
    for twin in twins:
        for scenario in config.scenarios:
            for seed in seeds:
                for arm in arms:
                    path = out / scenario / arm / f"seed-{seed}" / twin
                    _train(config, scenario, arm, seed, twin, path)


def _train(config: StudyConfig, scenario: str, arm: str, seed: int, twin: str, path: Path) -> None:
    if is_run(path) and read_header(path).status == "finished":
        return
    shutil.rmtree(path, ignore_errors=True)

    def nudged(model: ModelConfig) -> nn.Module:
        built = build_model(model)
        with torch.no_grad():
            _nudge(built, twin)
        return built

    recipe = config.arms[arm].recipe
    with patch("unclamp.study.loop.build_model", nudged):
        train(
            RunPlan(config=config, scenario=scenario, arm=arm, seed=seed, recipe=recipe, path=path)
        )
    print(f"{scenario} {arm} seed {seed}, {twin}: trained", flush=True)


def _nudge(model: nn.Module, twin: str) -> None:
    if twin.startswith("ulp-"):
        norm, at = [p for p in model.parameters() if p.ndim == 1][-1], int(twin[4:])
        norm[at] = torch.nextafter(norm[at], norm.new_tensor(2.0))
        return
    for weight in model.parameters():
        weight.copy_(weight.to(getattr(torch, twin)))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.twins", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--twins", nargs="+", default=TWINS, choices=TWINS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arm", nargs="+", default=ARMS, choices=ARMS)
    given = parser.parse_args()
    train_twins(given.study, given.out, twins=given.twins, seeds=given.seeds, arms=given.arm)


if __name__ == "__main__":
    main()
