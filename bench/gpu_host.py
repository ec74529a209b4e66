"""Where the time of a converted layer goes on a GPU: Python by function, the device by kernel.

python bench/gpu_host.py
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.gpu_layers import compiled, fp8, settled, step_of

STEPS = 100


def host_us(run: Callable[[], None]) -> tuple[float, float]:
    """Return microseconds a step that the host takes, and that all takes."""
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        run()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    return host / STEPS * 1e6, (time.perf_counter() - began) / STEPS * 1e6


def by_function(run: Callable[[], None], lines: int) -> None:
    """Print the functions that take most of the host's time."""
    looked = cProfile.Profile()
    looked.enable()
    for _ in range(STEPS):
        run()
    looked.disable()
    torch.cuda.synchronize()
    pstats.Stats(looked).sort_stats("tottime").print_stats(lines)


def by_kernel(run: Callable[[], None]) -> None:
    """Print the kernels that take most of the device's time in a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as looked:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    rows = sorted(looked.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:16]:
        print(f"{row.self_device_time_total / 5:9.1f} us {row.count / 5:5.1f}x {row.key[:90]}")


def main() -> int:
    """Profile a small layer on the host and a large one on the device."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        print("this bench needs a GPU, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    for tokens, k, n in ((256, 256, 256), (16384, 4096, 4096)):
        base = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
        x, grad = (torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16) for d in (k, n))
        runs = {"bf16 eager": step_of(base, x, grad)}
        for way in ("unclamp eager", "unclamp compiled"):
            model = fp8(base)
            runs[way] = settled(
                step_of(compiled(model) if "comp" in way else model, x, grad), model
            )
        for name, run in runs.items():
            host, whole = host_us(run)
            print(
                f"\n== {tokens} x {k} x {n} {name}: host {host:.0f} us, all {whole:.0f} us a step"
            )
            if k > 256:
                by_kernel(run)
            elif "unclamp" in name:
                by_function(run, 40)
    return 0


if __name__ == "__main__":
    sys.exit(main())
