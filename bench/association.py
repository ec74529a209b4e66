"""How often an association names the innocent and the guilty, and what it costs.

Run by itself, `python -m bench.association [runs] [first seed]`: the rates take minutes. With
`--only schedules` or `--only bounds`, only the runs with schedules, or the bounds on harm.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import NormalDist

import numpy as np

from truths.arrays import FAMILIES, plant, plant_culprit, plant_effect
from truths.harms import plant_harms
from truths.schedules import FAMILIES as SCHEDULES
from truths.schedules import plant_scheduled
from unclamp.analysis.association import Association, associate_series
from unclamp.analysis.evidence import Clamping

FIRST_SEED = 2_000_000
"""Far from the seeds of the tests and of what was tuned on."""
CULPRITS = {
    "10 of 10 spikes, lags 0-8": {},
    "7 of 10 spikes, lags 0-8": {"hits": 7},
    "5 of 10 spikes, lags 0-8": {"hits": 5},
    "5 of 10 spikes, lag 1": {"hits": 5, "lags": (1, 1)},
}


def judge(family: str, seed: int, culprit: str | None, effect: bool) -> tuple[bool, bool, bool]:
    """Return whether anybody is named, whether site 7 is first, and whether it is named."""
    run = plant(seed, family=family)
    if culprit is not None:
        plant_culprit(run, 7, seed=seed, **CULPRITS[culprit])
    if effect:
        plant_effect(run, 8)
        plant_effect(run, 9)
    found = associate_series(run.clamping(), run.loss, spikes=run.spikes, names=run.names)
    first = found.sites[0]
    return found.verdict == "named", first.site == 7, first.site == 7 and first.by is not None


def tabulate(most: int, first_seed: int) -> None:
    """Print the rates of all families and culprits."""
    cases = [(family, None, False) for family in FAMILIES] + [("bursts", None, True)]
    cases += [("bursts", culprit, False) for culprit in CULPRITS]
    cases += [(family, next(iter(CULPRITS)), False) for family in ("common", "early")]
    with ProcessPoolExecutor(2) as pool:
        for family, culprit, effect in cases:
            runs = most if culprit is None else most // 2
            seeds = range(first_seed, first_seed + runs)
            repeated = ([family] * runs, seeds, [culprit] * runs, [effect] * runs)
            judged = np.array(list(pool.map(judge, *repeated, chunksize=4)))
            named, first, right = judged.sum(axis=0)
            low, high = wilson(int(named), runs)
            kind = culprit or ("effects of spikes" if effect else "none")
            print(
                f"| {family} | {kind} | {named} of {runs} ({100 * low:.1f} to {100 * high:.1f} %) "
                f"| {f'{first}; {right} named' if culprit else '-'} |",
                flush=True,
            )


def judge_scheduled(family: str, seed: int, with_lr: bool) -> tuple[bool, bool]:
    """Return whether anybody is named, and whether anybody would be without asking a schedule."""
    planted = plant_scheduled(seed, family=family)
    run, lr = planted.run, planted.lr if with_lr else None
    found = associate_series(run.clamping(), run.loss, spikes=run.spikes, names=run.names, lr=lr)
    return found.verdict == "named", any(site.by or site.doubt for site in found.sites)


def tabulate_schedules(most: int, first_seed: int) -> None:
    """Print how often a harmless site is named where loss and clamping follow one schedule."""
    with ProcessPoolExecutor(2) as pool:
        for family in SCHEDULES:
            for with_lr in (True, False):
                seeds = range(first_seed, first_seed + most)
                repeated = ([family] * most, seeds, [with_lr] * most)
                judged = np.array(list(pool.map(judge_scheduled, *repeated, chunksize=4)))
                named, before = judged.sum(axis=0)
                low, high = wilson(int(named), most)
                print(
                    f"| {family} | {'yes' if with_lr else 'no'} | {before} of {most} "
                    f"| {named} of {most} ({100 * low:.1f} to {100 * high:.1f} %) |",
                    flush=True,
                )


def judge_bounds(family: str, seed: int) -> tuple[bool, bool, int, int]:
    """Return whether a bound of a cleared site, and one of any site, is below its planted harm.

    Then how many sites are cleared, and how many have no harm or one of at most 1 %.
    """
    run, shares = plant_harms(seed, family=family)
    found = associate_series(run.clamping(), run.loss, spikes=run.spikes, names=run.names)
    short = [s for s in found.sites if s.bound is not None and s.bound < shares[s.site]]
    cleared = sum(site.cleared for site in found.sites)
    mild = sum(shares[site.site] <= 0.01 for site in found.sites)
    return any(site.cleared for site in short), bool(short), cleared, mild


def tabulate_bounds(most: int, first_seed: int) -> None:
    """Print in how many runs the bounds on harm hold at once: of cleared sites, and of all."""
    with ProcessPoolExecutor(2) as pool:
        for family in ("independent", "bursts", "common", "noisy loss"):
            seeds = range(first_seed, first_seed + most)
            judged = np.array(list(pool.map(judge_bounds, [family] * most, seeds, chunksize=4)))
            wrong, short, cleared, mild = judged.sum(axis=0)
            low, high = wilson(most - int(wrong), most)
            print(
                f"| {family} | {most - wrong} of {most} ({100 * low:.1f} to {100 * high:.1f} %) "
                f"| {most - short} of {most} | {cleared} of {mild} |",
                flush=True,
            )


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    z = NormalDist().inv_cdf(0.975)
    share = hits / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + (z / trials / 2) ** 2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def large_run(*, sites: int = 1680, steps: int = 100_000, share: float = 0.01) -> Clamping:
    """Return clamping at `share` of the casts, sparse."""
    generator = np.random.default_rng(0)

    def rows() -> Iterator[np.ndarray]:
        for _ in range(sites):
            yield np.flatnonzero(generator.random(steps, dtype=np.float32) < share)

    found = list(rows())
    return Clamping(
        starts=np.concatenate([[0], np.cumsum([len(row) for row in found])]),
        steps=np.concatenate(found),
        errors=generator.random(sum(len(row) for row in found)),
        first_lags=np.arange(sites) % 3 // 2,
        length=steps,
    )


def measure() -> dict[str, float]:
    """Time a large run, with 10 and with 100 spikes."""
    clamping = large_run()
    generator = np.random.default_rng(1)
    loss = 2 + 0.02 * generator.standard_normal(clamping.length)
    names = [(site, f"layers.{site}", "input") for site in range(clamping.sites)]
    results = {}
    for count in (10, 100):
        onsets = np.sort(generator.choice(np.arange(100, clamping.length - 100), count, False))
        spikes = [(onset, onset) for onset in onsets.tolist()]
        began = time.perf_counter()
        found: Association = associate_series(clamping, loss, spikes=spikes, names=names)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"1680 sites x 100,000 steps, {len(clamping.steps):,} clamped, {count} spikes: "
            f"{seconds:.1f} s, verdict {found.verdict!r}; peak {peak:.1f} GiB"
        )
        results[f"{count} spikes, s"] = seconds
    return results


TABLES = {"schedules": tabulate_schedules, "bounds": tabulate_bounds}


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.association", description=__doc__)
    parser.add_argument("--only", choices=list(TABLES), help="this table alone")
    parser.add_argument("runs", type=int, nargs="?", default=200, help="runs of each family")
    parser.add_argument("first_seed", type=int, nargs="?", default=FIRST_SEED, help="of the runs")
    options = parser.parse_args()
    if options.only is not None:
        TABLES[options.only](options.runs, options.first_seed)
        return
    measure()
    tabulate(options.runs, options.first_seed)
    tabulate_schedules(options.runs, options.first_seed)
    tabulate_bounds(options.runs, options.first_seed)


if __name__ == "__main__":
    main()
