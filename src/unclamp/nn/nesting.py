"""Steps of optimizers within steps of optimizers: which one is the outermost.

ZeRO's optimizer steps one of its own for the parameters of its rank, and so on each rank another.
A step that raised never ends, as far as hooks tell; so where an earlier one seems to be going on,
the stack is asked.
"""

import sys
import weakref
from collections import Counter

from torch.optim.optimizer import Optimizer

_open: list[weakref.ref[Optimizer]] = []
_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
"""What runs around every optimizer's step, and calls the hooks."""


def begin(optimizer: Optimizer) -> None:
    """Take down that a step begins."""
    if _open:
        running = _running()
        running[id(optimizer)] -= 1  # this one
        _open[:] = [ref for ref in _open if (o := ref()) is not None and running[id(o)] > 0]
    _open.append(weakref.ref(optimizer))


def end(optimizer: Optimizer) -> bool:
    """Take down that a step ends; return whether it was the outermost."""
    while _open and _open.pop()() is not optimizer:
        pass
    return not _open


def _running() -> Counter[int]:
    """Return how many steps of each optimizer are going on, by its id."""
    running: Counter[int] = Counter()
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP:
            running[id(frame.f_locals.get("self"))] += 1
        frame = frame.f_back
    return running
