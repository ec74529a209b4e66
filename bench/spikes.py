"""False alarms and recall of spikes and slow divergences, on held-out generated curves.

`python -m bench.spikes` prints the tables of docs/spikes.md, in about four minutes on one core;
with the names of some of `TABLES` those alone. The detectors were tuned on other seeds.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache

import numpy as np

from truths.curves import (
    FAMILIES,
    HELD_OUT,
    SCHEDULES,
    diverging,
    early,
    healthy,
    planted,
    shifting,
)
from unclamp.analysis import DEFINITIONS, find_divergences, find_spikes

CURVES = 40
PLANTED = 200
CURVES_IN_FAMILY = 16
PLANTED_IN_FAMILY = 50
STEPS_IN_FAMILY = 1000
HEIGHTS = (1.2, 1.3, 1.6, 5.0)
LENGTHS = (1, 10)
NOISES = (0.01, 0.02, 0.03, 0.05)
PLANTED_STEPS = 2000
LEVELS = {"around 2": "decaying", "0.0005 to 0.02": "near zero"}
DECIMALS = (2, 3, 4, None)
HEIGHTS_NEAR_ZERO = (1.3, 1.6, 2.0, 3.0, 5.0, 20.0)
RATES = (0.001, 0.003, 0.01)
RISES = (1.5, 2.0, 3.0)
DRIFT_NOISES = (0.02, 0.05, 0.1)
EARLY = {
    "nothing": "plain",
    "one step of 1.25 to 2 times, at 5 to 24": "outlier",
    "three of 1.1 to 1.5 times, before 60": "outliers",
    "a cliff from 9 to 12, at 10 to 80": "cliff",
    "4 to 9 times the noise, over 10 to 40 steps": "noisy start",
    "a level 10 to 60 % higher, at 30 to 99": "shift",
    "5 times the noise in 12 steps, at 30 to 99": "burst",
}
EARLY_SPIKES = ((1.3, 1), (1.6, 1), (1.3, 5), (1.3, 20), (1.6, 3), (1.6, 20), (2.2, 20))
EARLY_CURVES = 100


def false_alarms(
    method: str, family: str, *, curves: int = CURVES, decimals: int | None = None
) -> tuple[int, int]:
    """Return alarms and steps over the held-out curves of a family."""
    alarms = steps = 0
    for seed in range(HELD_OUT, HELD_OUT + curves):
        curve = _written(healthy(family, seed), decimals)
        alarms += len(find_spikes(curve, method=method))
        steps += len(curve)
    return alarms, steps


def recall(method: str, *, height: float, length: int, noise: float, steps: int) -> float:
    """Return the share of planted spikes found: one that holds the planted onset or the next."""
    found = 0
    for seed in range(HELD_OUT, HELD_OUT + PLANTED):
        curve, onset = planted(seed, height=height, length=length, noise=noise, steps=steps)
        found += _holds(curve, onset, length, method)
    return found / PLANTED


def recall_in(family: str, *, height: float, length: int, decimals: int | None = None) -> float:
    """Return the share found of spikes planted in the first steps of a family's curves."""
    found = 0
    for seed in range(HELD_OUT, HELD_OUT + PLANTED_IN_FAMILY):
        curve = _begin_of(family, seed).copy()
        onset = int(np.random.default_rng([seed, 97]).integers(60, len(curve) - length - 10))
        curve[onset : onset + length] *= height
        found += _holds(_written(curve, decimals), onset, length, "robust")
    return found / PLANTED_IN_FAMILY


@cache
def _begin_of(family: str, seed: int) -> np.ndarray:
    return healthy(family, seed)[:STEPS_IN_FAMILY]


def _written(curve: np.ndarray, decimals: int | None) -> np.ndarray:
    return curve if decimals is None else np.round(curve, decimals)


def _holds(curve: np.ndarray, onset: int, length: int, method: str) -> bool:
    spikes = find_spikes(curve, method=method)
    return any(s.onset <= onset + length - 1 and s.end >= onset for s in spikes)


def _print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def _print_head(first: int, *cells: object) -> None:
    _print_row(*cells)
    print("|" + "---|" * first + "---:|" * (len(cells) - first))


