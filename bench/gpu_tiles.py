"""Which tile, how many warps and registers make casts on a GPU fast: candidates side by side.

    python bench/gpu_tiles.py

Compiling comes first, shared among processes (Triton keeps kernels on disk); then all candidates
are timed in turn, so that drift hits all alike. What wins is written into `numerics.gpu.cast` by
hand.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.gpu_timing import graphed, rotating, times_ms
from unclamp import E4M3FN
from unclamp.numerics.gpu import cast
from unclamp.numerics.gpu.cast import Tile

ELEMENTS = 1 << 26
FLAT = [
    Tile(1, rows, 16, warps, registers, programs, ahead)
    for rows, warps, registers, programs, ahead in (
        (128, 4, 64, 8, False),
        (128, 4, 72, 7, True),
        (128, 4, 80, 6, True),
        (128, 4, 96, 5, True),
        (256, 4, 128, 4, False),
    )
]
TURNED = [
    Tile(4, rows, columns, warps, registers, programs)
    for rows, columns, warps, registers, programs in (
        (16, 64, 2, 168, 6),
        (32, 64, 4, 168, 3),
        (32, 32, 2, 168, 6),
        (8, 64, 1, 168, 12),
    )
]
KINDS: dict[str, dict[str, Any]] = {
    "delayed": {"measured": True},
    "guarded": {"guard": True},
    "no counts": {"measured": True, "counts": False},
}


def candidates() -> Iterator[tuple[str, Tile, dict[str, Any]]]:
    """Yield kind, tile and settings."""
    for tile, kind in itertools.product(FLAT, KINDS):
        yield kind, tile, KINDS[kind]
    for tile in TURNED:
        yield "turned", tile, {"measured": True, "turned": True}


def made(tile: Tile, settings: dict[str, Any]) -> Callable[[], Any]:
    """Return a cast of fresh numbers."""
    x = torch.randn(ELEMENTS // 4096, 4096, device="cuda").to(torch.bfloat16)
    scale = 448 / x.abs().max().float() * 0.5

    def run() -> Any:
        cast.FLAT = cast.TURNED = tile
        return cast.quantize_tensor(x, E4M3FN, scale, **settings)

    return run


def compiles(index: int) -> str:
    """Compile one candidate; return what went wrong, or nothing."""
    _, tile, settings = list(candidates())[index]
    try:
        made(tile, settings)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__} {str(error)[:80]}"
    return ""


def main() -> int:
    """Compile and time all."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        print("this bench needs a GPU, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    every = list(candidates())
    with get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        wrong = pool.map(compiles, range(len(every)), chunksize=1)
    device = torch.device("cuda")
    good = [c for c, error in zip(every, wrong, strict=True) if not error]
    for one, error in zip(every, wrong, strict=True):
        if error:
            print(*one[:2], error)

    def six(tile: Tile, settings: dict[str, Any]) -> Callable[[], None]:
        run = rotating(lambda: made(tile, settings))
        return graphed(lambda: [run() for _ in range(6)], device)

    times = times_ms([six(*one[1:]) for one in good], device, rounds=9, limit_s=30)
    for (kind, tile, _), ms in zip(good, times, strict=True):
        print(f"{kind:10} {tuple(tile)!s:30} {ms / 6 * 1e3:8.1f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
