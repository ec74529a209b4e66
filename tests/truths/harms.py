"""Synthetic runs in which many sites clamp and each raises the loss by a planted share."""

import numpy as np
from numpy.typing import NDArray

from truths.arrays import Planted, plant

SHARES = (0.0, 0.0, 0.002, 0.005, 0.01, 0.03)
EFFECT_STEPS = 2


def plant_harms(
    seed: int, *, family: str = "independent", sites: int = 24, steps: int = 3000
) -> tuple[Planted, NDArray[np.float64]]:
    """Return a run and by what share the clamping of each site raises the loss.

    It does so in each of the first two steps that clamping can act on, in addition to what other
    sites do, and however much is clamped.
    """
    run = plant(seed, family=family, sites=sites, steps=steps, spikes=5)
    rng = np.random.default_rng([seed, 77])
    shares = rng.choice(SHARES, sites) * (rng.random(sites) < rng.choice([0.1, 0.5]))
    for site in np.flatnonzero(shares).tolist():
        acts = np.zeros(steps, dtype=bool)
        first = site % 3 // 2
        for lag in range(first, first + EFFECT_STEPS):
            acts[lag:] |= run.errors[site, : steps - lag] > 0
        run.loss[acts] *= 1 + shares[site]
    return run, shares
