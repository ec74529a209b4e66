"""Forwards that a copy of a model would share with it: those that someone put on the instance.

A library that changes one model's forward (TRL's fused head, a hook of accelerate) puts a function
on the instance that holds on to that model. `copy.deepcopy` copies no function, so the copy would
call the model itself.
"""

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

DEEPEST = 8
"""Functions around functions that are looked through."""


def forget_shared_forwards(twin: nn.Module, model: nn.Module) -> list[str]:
    """Give modules of a copy their class's forward where theirs holds on to the model.

    Returns:
        Their names.
    """
    originals = {id(module) for module in model.modules()}
    found = []
    for fqn, module in twin.named_modules():
        own = module.__dict__.get("forward")
        if own is not None and _holds(own, originals):
            del module.__dict__["forward"]
            found.append(fqn)
    return found


def _holds(thing: Any, originals: set[int], depth: int = 0) -> bool:
    """Whether something holds on to a module of the model, itself or through functions."""
    if isinstance(thing, nn.Module):
        return id(thing) in originals
    if depth == DEEPEST:
        return False
    return any(_holds(each, originals, depth + 1) for each in _parts(thing))


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, FunctionType):
        yield from (cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell))
        yield from thing.__dict__.values()  # of functools.wraps
    elif callable(thing) and not isinstance(thing, type):
        yield from getattr(thing, "__dict__", {}).values()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that is set later
        return False
