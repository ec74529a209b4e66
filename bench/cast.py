"""The cast of 16.7 M values with every counter, against a plain copy into a ready buffer.

The kernels are compiled for the widest instructions of this machine, and once more in a process of
its own for AVX2 where these are wider. numba takes `NUMBA_CPU_NAME` for the order of instructions
only, as long as `NUMBA_CPU_FEATURES` does not take the wider ones away.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from bench.timing import compare
from unclamp import E4M3FN, MX, PerBlock, PerRow, quantize
from unclamp.numerics.cast import quantize_plain

SIDE = 4096
AVX512, AVX2 = "AVX-512", "AVX2"
FORCED = {AVX2: {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}}
"""What compiles the kernels for fewer instructions than the machine has."""
CASTS = (
    "given scale, ready buffers", "own scale", "own scales, row", "own scales, 1x128",
    "own scales, 128x128", "own scales, mx", "of bf16",
)  # fmt: skip
TARGETS = {AVX512: (2.4, 3.0, 3.0, 3.7, 3.2, 4.5, 2.0), AVX2: (3.0, 3.7, 3.7, 4.5, 4.0, 5.5, 2.5)}


def instructions() -> str:
    """Name the widest vector instructions that the kernels of this process are compiled for."""
    for name, forced in FORCED.items():
        if all(os.environ.get(key) == value for key, value in forced.items()):
            return name
    features = llvm.get_host_cpu_features()
    return next((name for name in (AVX512, AVX2) if features.get(_FLAG[name])), "other")


_FLAG = {AVX512: "avx512f", AVX2: "avx2"}


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
    used = instructions()
    targets = dict(zip(CASTS, TARGETS.get(used, ()), strict=False))
    results = compare(
        f"cast of {SIDE} x {SIDE}, {used}: amax, scale, round, saturate, count",
        runs,
        target={name: t for name in runs for end, t in targets.items() if name.endswith(end)},
    )
    # Apart: what it frees would leave the others fresh memory to take.
    plain = {"copy_, fp32": runs["copy_, fp32"], "plain torch": lambda: quantize_plain(x, E4M3FN)}
    return results | compare("the same in plain torch", plain, rounds=5)


def measure_forced() -> dict[str, dict[str, dict[str, float]]]:
    """Time the same with narrower instructions, by their name; nothing where there are none."""
    if instructions() != AVX512:
        return {}
    found = {}
    for name, forced in FORCED.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results.json"
            command = [sys.executable, "-m", "bench.cast", "--out", str(out)]
            subprocess.run(command, env=os.environ | forced, check=True)
            found[f"cast, {name}"] = json.loads(out.read_text())
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.cast", description=__doc__)
    parser.add_argument("--out", type=Path, help="a file for the results, JSON")
    wanted = parser.parse_args()
    made = measure()
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(made) + "\n")
