"""Does a forward run again in backward? Reentrant checkpointing runs it first without gradients.

From inside such a first forward looks like an evaluation, and nothing public tells them apart: the
frames of torch's own function do. Its second forward runs only if an input of the checkpoint wants
a gradient; of a frozen base at the bottom of a model none does, and the first one is all there is.
"""

import sys
from collections.abc import Iterator
from types import FrameType

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
