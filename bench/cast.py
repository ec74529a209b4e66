"""The cast of 16.7 M values with every counter, against a plain copy into a ready buffer."""

from typing import Any

import torch

from bench.timing import compare
from unclamp import E4M3FN, MX, PerBlock, PerRow, quantize
from unclamp.numerics.cast import quantize_plain

SIDE = 4096


def measure() -> dict[str, dict[str, float]]:
    """Time the cast for dtypes, granularities and kinds of scale."""
    torch.manual_seed(0)
    x = torch.randn(SIDE, SIDE)
    halves = {"bf16": x.bfloat16(), "fp16": x.half()}
    ready, values, scale = torch.empty_like(x), torch.empty(x.numel()), torch.tensor(70.0)
    room = torch.empty(x.numel(), dtype=torch.uint8)
    into: dict[str, Any] = {"values": values, "out": room}
    runs = {
        "copy_, fp32": lambda: ready.copy_(x),
        "cast, given scale, ready buffers": lambda: quantize(x, E4M3FN, scale, **into),
        "cast, given scale, fresh codes": lambda: quantize(x, E4M3FN, scale, values=values),
        "cast, given scale, codes": lambda: quantize(x, E4M3FN, scale),
        "cast, own scale": lambda: quantize(x, E4M3FN, **into),
        "cast, guarded": lambda: quantize(x, E4M3FN, scale, guard=True, **into),
        "cast, guarded, cast again": lambda: quantize(x, E4M3FN, 2 * scale, guard=True, **into),
    }
    for name, half in halves.items():
        runs[f"cast of {name}"] = lambda h=half: quantize(h, E4M3FN, scale, **into)
    for granularity in (PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()):
        runs[f"cast, own scales, {granularity}"] = lambda g=granularity: quantize(
            x, E4M3FN, granularity=g, **into
        )
    results = compare(
        f"cast of {SIDE} x {SIDE}: amax, scale, round, saturate, count",
        runs,
        target={"cast, given scale, ready buffers": 3.0},
    )
    # Apart: what it frees would leave the others fresh memory to take.
    plain = {"copy_, fp32": runs["copy_, fp32"], "plain torch": lambda: quantize_plain(x, E4M3FN)}
    return results | compare("the same in plain torch", plain, rounds=5)
