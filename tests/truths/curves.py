"""Generated training curves without a spike, by family, and spikes to plant in them.

Tuning uses seeds below `HELD_OUT`; published rates and tests use those from there on.
"""

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


FAMILIES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "decaying": decaying,
    "noisy": noisy,
    "warm-up": warm_up,
    "learning-rate drops": lr_drops,
    "heavy-tailed": heavy_tailed,
    "autocorrelated": autocorrelated,
    "gradient norm": gradient_norm,
}


def healthy(family: str, seed: int) -> np.ndarray:
    """One curve of 2,000 to 10,000 steps."""
    rng = np.random.default_rng([seed, list(FAMILIES).index(family)])
    return FAMILIES[family](rng, int(rng.integers(2_000, 10_001)))


def planted(
    seed: int, *, height: float, length: int, noise: float = 0.02, steps: int = 600
) -> tuple[np.ndarray, int]:
    """A decaying curve with normal noise, and the onset of the one spike planted in it."""
    rng = np.random.default_rng([seed, 99])
    curve = _trend(rng, steps) * (1 + noise * rng.standard_normal(steps))
    onset = int(rng.integers(60, steps - length - 10))
    curve[onset : onset + length] *= height
    return curve, onset
