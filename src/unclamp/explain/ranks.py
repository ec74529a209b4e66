"""The processes that train or replay together, and what they tell each other.

A search over replays is the same program on each of them. It stays in step because whatever it
decides by is equal on all: losses are means over the ranks, counts are sums and maxima over them,
files are read by the first rank for all, and what may fail on one rank alone fails on all
(`together`). Where a rank fails in the midst of a step, whose collectives the others wait in, it
cannot tell them: it ends, which ends them (`RankFailed`).
"""

import itertools
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unclamp.errors import ReplayError, UnclampError
from unclamp.numerics.stats import MERGED_BY_MAX

T = TypeVar("T")
MEETING_S = 60.0
"""How long ranks wait for each other before anything is shared."""
ALIKE_S = 5.0
"""How long a rank that failed waits to hear whether the others did too."""
_LOOK_S = 0.02
_numbers = itertools.count()


class RankFailed(Exception):
    """A rank failed in the midst of what all ranks do, which none of them can go on with."""


class Ranks:
    """Processes that do the same together; one alone where there is no group.

    Args:
        group: A process group of all of them for tensors on the host; None: alone.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)
        self._met = 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def rejoin(self) -> None:
        """Meet in a new group: the process group was made anew."""
        self._group, self._met = _group_of_all(), 0

    # ---- values ----------------------------------------------------------------------------

    def gathered(self, value: T) -> list[T]:
        """Return each rank's value, in their order."""
        if not self.are_several:
            return [value]
        self._met += 1
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def every(self, flag: bool) -> bool:
        """Whether something holds on every rank."""
        return all(self.gathered(bool(flag)))

    def first(self, make: Callable[[], T]) -> T:
        """Return what the first rank makes, on all of them; what it raises is raised on all."""
        if not self.are_several:
            return make()
        return self._answer_of_first(make)

    def _answer_of_first(self, make: Callable[[], T]) -> T:
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told = [make(), None]
            except UnclampError as error:
                told = [None, error]
        self._met += 1
        dist.broadcast_object_list(told, group=self._group, group_src=0)
        value, error = told
        if error is not None:
            raise error
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Return what this rank makes; where making fails on one, all raise.

        Raises:
            ReplayError: As `work`, on all ranks; it names the rank if not all of them failed.
        """
        if not self.are_several:
            return work()
        value, error = None, None
        try:
            value = work()
        except UnclampError as caught:
            error = caught
        texts = self.gathered(None if error is None else str(error))
        if error is not None and all(text == texts[0] for text in texts):
            raise error
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise ReplayError("; ".join(failed)) from error
        return value  # pyright: ignore[reportReturnType]

    # ---- numbers ---------------------------------------------------------------------------

    def mean(self, losses: Mapping[int, float]) -> dict[int, float]:
        """Return the mean over ranks of the losses by step, for the steps that all have."""
        everyone = self.gathered(dict(losses))
        steps = [step for step in losses if all(step in each for each in everyone)]
        if not self.are_several:
            return dict(losses)
        return {step: mean_of([each[step] for each in everyone]) for step in steps}

    def summed(self, amounts: Mapping[T, float]) -> dict[T, float]:
        """Return the sums over ranks of amounts by name; one that a rank lacks is 0 there."""
        total: dict[T, float] = {}
        for each in self.gathered(dict(amounts)):
            for name, amount in each.items():
                total[name] = total.get(name, 0.0) + amount
        return total

    def merged(self, stats: Tensor) -> Tensor:
        """Return statistics of casts over all ranks, as `merge_stats` does: `[..., len(Stat)]`."""
        if not self.are_several:
            return stats
        self._met += 1
        stats = stats.clone()
        largest = stats[..., :MERGED_BY_MAX].contiguous()
        rest = stats[..., MERGED_BY_MAX:].contiguous()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        dist.all_reduce(rest, dist.ReduceOp.SUM, group=self._group)
        merged = torch.cat([largest, rest], -1)
        dist.broadcast(merged, group=self._group, group_src=0)  # sums may have other orders
        return merged

    def unequal(self, amounts: Tensor) -> Tensor:
        """Return which amounts are not the same on all ranks, bool, of their shape."""
        if not self.are_several:
            return torch.zeros_like(amounts, dtype=torch.bool)
        self._met += 1
        ends = torch.stack([amounts, -amounts])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        return ends[0] != -ends[1]

    def table(self, row: Tensor) -> Tensor:
        """Return the rows of all ranks, on the host: `[ranks, ...]`."""
        self._met += 1
        rows = [torch.empty_like(row) for _ in range(self.count)]
        dist.all_gather(rows, row, group=self._group)
        return torch.stack(rows)

    # ---- failures --------------------------------------------------------------------------

    def failed(self, error: Exception, where: str) -> Exception:
        """Return what to raise for an error in the midst of a replay.

        That is the error itself if it came on all ranks alike, so that all can go on.

        Args:
            error: What was raised here.
            where: In which step; the same text on all ranks that failed alike.
        """
        if not self.are_several:
            return error
        if isinstance(error, UnclampError | ValueError) and self._is_everyones(error, where):
            return error
        said = f"{type(error).__name__}: {_line(error)}{place_of(error)}"
        return RankFailed(f"rank {self.rank} failed in {where}: {said}")

    def _is_everyones(self, error: Exception, where: str) -> bool:
        store, key = _store(), f"unclamp/failed/{self._met}"
        text = f"{where} {type(error).__name__} {error}"
        others = [f"{key}/{rank}" for rank in range(self.count)]
        try:
            store.set(others[self.rank], text)
            store.wait(others, timedelta(seconds=ALIKE_S))
            return all(store.get(other).decode() == text for other in others)
        except RuntimeError:  # not all within that time, or the store is gone
            return False


ALONE = Ranks()


def mean_of(values: list[float]) -> float:
    """Return the mean of the losses of all ranks, in their order."""
    return sum(values) / len(values)


def are_several() -> bool:
    """Whether this process is one of several that know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_ranks() -> Ranks:
    """Return the processes of the default process group; every rank has to call.

    Raises:
        ReplayError: One has not called within a minute.
    """
    if not are_several():
        return ALONE
    _await_all(f"unclamp/ranks/{next(_numbers)}")
    return Ranks(_group_of_all())


def _group_of_all() -> Any:
    return dist.new_group(backend="gloo")


def _await_all(key: str) -> None:
    """Wait until all ranks came by, so that none waits in a collective for one that never does."""
    store, count = _store(), dist.get_world_size()
    store.add(key, 1)
    deadline = time.monotonic() + MEETING_S
    while (here := store.add(key, 0)) < count:
        if time.monotonic() > deadline:
            raise ReplayError(
                f"expected all {count} ranks to come here, and {here} did within "
                f"{MEETING_S:.0f} s: make Snapshots, or explain, on every rank"
            )
        time.sleep(_LOOK_S)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def place_of(error: BaseException) -> str:
    """Return the last line of code of an error that is not an installed library's, if any."""
    place, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "site-packages" not in path and not path.startswith("<"):
            place = f" ({path}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
