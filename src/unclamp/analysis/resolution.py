"""To how many decimals a series was written: what rounding alone can make is no spike.

The resolution is told from the values so far, so a detector that uses it stays causal. A value
counts as written with d decimals if d are enough to write it down, within float32, in which
TensorBoard keeps what Hugging Face's Trainer has rounded. The series has those of the value with
most of them among the latest: one ends in a zero now and then, but not all of a hundred do.
"""

import math
from collections.abc import Iterable

import numpy as np

WINDOW = 100
MOST_DECIMALS = 8
"""With more, a series is not rounded: its last digit is below all that matters here."""
FEWEST_OF_ZERO = 2
"""With as many decimals or more, a zero is a small value that was rounded. Of whole numbers or
tenths it may be a count, or a reward."""
RELATIVE = 1.2e-7
"""Of float32, twice its largest relative error."""
_MOST_DOUBT = 0.1
"""In steps of the grid: where float32 is coarser, it cannot tell."""
LARGEST = _MOST_DOUBT / RELATIVE
POWERS = [10.0**decimals for decimals in range(MOST_DECIMALS + 1)]
_NOT_ROUNDED = MOST_DECIMALS + 1


class Resolution:
    """Estimates the decimals of a series while it arrives: `add` once a value.

    Attributes:
        decimals: Of the latest values; None where they are not rounded, or there are none.
        grid: The smallest difference of two values that were written so, in the unit of the
            series; 0 where they are not rounded.
    """

    def __init__(self) -> None:
        """Start without values."""
        self.decimals: int | None = None
        self.grid = 0.0
        self._count = 0
        self._latest = [-WINDOW] * (_NOT_ROUNDED + 1)

    def add(self, value: float) -> None:
        """Take in the next value. A zero says nothing of how it was written."""
        if value == 0 or not math.isfinite(value):
            return
        self._count += 1
        decimals = _decimals(value)
        self._latest[decimals] = self._count
        if decimals == _NOT_ROUNDED:
            self.decimals, self.grid = None, 0.0
            return
        first = self._count - WINDOW
        most = max(d for d, at in enumerate(self._latest) if at > first)
        self.decimals = None if most == _NOT_ROUNDED else most
        self.grid = 0.0 if self.decimals is None else 10.0**-self.decimals

    def unrounded(self, value: float) -> float:
        """Return half a step of the grid for a zero that may have been rounded to it."""
        is_small = value == 0 and self.decimals is not None and self.decimals >= FEWEST_OF_ZERO
        return self.grid / 2 if is_small else value


def has_ratios(values: Iterable[float] | np.ndarray) -> bool:
    """Return whether all finite values are positive, or zero for being written with few digits."""
    every = values if isinstance(values, np.ndarray) else np.asarray(list(values), np.float64)
    finite = every[np.isfinite(every)]
    if np.all(finite > 0):
        return True
    if np.any(finite < 0):
        return False
    resolution = Resolution()
    for value in finite.tolist():
        resolution.add(value)
        if resolution.unrounded(value) == 0:
            return False
    return True


def _decimals(value: float) -> int:
    """Return how many decimals write a value down, `_NOT_ROUNDED` for too many."""
    size = abs(value)
    most = math.floor(min(float(MOST_DECIMALS), math.log10(LARGEST / size)))
    if most < 0 or not _is_whole(size * POWERS[most]):
        return _NOT_ROUNDED
    return next(d for d, power in enumerate(POWERS) if _is_whole(size * power))


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) <= RELATIVE * number
