"""Does a forward run again in backward? Reentrant checkpointing runs it first without gradients.

From inside such a first forward looks like an evaluation, and nothing public tells them apart: the
frames of torch's own function do. Its second forward runs only if an input of the checkpoint wants
a gradient; of a frozen base at the bottom of a model none does, and the first one is all there is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

_FIRST = CheckpointFunction.forward.__code__
_AGAIN = CheckpointFunction.backward.__code__
_FILE = _FIRST.co_filename


def is_in_a_function() -> bool:
    """Whether this is the forward of a `torch.autograd.Function`, whoever wrote it.

    torch disables forward-mode gradients in one beside the others; `torch.no_grad()` leaves them
    enabled, and `torch.inference_mode()` disables both.
    """
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def is_in_first_of_reentrant() -> bool:
    """Whether this is in the forward of reentrant checkpointing, which has no gradients."""
    return any(frame.f_code is _FIRST for frame in _frames())


def runs_once() -> bool:
    """Whether this is the first forward of reentrant checkpointing, and no second one follows."""
    if not is_in_a_function() or torch._C._current_graph_task_id() != -1:
        return False
    first = [frame for frame in _frames() if frame.f_code is _FIRST]
    return bool(first) and not any(any(f.f_locals["ctx"].needs_input_grad) for f in first)


def is_second_of_two() -> bool:
    """Whether backward runs this forward again, and the first time was one without gradients.

    The first one of checkpointing that is not reentrant has gradients, and is counted then.
    """
    for frame in _frames():
        if frame.f_code is _AGAIN:
            return True
        if frame.f_code.co_filename == _FILE and frame.f_code.co_name == "unpack_hook":
            return False
    return False


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Within:
    """A part of a forward that is computed again in a context."""

    def __init__(self, run: Callable[..., Any], context: AbstractContextManager[Any]) -> None:
        self._run = run
        self.context = context

    def __call__(self, *args: Any) -> Any:
        with self.context:
            return self._run(*args)


def run_again_within(context: AbstractContextManager[Any], opened_by: CodeType) -> None:
    """Have what is being checkpointed within a context be computed again within it.

    Backward computes it again when the context has long been left. Nothing public tells of it, so
    the function that is kept for it is found in the frames of torch's own.

    Args:
        context: What runs; it can be entered again.
        opened_by: The code that opened it: what is checkpointed around that opens it again.
    """
    for frame in _frames():
        if frame.f_code is opened_by:
            return
        if frame.f_code.co_filename != _FILE:
            continue
        if frame.f_code is _FIRST:
            _wrap(frame.f_locals["ctx"], "run_function", context)
        generator = frame.f_locals.get("gen")
        if frame.f_code.co_name == "checkpoint" and generator is not None:
            _wrap(generator.gi_frame.f_locals["new_frame"], "recompute_fn", context)


def _wrap(kept: Any, name: str, context: AbstractContextManager[Any]) -> None:
    run = getattr(kept, name)
    if not (isinstance(run, _Within) and run.context is context):
        setattr(kept, name, _Within(run, context))
