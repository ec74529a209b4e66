"""Which microbatch of a pipeline runs: one that all ranks have that hold the same stage.

How many microbatches a step has is known beforehand in a pipeline's schedule alone, where the stage
says it. Elsewhere a rank may make one more than the next, as with gradients that are accumulated,
and nothing tells. So only in a schedule's step can ranks meet in each microbatch.

A stage's own methods say which microbatch runs, and in which step: they are wrapped when pipelining
is imported (`nn.rehearsal`). A backward in two runs, and a forward that backward computes again,
are of the microbatch whose forward it was.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BEGINS = "clear_runtime_states"
"""The method of a stage that each step of its schedule begins with."""
RUNS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
"""Those that run a microbatch, with its number in front."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One of the parts that a schedule cuts a batch into.

    Attributes:
        run: Which step of which stage, in this process.
        number: Its place in the batch.
        of: How many there are; of one that trains.
        trains: Whether a backward follows.
    """

    run: int
    number: int
    of: int
    trains: bool


_running: Microbatch | None = None
_numbers = itertools.count(1)
_runs: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


def running() -> Microbatch | None:
    """Return the microbatch that runs, in whichever thread; None outside of a schedule's step."""
    return _running


def know_microbatches(stage: Any) -> None:
    """Have a class of stages say which microbatch runs; one with other methods stays unknown."""
    if any(name not in stage.__dict__ for name in (BEGINS, *RUNS)):
        return
    if hasattr(stage.__dict__[BEGINS], "__wrapped__"):
        return
    setattr(stage, BEGINS, _beginning(stage.__dict__[BEGINS]))
    for name in RUNS:
        setattr(stage, name, _running_in(stage.__dict__[name]))


def _beginning(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        _runs[self] = next(_numbers)
        return method(self, *args, **kwargs)

    return begin


def _running_in(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        global _running
        before, _running = _running, _of(self, number)
        try:
            return method(self, number, *args, **kwargs)
        finally:
            _running = before

    return run


def _of(stage: Any, number: int) -> Microbatch | None:
    if stage not in _runs:
        return None
    count = stage.chunks or 0  # a stage that only ever evaluated does not know
    return Microbatch(run=_runs[stage], number=number, of=count, trains=bool(stage.has_backward))
