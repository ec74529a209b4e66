"""The cast of 16.7 M values with every counter, against a plain copy into a ready buffer."""

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
    ready, values, scale = torch.empty_like(x), torch.empty(x.numel()), torch.tensor(90.0)
    runs = {
        "copy_, fp32": lambda: ready.copy_(x),
        "cast, given scale, codes and values": lambda: quantize(x, E4M3FN, scale, values=values),
        "cast, given scale, codes": lambda: quantize(x, E4M3FN, scale),
        "cast, own scale": lambda: quantize(x, E4M3FN, values=values),
        "cast, guarded": lambda: quantize(x, E4M3FN, scale, guard=True, values=values),
    }
    for name, half in halves.items():
        runs[f"cast of {name}"] = lambda h=half: quantize(h, E4M3FN, scale, values=values)
    for granularity in (PerRow(), PerBlock(1, 128), PerBlock(128, 128), MX()):
        runs[f"cast, own scales, {granularity}"] = lambda g=granularity: quantize(
            x, E4M3FN, granularity=g, values=values
        )
    runs["plain torch"] = lambda: quantize_plain(x, E4M3FN, scale)
    return compare(
        f"cast of {SIDE} x {SIDE}: amax, scale, round, saturate, count",
        runs,
        target={"cast, given scale, codes and values": 3.0},
    )