def measure() -> dict[str, dict[str, float]]:
    """Compare the definitions; return false alarms per 10,000 steps by method and family."""
    names = list(DEFINITIONS)
    rates: dict[str, dict[str, float]] = {name: {} for name in names}
    print(f"\nfalse alarms per 10,000 steps ({CURVES} held-out curves a family)\n")
    print("| family | " + " | ".join(names) + " |\n|---" * 1 + "|---:" * len(names) + "|")
    totals: dict[str, tuple[int, int]] = dict.fromkeys(names, (0, 0))
    for family in FAMILIES:
        for name in names:
            alarms, steps = false_alarms(name, family)
            totals[name] = (totals[name][0] + alarms, totals[name][1] + steps)
            rates[name][family] = 1e4 * alarms / steps
        print(f"| {family} | " + " | ".join(f"{rates[n][family]:.2f}" for n in names) + " |")
    for name in names:
        rates[name]["all"] = 1e4 * totals[name][0] / totals[name][1]
    print("| **all** | " + " | ".join(f"{rates[n]['all']:.2f}" for n in names) + " |")
    print(f"\n{totals[names[0]][1]:,} steps in all")
    _print_recall(names)
    _print_power()
    return rates


def _print_recall(names: list[str]) -> None:
    print(f"\nshare found, 2 % noise, {PLANTED_STEPS} steps, {PLANTED} spikes a cell\n")
    print("| height | steps | " + " | ".join(names) + " |\n|---:|---:" + "|---:" * len(names) + "|")
    for height in HEIGHTS:
        for length in LENGTHS:
            shares = [
                recall(name, height=height, length=length, noise=0.02, steps=PLANTED_STEPS)
                for name in names
            ]
            print(f"| {height}x | {length} | " + " | ".join(f"{s:.3f}" for s in shares) + " |")


def _print_power() -> None:
    print("\nshare found by robust, one step, by noise and length of the run\n")
    print(
        "| noise | run | "
        + " | ".join(f"{h}x" for h in HEIGHTS)
        + " |\n|---:|---:"
        + "|---:" * 4
        + "|"
    )
    for steps in (PLANTED_STEPS, 200):
        for noise in NOISES:
            shares = [
                recall("robust", height=h, length=1, noise=noise, steps=steps) for h in HEIGHTS
            ]
            cells = " | ".join(f"{s:.3f}" for s in shares)
            print(f"| {100 * noise:.0f} % | {steps} | {cells} |")


def measure_families() -> None:
    """Print what the default definition does in every family."""
    print(f"\nrobust by family: alarms per 10,000 steps ({CURVES_IN_FAMILY} curves), share found\n")
    cells = [f"{height}x, {length}" for length in LENGTHS for height in HEIGHTS[1:]]
    _print_head(1, "family", "alarms", *cells)
    for family in [*FAMILIES, *SCHEDULES]:
        alarms, steps = false_alarms("robust", family, curves=CURVES_IN_FAMILY)
        shares = [
            f"{recall_in(family, height=height, length=length):.3f}"
            for length in LENGTHS
            for height in HEIGHTS[1:]
        ]
        _print_row(family, f"{1e4 * alarms / steps:.2f}", *shares)


