"""The shape that an estimate gives to a bin: an exponential that has the bin's mean.

Of all densities on a bin with that mean it has the largest entropy. Places are on [0, 1], from the
bin's lower edge to its upper one: density ~ exp(k * u). A mean of 1/2 makes it uniform, a mean of
0 or 1 puts all elements on that edge.
"""

import numpy as np

PIECES = 8
"""Places at which the elements above a limit stand, each for as many."""
STEEPEST = 1e6
_STEEPNESS = np.sinh(np.linspace(-np.arcsinh(STEEPEST), np.arcsinh(STEEPEST), 4001))
_FLAT = 1e-4
"""Below this steepness series are used: differences would cancel."""


def share_below(mean: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return which share of a bin's elements lies below a place, for its mean; `[rows]` each."""
    steep = _steepness(mean)
    down = np.abs(steep)
    # Of a falling density; that of a rising one is its mirror.
    at = np.where(steep > 0, 1 - place, place)
    with np.errstate(invalid="ignore"):
        falling = np.expm1(-down * at) / np.expm1(-down)
    below = np.where(down < _FLAT, at, falling)
    return np.where(steep > 0, 1 - below, below)


def upper_part(mean: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return places of a bin's elements above a place, `[rows, PIECES]`, each for as many."""
    below = share_below(mean, place)[:, None]
    return _places(mean, below + (1 - below) * (np.arange(PIECES) + 0.5) / PIECES)


def mean_square(mean: np.ndarray) -> np.ndarray:
    """Return the mean square of a bin's places, for its mean."""
    return np.interp(mean, _MEANS, _SQUARES)


def _places(mean: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the places below which given shares of a bin's elements lie, `[rows, shares]`."""
    steep = _steepness(mean)[:, None]
    down = np.abs(steep)
    at = np.where(steep > 0, 1 - share, share)
    with np.errstate(divide="ignore", invalid="ignore"):
        falling = -np.log1p(at * np.expm1(-down)) / down
    place = np.where(down < _FLAT, at, falling)
    return np.clip(np.where(steep > 0, 1 - place, place), 0, 1)


def _mean_of(steep: np.ndarray) -> np.ndarray:
    flat = np.abs(steep) < _FLAT
    k = np.where(flat, 1, steep)
    with np.errstate(over="ignore"):
        found = -1 / np.expm1(-k) - 1 / k
    return np.where(flat, 0.5 + steep / 12, found)


def _square_of(steep: np.ndarray) -> np.ndarray:
    flat = np.abs(steep) < 100 * _FLAT
    k = np.where(flat, 1, steep)
    with np.errstate(over="ignore"):
        found = -(1 - 2 / k) / np.expm1(-k) + 2 / k**2
    return np.where(flat, 1 / 3 + steep / 12, found)


_MEANS = _mean_of(_STEEPNESS)
_SQUARES = _square_of(_STEEPNESS)


def _steepness(mean: np.ndarray) -> np.ndarray:
    return np.interp(mean, _MEANS, _STEEPNESS)
