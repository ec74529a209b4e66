"""Series of many values: judged by compiled code (`kernels`), which says what the detectors say.

It is imported where it is needed, since numba is slow to import.
"""

from typing import Any, NamedTuple

import numpy as np

from unclamp.analysis import divergences, kernels, resolution, robust
from unclamp.analysis.definitions import Judged


class Digits(NamedTuple):
    """Numbers of `resolution`, by their names there."""

    window: int
    most_decimals: int
    fewest_of_zero: int
    relative: float
    largest: float


class Rule(NamedTuple):
    """Numbers of `robust`, by their names there, and the threshold that was asked for."""

    asked: float
    threshold: float
    level_points: int
    base_points: int
    drift_points: int
    error_points: int
    first_errors: int
    latest_share: float
    latest_errors: int
    settled: int
    usual_streak: int
    most_alike: float
    most_streaks: int
    small_sample: float
    delay: int
    tail_share: int
    tail_slack: float
    tail_power: float
    tail_doubt: int
    largest_excess: float
    largest_tail_rise: float
    grid_steps: float
    normal_iqr: float
    rounding_spread: float
    end_share: float
    largest_exponent: float
    min_rise: float
    rounding: float


class SlowRule(NamedTuple):
    """Numbers of `divergences`, by their names there."""

    level_points: int
    step_points: int
    step_share: float
    blocks: int
    fewest_blocks: int
    sigmas: float
    grid_steps: float
    end_share: float
    least_rise: float
    normal_iqr: float


def _numbers_of(module: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, name.upper()) for name in fields}


_DIGITS = Digits(**_numbers_of(resolution, Digits._fields))
_POWERS = np.array(resolution.POWERS)
_GRIDS = np.array([10.0**-decimals for decimals in range(resolution.MOST_DECIMALS + 1)])
_TAILS = np.array(robust.NORMAL_TAILS)
_SLOW = SlowRule(**_numbers_of(divergences, SlowRule._fields))


def judge_robust(values: np.ndarray, threshold: float) -> Judged:
    """Judge a finite series as `robust.SpikeDetector` does, value by value."""
    rule = Rule(asked=float(threshold), **_numbers_of(robust, Rule._fields[1:]))
    spike = np.empty(len(values), dtype=np.int64)
    level, limit, spread = np.empty((3, len(values)))
    told = (spike, level, limit, spread)
    kernels.judge(values, rule, _DIGITS, _TAILS, _POWERS, _GRIDS, *told)
    return Judged(spike=spike, level=level, limit=limit, spread=spread)


def diverge(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each finite value whether the series diverges at it, its level and the lowest one.

    As `divergences.DivergenceDetector` says after each.
    """
    is_open = np.zeros(len(values), dtype=np.bool_)
    levels, lows = np.full((2, len(values)), np.nan)
    kernels.diverge(values, _SLOW, _DIGITS, _POWERS, _GRIDS, is_open, levels, lows)
    return is_open, levels, lows