def measure_resolution() -> None:
    """Print what the default definition does with losses of few decimals."""
    print(
        f"\nrobust by decimals: alarms per 10,000 steps ({CURVES_IN_FAMILY} curves), share found\n"
    )
    _print_head(1, "level", "decimals", "alarms", *(f"{h}x" for h in HEIGHTS_NEAR_ZERO))
    for level, family in LEVELS.items():
        for decimals in DECIMALS:
            alarms, steps = false_alarms(
                "robust", family, curves=CURVES_IN_FAMILY, decimals=decimals
            )
            shares = [
                f"{recall_in(family, height=height, length=1, decimals=decimals):.3f}"
                for height in HEIGHTS_NEAR_ZERO
            ]
            _print_row(level, decimals or "all", f"{1e4 * alarms / steps:.2f}", *shares)
    print("\nalarms per 10,000 steps in the other families, a thousandth of their level\n")
    _print_head(1, "family", *(f"{decimals or 'all'}" for decimals in DECIMALS))
    for family in [*FAMILIES, *SCHEDULES]:
        rates = []
        for decimals in DECIMALS:
            alarms = steps = 0
            for seed in range(HELD_OUT, HELD_OUT + CURVES_IN_FAMILY // 4):
                curve = _written(healthy(family, seed) / 1000, decimals)
                alarms, steps = alarms + len(find_spikes(curve)), steps + len(curve)
            rates.append(f"{1e4 * alarms / steps:.2f}")
        _print_row(family, *rates)


def measure_divergence() -> None:
    """Print false alarms and recall of slow divergences, and what is taken for one."""
    print(f"\ndivergences in healthy curves ({CURVES_IN_FAMILY} a family)\n")
    _print_head(1, "family", "steps", "found", "per 10,000 steps", "with 3 decimals")
    for family in [*FAMILIES, *SCHEDULES]:
        found = rounded = steps = 0
        for seed in range(HELD_OUT, HELD_OUT + CURVES_IN_FAMILY):
            curve = healthy(family, seed)
            found += len(find_divergences(curve))
            rounded += len(find_divergences(np.round(curve, 3)))
            steps += len(curve)
        _print_row(family, f"{steps:,}", found, f"{1e4 * found / steps:.2f}", rounded)
    _print_divergence_recall()
    _print_shifts()


def _print_divergence_recall() -> None:
    count = PLANTED_IN_FAMILY
    print(f"\nshare found of {count} planted divergences, of the largest also as a spike\n")
    _print_head(0, "noise", "a step", *(f"{h}x" for h in RISES), "as a spike", "median delay")
    for noise in DRIFT_NOISES:
        for rate in RATES:
            delays = {rise: _delays(rate, rise, noise) for rise in RISES}
            shares = [f"{len(found) / count:.3f}" for found in delays.values()]
            late = f"{np.median(delays[RISES[-1]]):.0f}" if delays[RISES[-1]] else "-"
            spikes = 0
            for seed in range(HELD_OUT, HELD_OUT + count):
                curve, onset = diverging(seed, rate=rate, height=RISES[-1], noise=noise)
                spikes += any(spike.end >= onset for spike in find_spikes(curve))
            percent = (f"{100 * noise:.0f} %", f"{100 * rate:.1f} %")
            _print_row(*percent, *shares, f"{spikes / count:.3f}", late)


def _delays(rate: float, rise: float, noise: float) -> list[int]:
    """Return how many steps after its onset each divergence that is found is found."""
    delays = []
    for seed in range(HELD_OUT, HELD_OUT + PLANTED_IN_FAMILY):
        curve, onset = diverging(seed, rate=rate, height=rise, noise=noise)
        later = [d.found - onset for d in find_divergences(curve) if d.found >= onset]
        delays += later[:1]
    return delays


def _print_shifts() -> None:
    widths = (1, 10, 30, 100, 300)
    print("\nshare of lasting shifts that are called a divergence, by steps that they take\n")
    _print_head(0, "shift", *widths)
    for height in (1.2, 1.3, 1.5, 2.0):
        shares = []
        for width in widths:
            curves = [shifting(seed, height=height, width=width)
                      for seed in range(HELD_OUT, HELD_OUT + CURVES_IN_FAMILY)]  # fmt: skip
            shares.append(
                f"{sum(bool(find_divergences(c)) for c in curves) / CURVES_IN_FAMILY:.3f}"
            )
        _print_row(f"{height}x", *shares)


def measure_early() -> None:
    """Print what odd first steps hide of later spikes in runs of 400 steps."""
    print(f"\nshare found of {EARLY_CURVES} spikes from step 120 on, by what the first steps did\n")
    _print_head(1, "first steps", *(f"{height}x, {length}" for height, length in EARLY_SPIKES))
    for words, kind in EARLY.items():
        shares = []
        for height, length in EARLY_SPIKES:
            found = 0
            for seed in range(HELD_OUT, HELD_OUT + EARLY_CURVES):
                curve, onset = early(seed, kind=kind, height=height, length=length)
                found += _holds(curve, onset, length, "robust")
            shares.append(f"{found / EARLY_CURVES:.2f}")
        _print_row(words, *shares)


def measure_speed() -> None:
    """Print seconds by definition for 100,000 steps."""
    names = list(DEFINITIONS)
    curve = np.tile(healthy("decaying", HELD_OUT), 60)[:100_000]
    print("\n100,000 steps, seconds: ", end="")
    for name in names:
        began = time.process_time()
        find_spikes(curve, method=name)
        print(f"{name} {time.process_time() - began:.2f}", end="  ")
    began = time.process_time()
    find_divergences(curve)
    print(f"divergences {time.process_time() - began:.2f}")


TABLES: dict[str, Callable[[], object]] = {
    "definitions": measure,
    "families": measure_families,
    "resolution": measure_resolution,
    "divergence": measure_divergence,
    "early": measure_early,
    "speed": measure_speed,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.spikes", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    wanted = parser.parse_args().tables or list(TABLES)
    for name in wanted:
        if name not in TABLES:
            parser.error(f"no table {name!r}; there are: {', '.join(TABLES)}")
    for name in wanted:
        TABLES[name]()
