"""Generated training curves without a spike, by family, and spikes to plant in them.

Tuning uses seeds below `HELD_OUT`; published rates and tests use those from there on.
"""

import math
from collections.abc import Callable

import numpy as np

HELD_OUT = 1_000_000
Rng = np.random.Generator


def _trend(rng: Rng, steps: int) -> np.ndarray:
    """A power law from about 11 to about 2.5, as of a language model."""
    start, final = rng.uniform(8, 12), rng.uniform(1.5, 3.5)
    pace, power = rng.uniform(5, 60), rng.uniform(0.4, 1.0)
    return final + (start - final) * (1 + np.arange(steps) / pace) ** -power


def decaying(rng: Rng, steps: int) -> np.ndarray:
    return _trend(rng, steps) * (1 + rng.uniform(0.005, 0.03) * rng.standard_normal(steps))


def noisy(rng: Rng, steps: int) -> np.ndarray:
    return _trend(rng, steps) * (1 + rng.uniform(0.05, 0.12) * rng.standard_normal(steps))


def warm_up(rng: Rng, steps: int) -> np.ndarray:
    """Flat while the learning rate is small, then a steep fall, then a slow one."""
    begin, width = rng.uniform(10, 200), rng.uniform(5, 60)
    fall = 1 / (1 + np.exp(-(np.arange(steps) - begin) / width))
    start = rng.uniform(9, 12)
    trend = start + (_trend(rng, steps) - start) * fall
    noise = rng.uniform(0.005, 0.03) * (1 + 2 * np.exp(-np.arange(steps) / begin))
    return trend * (1 + noise * rng.standard_normal(steps))


def lr_drops(rng: Rng, steps: int) -> np.ndarray:
    """One to four drops of 5 to 40 % within at most 20 steps, with less noise after each."""
    curve = _trend(rng, steps)
    noise = np.full(steps, rng.uniform(0.01, 0.03))
    for at in rng.integers(50, steps - 50, rng.integers(1, 5)):
        fraction, width = rng.uniform(0.05, 0.4), rng.uniform(0.5, 20)
        fall = 1 - np.exp(-np.maximum(np.arange(steps) - at, 0) / width)
        curve, noise = curve * (1 - fraction * fall), noise * (1 - 0.3 * fall)
    return curve * (1 + noise * rng.standard_normal(steps))


def heavy_tailed(rng: Rng, steps: int) -> np.ndarray:
    """Student's t with 3 degrees of freedom, standard deviation 0.5 to 3 %."""
    noise = rng.standard_t(3, steps) / np.sqrt(3)
    return _trend(rng, steps) * np.exp(rng.uniform(0.005, 0.03) * noise)


def autocorrelated(rng: Rng, steps: int) -> np.ndarray:
    noise = _ar1(rng, steps, rng.uniform(0.5, 0.98))
    return _trend(rng, steps) * (1 + rng.uniform(0.01, 0.03) * noise)


def gradient_norm(rng: Rng, steps: int) -> np.ndarray:
    """Large at first, log-normal, autocorrelated, slowly rising to the end."""
    trend = 0.3 + rng.uniform(1, 20) * np.exp(-np.arange(steps) / rng.uniform(10, 100))
    trend = trend * (1 + rng.uniform(0, 1) * np.arange(steps) / steps)
    noise = 0.6 * rng.standard_normal(steps) + 0.8 * _ar1(rng, steps, rng.uniform(0.3, 0.9))
    return trend * np.exp(rng.uniform(0.05, 0.25) * noise)


def _ar1(rng: Rng, steps: int, phi: float) -> np.ndarray:
    shocks = rng.standard_normal(steps) * np.sqrt(1 - phi**2)
    shocks[0] = rng.standard_normal()
    for i in range(1, steps):
        shocks[i] += phi * shocks[i - 1]
    return shocks


