"""A period at which a series repeats itself, found without being told where to look."""

import math

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.response import running_median

MIN_PERIOD = 10
"""A shorter one is no period to a window of some lags."""
MIN_CYCLES = 3
HARMONICS = (1, 2, 4, 8, 16)
"""A sharp change has power at many multiples of its frequency: so many are summed."""
FINER = 16
"""Points of the spectrum for each independent one: the last harmonic needs as many."""
CONTINUUM_POINTS = 41
CHANCE = 1e-3
"""Of a period in a series without one."""
CYCLES_AROUND = 8
"""Other cycles that foretell a step, to either side: nearer ones are more alike."""
SMOOTH_STEPS = 5
SAME = 2
"""Jumps whose distances differ by so many steps at most are regular."""


def find_repeat(values: NDArray[np.float64]) -> float | None:
    """Return the period of `values` in steps, None where chance would make one like it.

    The sum of the power at a frequency and its multiples, against that of the frequencies
    nearby, so that slow changes and autocorrelation are no period; then, of the period found and
    its multiples, the one at which other cycles foretell each step best.

    Args:
        values: One a step, finite.

    Numerics: the chance that a series without a period has one is about 1 %.
    """
    length = len(values)
    if length < MIN_CYCLES * MIN_PERIOD or np.ptp(values) == 0:
        return None
    ratio, points = _whitened(values - values.mean())
    lowest, highest = MIN_CYCLES * points // length, points // MIN_PERIOD
    best, chance = None, CHANCE
    for harmonics in HARMONICS:
        candidates = np.arange(lowest, min(highest, (len(ratio) - 1) // harmonics) + 1)
        if not len(candidates):
            break
        sums = np.zeros(len(candidates))
        for multiple in range(1, harmonics + 1):
            sums += ratio[candidates * multiple]
        at = int(np.argmax(sums))
        trials = len(HARMONICS) * harmonics * len(candidates) / FINER
        found = trials * _gamma_tail(float(sums[at]), harmonics)
        if found < chance:
            best, chance = points / candidates[at], found
    return None if best is None else _refine(values, best)


def same_phase(values: NDArray[np.float64], period: float) -> NDArray[np.float64]:
    """Return at each step the mean of `values` at the same phase of the cycles around it.

    Of up to eight to either side, without its own; 0 where there is none.
    """
    total, count = np.zeros(len(values)), np.zeros(len(values))
    for cycle in range(1, CYCLES_AROUND + 1):
        lag = round(cycle * period)
        if lag >= len(values):
            break
        total[lag:] += values[:-lag]
        total[:-lag] += values[lag:]
        count[lag:] += 1
        count[:-lag] += 1
    return total / np.maximum(count, 1)


def repeat_of_changes(steps: NDArray[np.int64]) -> float | None:
    """Return the distance of changes that come at regular steps, three at least; else None."""
    gaps = np.diff(steps)
    if len(gaps) < MIN_CYCLES - 1 or np.ptp(gaps) > SAME or gaps.min() < MIN_PERIOD:
        return None
    return float(np.mean(gaps))


def _whitened(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Return power over that nearby, of mean 1 where nothing repeats, and the points of the FFT."""
    points = FINER * 2 ** math.ceil(math.log2(len(values)))
    power = np.abs(np.fft.rfft(values, points)) ** 2
    apart = points // len(values)
    coarse = np.arange(0, len(power), apart)
    level = running_median(power[coarse], CONTINUUM_POINTS) / math.log(2)
    level = np.interp(np.arange(len(power)), coarse, np.maximum(level, power.mean() * 1e-9))
    return power / level, points


def _gamma_tail(total: float, count: int) -> float:
    """Return the chance that a sum of `count` exponentials of mean 1 is above `total`."""
    logs = [i * math.log(max(total, 1e-300)) - math.lgamma(i + 1) for i in range(count)]
    return math.exp(min(0.0, float(np.logaddexp.reduce(logs)) - total))


def _refine(values: NDArray[np.float64], rough: float) -> float:
    """Return the period near `rough`, or a small multiple, at which cycles foretell each other."""
    smooth = np.convolve(values - values.mean(), np.ones(SMOOTH_STEPS) / SMOOTH_STEPS, "same")
    best, most = rough, -math.inf
    for multiple in (1, 2, 3, 4):
        middle = multiple * rough
        if middle * MIN_CYCLES > len(values):
            break
        slack = max(0.5, middle**2 / len(values) / 8)
        for period in np.linspace(middle - slack, middle + slack, 41).tolist():
            foretold = same_phase(smooth, period)
            size = float(np.sqrt(foretold @ foretold))
            match = float(smooth @ foretold) / size if size > 0 else -math.inf
            if match > most * (1 + 0.1 * (multiple > 1)):
                best, most = period, match
    return best
