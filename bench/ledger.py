"""The ledger's update at the width of a 70B model, and the recorder's part of a step."""

import statistics
import tempfile
import time

import torch
from torch import nn

import unclamp
from bench.linear import IN_FEATURES, OUT_FEATURES, step
from bench.timing import compare, verdict
from unclamp.names import ROLES
from unclamp.nn import Ledger, Site

SITES, ROUNDS = 1680, 101
EXPERTS = 3 * 2 * 128 * 48
"""Sites of the experts of Qwen3-30B-A3B: two products each, 128 in each of 48 layers."""


def update_ms(sites: int, history_len: int) -> float:
    """Return the median time of one update."""
    recipe = unclamp.Recipe.uniform(unclamp.Delayed(history_len=history_len))
    operands = recipe.plan("").operands
    ledger = Ledger()
    ledger.add([Site.of(str(i), ROLES[i % 3], operands[ROLES[i % 3]]) for i in range(sites)])
    times = []
    for _ in range(ROUNDS):
        ledger.pending.copy_(torch.rand_like(ledger.pending))
        began = time.perf_counter()
        ledger.update()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def measure() -> dict[str, dict[str, float]]:
    """Time updates, and a linear layer with the recorder on against off."""
    print("\nledger update")
    results: dict[str, dict[str, float]] = {}
    sizes = ((SITES, 16, 0.3), (SITES // 2, 16, None), (SITES, 1024, 2.0), (EXPERTS, 16, None))
    for sites, length, target in sizes:
        name = f"{sites} sites, history {length}"
        ms = update_ms(sites, length)
        results[name] = {"ms": ms}
        aim = "" if target is None else f"  target {target:.1f} ms: {verdict(ms, target)}"
        print(f"{name:36} {ms:9.3f} ms{aim}")
    model = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES))
    unclamp.convert(model, unclamp.Recipe())
    plain = step(model)
    with tempfile.TemporaryDirectory() as folder, unclamp.Recorder(model, f"{folder}/run") as log:

        def recorded() -> None:
            plain()
            log.step(loss=1.0)

        name = "recorder on"
        results |= compare(
            "the linear layer, recorder off and on",
            {"recorder off": plain, name: recorded},
            target={name: 1.02},
        )
    return results