def restarts(rng: Rng, steps: int) -> np.ndarray:
    """A learning rate of cosines: each restart raises the loss by 5 to 30 % in 1 to 200 steps."""
    cycle, height = int(rng.integers(200, 2000)), rng.uniform(0.05, 0.3)
    phase = (np.arange(steps) % cycle) / cycle
    rate = (1 + np.cos(np.pi * phase)) / 2
    width = rng.uniform(1, 200)
    warm = np.where(np.arange(steps) < cycle, 1, 1 - np.exp(-phase * cycle / width))
    return _trend(rng, steps) * (1 + height * rate * warm) * _lognormal(rng, steps, 0.005, 0.03)


def plateaus(rng: Rng, steps: int) -> np.ndarray:
    """Flat for long, then a fall by 10 to 60 % within 1 to 100 steps; up to six times."""
    log = np.full(steps, np.log(rng.uniform(2, 11)))
    for at in rng.integers(0, steps, rng.integers(1, 7)):
        width = rng.uniform(0.3, 25)
        fall = (1 + np.tanh((np.arange(steps) - at) / width / 2)) / 2
        log -= rng.uniform(0.1, 0.9) * fall
    return np.exp(log) * _lognormal(rng, steps, 0.005, 0.05)


def data_changes(rng: Rng, steps: int) -> np.ndarray:
    """Other data up to four times: 30 % lower to 30 % higher within 1 to 500 steps, for good."""
    log = np.zeros(steps)
    for at in rng.integers(100, steps - 50, rng.integers(1, 5)):
        width = np.exp(rng.uniform(0, np.log(500)))
        log += np.log(rng.uniform(0.7, 1.3)) * np.clip((np.arange(steps) - at) / width, 0, 1)
        log = np.minimum(log, np.log(1.3))
    return _trend(rng, steps) * np.exp(log) * _lognormal(rng, steps, 0.005, 0.03)


def epochs(rng: Rng, steps: int) -> np.ndarray:
    """A saw: the loss falls by 5 to 20 % where an epoch begins and rises within it."""
    length, height = int(rng.integers(50, 1000)), rng.uniform(0.05, 0.2)
    inside = (np.arange(steps) % length) / length
    return _trend(rng, steps) * (1 + height * inside) * _lognormal(rng, steps, 0.005, 0.03)


def wandering(rng: Rng, steps: int) -> np.ndarray:
    """Noise that keeps its sign for hundreds of steps, of 2 to 5 %."""
    slow = _ar1(rng, steps, 1 - 1 / rng.uniform(100, 500))
    return (
        _trend(rng, steps)
        * np.exp(rng.uniform(0.02, 0.05) * slow)
        * _lognormal(rng, steps, 0.005, 0.03)
    )


def oscillating(rng: Rng, steps: int) -> np.ndarray:
    """A sine of 10 to 50 % and 2 to 100 steps, as at the edge of stability."""
    log = rng.uniform(0.1, 0.5) * np.sin(
        2 * np.pi * np.arange(steps) / rng.uniform(2, 100) + rng.uniform(0, 2 * np.pi)
    )
    return _trend(rng, steps) * np.exp(log) * _lognormal(rng, steps, 0.005, 0.03)


def near_zero(rng: Rng, steps: int) -> np.ndarray:
    """From 1 to 5 down to 0.0005 to 0.02: a task that is learned."""
    start, final = rng.uniform(1, 5), np.exp(rng.uniform(np.log(0.0005), np.log(0.02)))
    trend = final + (start - final) * np.exp(-np.arange(steps) / rng.uniform(20, 200))
    return trend * _lognormal(rng, steps, 0.005, 0.2)


def _lognormal(rng: Rng, steps: int, least: float, most: float) -> np.ndarray:
    return np.exp(rng.uniform(least, most) * rng.standard_normal(steps))


FAMILIES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "decaying": decaying,
    "noisy": noisy,
    "warm-up": warm_up,
    "learning-rate drops": lr_drops,
    "heavy-tailed": heavy_tailed,
    "autocorrelated": autocorrelated,
    "gradient norm": gradient_norm,
}
SCHEDULES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "cosine restarts": restarts,
    "plateaus": plateaus,
    "data changes": data_changes,
    "epoch sawtooth": epochs,
    "wandering": wandering,
    "oscillating": oscillating,
    "near zero": near_zero,
}
"""Healthy, but not steadily falling."""


