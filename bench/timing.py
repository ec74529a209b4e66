"""Interleaved rounds: every candidate once a round, ratios within a round, median and quartiles."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

ROUNDS = 15


def compare(
    title: str,
    candidates: Mapping[str, Callable[[], Any]],
    *,
    target: Mapping[str, float] | None = None,
    rounds: int = ROUNDS,
    warm_up: int = 2,
) -> dict[str, dict[str, float]]:
    """Time candidates side by side and print each one's ratio to the first."""
    for run in candidates.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    base = next(iter(seconds.values()))
    print(f"\n{title}")
    results = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(
            [t / b for t, b in zip(times, base, strict=True)], n=4
        )
        results[name] = {"ms": statistics.median(times) * 1e3, "ratio": middle}
        wanted = (target or {}).get(name)
        aim = "" if wanted is None else f"  target {wanted:.2f}x: {verdict(middle, wanted)}"
        print(
            f"{name:36} {results[name]['ms']:9.2f} ms  {middle:5.2f}x "
            f"({low:.2f} to {high:.2f}){aim}"
        )
    return results


def verdict(value: float, target: float) -> str:
    """Say whether a figure meets a target that it must not exceed."""
    return "met" if value <= target else f"missed by {100 * (value / target - 1):.0f} %"
