"""Which microbatch of a pipeline runs: one that all ranks have that hold the same stage.

How many microbatches a step has is known beforehand in a pipeline's schedule alone, where the stage
says it. Elsewhere a rank may make one more than the next, as with gradients that are accumulated,
and nothing tells. So only in a schedule's step can ranks meet in each microbatch.

A stage's own methods say which microbatch runs: they are wrapped when pipelining is imported
(`nn.rehearsal`). A backward in two runs, and a forward that backward computes again, are of the
microbatch whose forward it was.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RUNS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
"""Methods of a stage that run a microbatch, whose number is their first argument."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One of the parts that a schedule cuts a batch into.

    Attributes:
        number: Its place in the batch.
        of: How many there are; of one that trains.
        trains: Whether a backward follows.
    """

    number: int
    of: int
    trains: bool


_running: Microbatch | None = None


def running() -> Microbatch | None:
    """Return the microbatch that runs, in whichever thread; None outside of a schedule's step."""
    return _running


def know_microbatches(stage: Any) -> None:
    """Have a class of stages say which microbatch runs; one with other methods stays unknown."""
    methods = {name: stage.__dict__.get(name) for name in RUNS}
    if any(method is None or hasattr(method, "__wrapped__") for method in methods.values()):
        return
    for name, method in methods.items():
        setattr(stage, name, _telling(method))


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    _, name, *_ = inspect.signature(method).parameters

    @functools.wraps(method)
    def run(stage: Any, *args: Any, **kwargs: Any) -> Any:
        global _running
        number = args[0] if args else kwargs[name]
        count = stage.chunks or 0  # a stage that only ever evaluated does not know
        trains = bool(stage.has_backward)
        before, _running = _running, Microbatch(number=number, of=count, trains=trains)
        try:
            return method(stage, *args, **kwargs)
        finally:
            _running = before

    return run