def healthy(family: str, seed: int) -> np.ndarray:
    """One curve of 2,000 to 10,000 steps."""
    number = [*FAMILIES, *SCHEDULES].index(family)
    rng = np.random.default_rng([seed, number])
    return (FAMILIES | SCHEDULES)[family](rng, int(rng.integers(2_000, 10_001)))


def planted(
    seed: int, *, height: float, length: int, noise: float = 0.02, steps: int = 600
) -> tuple[np.ndarray, int]:
    """A decaying curve with normal noise, and the onset of the one spike planted in it."""
    rng = np.random.default_rng([seed, 99])
    curve = _trend(rng, steps) * (1 + noise * rng.standard_normal(steps))
    onset = int(rng.integers(60, steps - length - 10))
    curve[onset : onset + length] *= height
    return curve, onset


def diverging(
    seed: int, *, rate: float, height: float, noise: float = 0.02, after: int = 50
) -> tuple[np.ndarray, int]:
    """A decaying curve that from an onset on rises by `rate` a step to `height` times, and onset.

    It ends `after` steps above.
    """
    rng = np.random.default_rng([seed, 98])
    onset = int(rng.integers(500, 3000))
    rise = (1 + rate) ** np.arange(math.ceil(math.log(height) / math.log1p(rate)) + after)
    steps = onset + len(rise)
    curve = _trend(rng, steps) * (1 + noise * rng.standard_normal(steps))
    curve[onset:] *= np.minimum(rise, height)
    return curve, onset


def shifting(seed: int, *, height: float, width: int, noise: float = 0.02) -> np.ndarray:
    """A decaying curve of 3,000 steps that within `width` steps comes to another level for good."""
    rng = np.random.default_rng([seed, 96])
    onset = int(rng.integers(800, 2000))
    curve = _trend(rng, 3000) * (1 + noise * rng.standard_normal(3000))
    done = np.clip((np.arange(3000) - onset + 1) / width, 0, 1)
    return curve * height**done


def two_kinds(
    seed: int, *, steps: int = 2000, every: int = 20, noise: float = 0.03
) -> tuple[np.ndarray, list[str | None]]:
    """Return losses of two kinds of batches, and the kinds: at 2.0, and each `every`-th at 3.5."""
    rng = np.random.default_rng([seed, 211])
    groups: list[str | None] = ["answers" if i % every == 0 else None for i in range(steps)]
    levels = np.array([2.0 if group is None else 3.5 for group in groups])
    return levels * np.exp(noise * rng.standard_normal(steps)), groups


def early(seed: int, *, kind: str, height: float, length: int) -> tuple[np.ndarray, int]:
    """A decaying curve of 400 steps, odd in its first 100, with one spike from 120 on, and onset.

    Of the kinds "plain", "outlier", "outliers", "cliff", "noisy start", "shift", "burst".
    """
    rng = np.random.default_rng([seed, 94])
    steps = np.arange(400)
    curve, noise = _trend(rng, 400), np.full(400, rng.uniform(0.01, 0.03))
    if kind == "outlier":
        curve[int(rng.integers(5, 25))] *= rng.uniform(1.25, 2.0)
    elif kind == "outliers":
        curve[rng.integers(3, 60, 3)] *= rng.uniform(1.1, 1.5, 3)
    elif kind == "cliff":
        fall = 1 / (1 + np.exp(-(steps - rng.uniform(10, 80)) / rng.uniform(0.5, 8)))
        start = rng.uniform(9, 12)
        curve = start + (curve - start) * fall
    elif kind == "noisy start":
        noise *= 1 + rng.uniform(3, 8) * np.exp(-steps / rng.uniform(10, 40))
    elif kind == "shift":
        curve[int(rng.integers(30, 100)) :] *= rng.uniform(1.1, 1.6)
    elif kind == "burst":
        at = int(rng.integers(30, 100))
        noise[at : at + 12] *= 5
    else:
        assert kind == "plain"
    curve *= np.exp(noise * rng.standard_normal(400))
    onset = int(rng.integers(120, 360))
    curve[onset : onset + length] *= height
    return curve, onset
