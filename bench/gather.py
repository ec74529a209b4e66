"""FSDP2's all-gather of FP8 codes against that of weights: bytes and time of a step, on 2 ranks.

The ranks are processes of this machine that meet through gloo, so that time is that of a loopback;
bytes are what any wire would carry.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import unclamp

RANKS, WIDTH, DEPTH, TOKENS, ROUNDS = 2, 1024, 4, 128, 11
WEIGHTS: dict[str, unclamp.Scaling] = {
    "delayed": unclamp.Delayed(),
    "guarded": unclamp.Guarded(),
    "dynamic": unclamp.Dynamic(),
}


class _Bytes(TorchDispatchMode):
    """Adds up what a rank hands to all-gathers and all-reduces."""

    gathered = reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::_allgather_base_":
            self.gathered += args[1].nbytes
        if func._schema.name == "c10d::allreduce_":
            self.reduced += sum(x.nbytes for x in args[0])
        return func(*args, **(kwargs or {}))


def _model(scaling: unclamp.Scaling, dtype: torch.dtype, *, gathers: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    model = nn.Sequential(*blocks)
    unclamp.convert(model, unclamp.Recipe(weight=scaling))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    if gathers:
        unclamp.gather_codes(model)
    return model


def _stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    return step


def _compare(rank: int, meeting: str, results: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{meeting}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    x = torch.randn(TOKENS, WIDTH)
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, scaling in WEIGHTS.items():
            steps = {
                how: _stepper(_model(scaling, dtype, gathers=how == "codes"), x)
                for how in ("weights", "codes")
            }
            label = f"{str(dtype)[6:]}, {name}"
            for how, step in steps.items():
                step()  # the first gather measures
                with _Bytes() as count:
                    step()
                found[f"{label}, {how}"] = {"bytes": count.gathered, "reduced": count.reduced}
            times: dict[str, list[float]] = {how: [] for how in steps}
            for _ in range(ROUNDS):
                for how, step in steps.items():
                    dist.barrier()
                    began = time.perf_counter()
                    step()
                    times[how].append(time.perf_counter() - began)
            for how, each in times.items():
                found[f"{label}, {how}"]["ms"] = statistics.median(each) * 1e3
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def measure() -> dict[str, dict[str, float]]:
    """Compare a step that gathers weights with one that gathers codes, on 2 ranks."""
    print(f"\nFSDP2 on {RANKS} ranks, {DEPTH} layers of {WIDTH} x {WIDTH}, {TOKENS} tokens a rank")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        mp.spawn(_compare, args=(f"{folder}/meeting", str(results)), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        found: dict[str, dict[str, float]] = torch.load(results)
    for name, each in found.items():
        print(
            f"{name:26} {each['bytes']:>12,.0f} B gathered {each['reduced']:>6,.0f} B reduced "
            f"{each['ms']:9.1f} ms"
        )
    return found
