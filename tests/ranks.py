"""Runs a function on several processes that meet through gloo, and ends them in any case.

The server that they are forked from has loaded torch and unclamp with its kernels, so a process is
there in a tenth of a second. What a worker warns of is an error, as in every test.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from patience import PATIENCE_S

LOADED = [
    "duckdb",
    "fsspec",
    "pandas",
    "pytest",
    "scipy.stats",
    "torch",
    "torch._dynamo",  # which each would load by the first step of an optimizer, in a second
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "unclamp.explain",
    "unclamp.nn",
    "warmed",
]
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(LOADED)


def _start_server() -> None:
    """Start the server that ranks are forked from, where it does not run.

    Before Python 3.12.4 it loads what it is told to before it has our path.
    """
    kept, ours = os.environ.get("PYTHONPATH"), str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = ours if kept is None else f"{ours}{os.pathsep}{kept}"
    try:
        forkserver.ensure_running()
    finally:
        if kept is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = kept


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a process ended that did not return.

    Attributes:
        kind: Name of the exception's class; "killed" where the process was gone.
        text: What it said.
        trace: Where.
    """

    kind: str
    text: str
    trace: str = ""


def run_ranks(
    count: int, worker: Callable[..., Any], *args: Any, patience_s: float = PATIENCE_S
) -> list[Any]:
    """Return what `worker(rank, *args)` returns on each rank.

    Raises:
        AssertionError: One raised, was killed, or did not end in time.
    """
    results = outcomes(count, worker, *args, patience_s=patience_s)
    failed = {rank: r for rank, r in enumerate(results) if isinstance(r, Failure)}
    assert not failed, "\n".join(
        f"rank {n}: {f.kind}: {f.text}\n{f.trace}" for n, f in failed.items()
    )
    return results


def outcomes(
    count: int,
    worker: Callable[..., Any],
    *args: Any,
    patience_s: float = PATIENCE_S,
    collective_s: float = 60,
) -> list[Any]:
    """Return what `worker(rank, *args)` returns on each rank, or how it failed.

    Args:
        count: Ranks.
        worker: A function of a module, on each rank called with the default group there.
        args: What can be pickled.
        patience_s: Seconds after which all are killed.
        collective_s: Seconds after which torch gives a collective up.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        ours, processes = [], []
        for rank in range(count):
            mine, theirs = _fork.Pipe(duplex=False)
            process = _fork.Process(
                target=_work,
                args=(theirs, str(meeting), rank, count, collective_s, worker, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            ours.append(mine)
            processes.append(process)
        try:
            return _received(ours, time.monotonic() + patience_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _received(pipes: Sequence[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    left = {id(pipe): rank for rank, pipe in enumerate(pipes)}
    while left:
        waiting = [pipes[rank] for rank in left.values()]
        ready: list[Any] = list(wait(waiting, max(0, deadline - time.monotonic())))
        if not ready:
            raise AssertionError(f"ranks {sorted(left.values())} did not end")
        for pipe in ready:
            rank = left.pop(id(pipe))
            try:
                results[rank] = pipe.recv()
            except EOFError:
                results[rank] = Failure(kind="killed", text="ended without a word")
    return [results[rank] for rank in range(len(pipes))]


def _work(
    pipe: Any,
    meeting: str,
    rank: int,
    count: int,
    collective_s: float,
    worker: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    warnings.simplefilter("error")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=collective_s),
        )
        result = worker(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        result = Failure(kind=type(error).__name__, text=str(error), trace=traceback.format_exc())
    pipe.send(result)
