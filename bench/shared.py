"""What sharing scales costs at the width of a 70B model: bytes and time of an update.

Ranks are processes of this machine that meet through gloo, so the time is that of a loopback and of
the cores that they share. Run by itself, `python -m bench.shared`.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import unclamp
from unclamp.names import ROLES
from unclamp.nn import find_ledgers
from unclamp.nn.shared import HEADER

SITES, WIDTH, ROUNDS, WARM_UP = 1680, 2, 101, 5
FLOAT32_BYTES = 4


def update_ms(*, shared: bool) -> tuple[float, int]:
    """Return the median time of a step's update, and the bytes of the vector that is reduced."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(SITES // len(ROLES))))
    unclamp.convert(model, unclamp.Recipe(), group=dist.group.WORLD if shared else ())
    (ledger,) = find_ledgers(model)
    times = []
    for _ in range(ROUNDS + WARM_UP):
        ledger.pending.copy_(torch.rand_like(ledger.pending))
        dist.barrier()
        began = time.perf_counter()
        if ledger.is_due:  # as after an optimizer's step
            ledger.update()
        times.append(time.perf_counter() - began)
    sent = sum(part.length + HEADER for part in ledger.shared.parts) * FLOAT32_BYTES
    return statistics.median(times[WARM_UP:]) * 1e3, sent


def _work(rank: int, ranks: int, meeting: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    made = {"alone": update_ms(shared=False), "shared": update_ms(shared=True)}
    if rank == 0:
        results.put(made)
    dist.barrier()
    dist.destroy_process_group()


def measure() -> dict[str, dict[str, float]]:
    """Time updates on 2 and on 4 ranks, beside those of ranks that share nothing."""
    print(f"\nshared scales, {SITES} sites")
    found: dict[str, dict[str, float]] = {}
    for ranks in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            results = mp.get_context("spawn").SimpleQueue()
            mp.spawn(  # pyright: ignore[reportPrivateImportUsage]
                _work, args=(ranks, f"{folder}/meeting", results), nprocs=ranks
            )
            made = results.get()
        for name, (ms, sent) in made.items():
            found[f"{ranks} ranks, {name}"] = {"ms": ms, "bytes": sent}
            print(f"{f'{ranks} ranks, {name}':36} {ms:9.3f} ms  {sent:6d} bytes a rank")
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.shared", description=__doc__).parse_args()
    measure()
