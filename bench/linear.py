"""One linear layer, forward and backward, against fp32 nn.Linear in the same run.

Interleaved rounds, median and quartiles of the ratio. Peers that are installed join in.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import unclamp

ROUNDS = 9
TOKENS, IN_FEATURES, OUT_FEATURES = 2048, 1024, 4096


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    return run


def candidates() -> dict[str, nn.Module]:
    """Return the layers to compare, fp32 first."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES))
    layers: dict[str, nn.Module] = {"fp32 nn.Linear": base}
    for kind in (unclamp.Delayed(), unclamp.Dynamic()):
        layer = copy.deepcopy(base)
        unclamp.convert(layer, unclamp.Recipe.uniform(kind))
        layers[f"unclamp {kind.kind}, all counters"] = layer
    return layers


def measure() -> dict[str, dict[str, float]]:
    """Time each candidate and print its ratio to fp32."""
    x = torch.randn(TOKENS, IN_FEATURES, requires_grad=True)
    steps = {name: _step(layer, x) for name, layer in candidates().items()}
    for run in steps.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    base = seconds["fp32 nn.Linear"]
    results = {}
    print(f"Linear {IN_FEATURES} -> {OUT_FEATURES}, {TOKENS} tokens, forward and backward")
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {"ms": statistics.median(times) * 1e3, "ratio": middle}
        print(f"{name:34} {results[name]['ms']:8.1f} ms  {middle:5.2f}x  ({low:.2f} to {high:.2f})")
    return results
