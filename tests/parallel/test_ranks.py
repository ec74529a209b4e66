import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from ranks import Failure, outcomes, run_ranks


def _sum(rank: int, factor: float) -> float:
    x = torch.tensor(factor * (rank + 1))
    dist.all_reduce(x)
    return float(x)


def _raise_on_one(rank: int) -> int:
    if rank == 1:
        raise ValueError("one is wrong")
    return rank


def _sleep(rank: int) -> None:
    time.sleep(60)


def _die(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_meet_and_return() -> None:
    assert run_ranks(3, _sum, 2.0) == [12.0] * 3


def test_a_rank_that_raises_is_told() -> None:
    _, failed = outcomes(2, _raise_on_one, collective_s=5)
    assert (failed.kind, failed.text) == ("ValueError", "one is wrong")


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not end"):
        run_ranks(2, _sleep, patience_s=3)


def test_a_killed_rank_is_told() -> None:
    assert outcomes(1, _die) == [Failure(kind="killed", text="ended without a word")]
