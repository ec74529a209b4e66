"""What a user gives a recorder: numbers to record, and how often."""

from typing import SupportsFloat

from torch import Tensor

from unclamp.errors import RunLogError
from unclamp.runlog import Every
from unclamp.telemetry.columns import Number


def checked(name: str, value: object) -> Number:
    """Return a number, or a copy of a tensor that holds one.

    Raises:
        RunLogError: It is something else.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().clone()
    if isinstance(value, Tensor) or not isinstance(value, SupportsFloat):
        shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else value
        raise RunLogError(f"expected a number for {name!r}, got {shown!r}; nothing is recorded")
    return float(value)


def cadence(value: Every | int, name: str) -> Every:
    """Return a cadence; a whole number n stands for every n-th step."""
    if isinstance(value, Every):
        return value
    try:
        return Every(value)
    except ValueError as error:
        raise RunLogError(f"{name}: {error}; write Every(100) or 100") from error
