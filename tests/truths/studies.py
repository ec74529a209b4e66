"""Studies with a planted answer: which arm is hurt at planted steps, and by how much."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from unclamp.analysis import find_spikes
from unclamp.report.arms import ScenarioView, scenario_view
from unclamp.report.recorded import RunRecord

STEPS, PLANTED, SEEDS = 60, [40, 50], 3


def losses(arm: str, seed: int, factor: float = 1.0, shift: float = 0.0) -> list[float]:
    """Return a loss common to all arms of a seed, with the arm's own small noise.

    At planted steps it is `factor` times as high; everywhere it is `shift` higher.
    """
    common = np.random.default_rng(seed)
    loss = 3 * np.exp(-np.arange(STEPS) / 30) + 2 + 0.02 * common.standard_normal(STEPS)
    own = np.random.default_rng([seed, *arm.encode()])
    loss += 0.001 * own.standard_normal(STEPS) + shift
    loss[PLANTED] *= factor * (1 + 0.004 * own.standard_normal(len(PLANTED)))
    return loss.tolist()


def study(
    run: RunRecord,
    arms: Mapping[str, float],
    *,
    seeds: int = SEEDS,
    planted: bool = True,
    shifts: Mapping[str, float] | None = None,
    change: Callable[[str, int, RunRecord], RunRecord] = lambda arm, seed, record: record,
) -> ScenarioView:
    """Return a scenario; `arms` says by which factor each one is hurt at planted steps."""
    records = {}
    for arm, factor in arms.items():
        clamped = 5 if factor > 1.2 else 0
        sites = [
            replace(s, totals=replace(s.totals, saturated=clamped, clamped_rows=clamped))
            for s in run.sites
        ]
        records[arm] = {}
        for seed in range(seeds):
            loss = losses(arm, seed, factor, (shifts or {}).get(arm, 0.0))
            record = replace(
                run,
                loss=loss,
                spikes=find_spikes(loss, steps=run.steps),
                planted=PLANTED if planted else [],
                sites=[] if arm == "hp" else sites,
                is_plain=arm == "hp",
                shares={run.sites[0].name: clamped_share()} if clamped else {},
            )
            records[arm][seed] = change(arm, seed, record)
    return scenario_view("outlier" if planted else "text", "", records, {})


def clamped_share() -> np.ndarray:
    """Return a site's clamped share: little at the first planted step, more at the second."""
    share = np.zeros(STEPS)
    share[PLANTED] = 1e-4, 1e-2
    return share
