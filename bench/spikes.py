"""False alarms and recall of every definition of a spike, on held-out generated curves.

`python -m bench.spikes` prints the tables of docs/spikes.md, in about a minute on one core.
"""

import argparse
import time

import numpy as np

from truths.curves import FAMILIES, HELD_OUT, healthy, planted
from unclamp.analysis import DEFINITIONS, find_spikes

CURVES = 40
PLANTED = 200
HEIGHTS = (1.2, 1.3, 1.6, 5.0)
LENGTHS = (1, 10)
NOISES = (0.01, 0.02, 0.03, 0.05)
PLANTED_STEPS = 2000


def false_alarms(method: str, family: str, *, curves: int = CURVES) -> tuple[int, int]:
    """Return alarms and steps over the held-out curves of a family."""
    alarms = steps = 0
    for seed in range(HELD_OUT, HELD_OUT + curves):
        curve = healthy(family, seed)
        alarms += len(find_spikes(curve, method=method))
        steps += len(curve)
    return alarms, steps


def recall(method: str, *, height: float, length: int, noise: float, steps: int) -> float:
    """Return the share of planted spikes found: one that holds the planted onset or the next."""
    found = 0
    for seed in range(HELD_OUT, HELD_OUT + PLANTED):
        curve, onset = planted(seed, height=height, length=length, noise=noise, steps=steps)
        found += any(s.onset <= onset + length - 1 and s.end >= onset
                     for s in find_spikes(curve, method=method))  # fmt: skip
    return found / PLANTED


def measure() -> dict[str, dict[str, float]]:
    """Print the tables; return false alarms per 10,000 steps by method and family."""
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
    _print_speed(names)
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


def _print_speed(names: list[str]) -> None:
    curve = np.tile(healthy("decaying", HELD_OUT), 60)[:100_000]
    print("\n100,000 steps, seconds: ", end="")
    for name in names:
        began = time.perf_counter()
        find_spikes(curve, method=name)
        print(f"{name} {time.perf_counter() - began:.2f}", end="  ")
    print()


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.spikes", description=__doc__).parse_args()
    measure()
