"""Synthetic runs with a known truth: clamping that is harmless, and clamping that is not.

A family says how harmless clamping is spread in time, and how spikes are; neither knows of the
other. A culprit's clamping precedes the spikes; an effect's follows them.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.evidence import Clamping

FAMILIES = (
    "independent",
    "bursts",
    "common",
    "early",
    "warm-up",
    "drift",
    "own trends",
    "periodic",
    "noisy loss",
)
ROLES = ("input", "weight", "grad_output")
DWELLS = (5, 20, 80, 300)
SHARES = np.geomspace(1e-6, 0.999, 400)
QUANTILES = np.array([NormalDist().inv_cdf(share) for share in SHARES])


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A run: errors is sites by steps, 0 where nothing is clamped; spikes by first and last."""

    errors: NDArray[np.float64]
    loss: NDArray[np.float64]
    onsets: NDArray[np.int64]
    spikes: list[tuple[int, int]]

    @property
    def names(self) -> list[tuple[int, str, str]]:
        return [(s, f"layers.{s // 3}.proj", ROLES[s % 3]) for s in range(len(self.errors))]

    def clamping(self) -> Clamping:
        site, step = np.nonzero(self.errors)
        sites, length = self.errors.shape
        return Clamping(
            starts=np.searchsorted(site, np.arange(sites + 1)),
            steps=step,
            errors=self.errors[site, step],
            first_lags=np.arange(sites) % 3 // 2,
            length=length,
        )


def plant(
    seed: int, *, family: str = "bursts", sites: int = 500, steps: int = 5000, spikes: int = 10
) -> Planted:
    """Return a run in which no clamping does harm."""
    generator = np.random.default_rng(seed)
    time = np.arange(steps)
    rates = np.clip(np.exp(generator.normal(np.log(0.01), 1.5, sites)), 2e-4, 0.5)
    busy, dense = _envelopes(generator, family, sites, steps)
    clamps = _clamps(generator, family, np.minimum(rates[:, None] * busy, 0.95))
    if family == "periodic":
        period = int(generator.choice([p for p in (50, 100, 200) if steps // p - 2 >= spikes]))
        phases = generator.integers(0, period, sites)
        clamps = (time - phases[:, None]) % period == 0
        which = np.sort(generator.choice(steps // period - 2, spikes, replace=False)) + 1
        onsets = which * period + int(generator.integers(0, period))
    else:
        onsets = _draw_onsets(generator, dense, spikes)
    errors = np.exp(generator.normal(-6, 1.5, (sites, steps))) * clamps
    loss = _decaying_loss(generator, steps, memory=0.8 if family == "noisy loss" else 0.3)
    found = []
    for onset in onsets.tolist():
        length = int(generator.integers(1, 8))
        height = 1 + generator.uniform(0.2, 1.5) * np.exp(-np.arange(length) / 3)
        loss[onset : onset + length] *= height
        found.append((onset, onset + length - 1))
    return Planted(errors=errors, loss=loss, onsets=onsets, spikes=found)


def plant_culprit(
    run: Planted, site: int, *, seed: int, hits: int | None = None, lags: tuple[int, int] = (0, 8)
) -> None:
    """Let `site` clamp hard before `hits` of the spikes (all without), and mildly by chance.

    Sites of role grad_output act one step later at the earliest.
    """
    generator = np.random.default_rng(seed)
    steps = run.errors.shape[1]
    background = generator.random(steps) < 0.01
    run.errors[site] = np.exp(generator.normal(-6, 1.5, steps)) * background
    chosen = generator.permutation(run.onsets)[:hits]
    first = max(lags[0], site % 3 // 2)
    lag = generator.integers(first, max(lags[1], first) + 1, len(chosen))
    run.errors[site, chosen - lag] = np.exp(generator.normal(-3, 1, len(chosen)))


def plant_effect(run: Planted, site: int) -> None:
    """Let `site` clamp because of the spikes: while one lasts, from when it can know of it."""
    run.errors[site] = 0
    for onset, end in run.spikes:
        begin = onset + (0 if site % 3 == 2 else 1)
        run.errors[site, begin : end + 2] = 0.05


def _envelopes(
    generator: np.random.Generator, family: str, sites: int, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how dense clamping is (1 or sites, by steps), and how dense spikes are."""
    time = np.arange(steps)
    if family == "early":
        both = np.where(time < steps // 10, 10.0, 0.05)
        return both[None], both
    if family == "warm-up":
        both = 10 * np.exp(-time / (0.03 * steps)) + 0.05
        return both[None], both
    if family == "drift":
        waves = [
            np.exp(1.5 * np.sin(3 * np.pi * time / steps + generator.uniform(0, 2 * np.pi)))
            for _ in range(2)
        ]
        return waves[0][None], waves[1]
    if family == "own trends":
        slopes = generator.choice([-1, 1], (sites, 1)) * generator.uniform(0, 2, (sites, 1))
        return np.exp(slopes * (2 * time / steps - 1)), np.exp(2 * (2 * time / steps - 1))
    return np.ones((1, steps)), np.ones(steps)


def _clamps(
    generator: np.random.Generator, family: str, rates: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return where each site clamps: at its rates, in bursts of its own length."""
    sites, steps = rates.shape
    if family == "independent":
        return generator.random((sites, steps)) < rates
    noise = generator.standard_normal((sites, steps + max(DWELLS)), dtype=np.float32)
    if family == "common":
        shared = generator.standard_normal(noise.shape[1], dtype=np.float32)
        noise = np.float32(np.sqrt(0.5)) * (noise + shared)
    total = np.cumsum(noise, axis=1, dtype=np.float64)
    dwells = generator.choice(DWELLS, sites)
    level = np.empty((sites, steps))
    for dwell in DWELLS:
        own = total[dwells == dwell]
        level[dwells == dwell] = (own[:, dwell : dwell + steps] - own[:, :steps]) / np.sqrt(dwell)
    level = 0.9 * level + np.sqrt(1 - 0.81) * generator.standard_normal((sites, steps))
    return level < np.interp(np.log(rates), np.log(SHARES), QUANTILES)


def _draw_onsets(
    generator: np.random.Generator, dense: NDArray[np.float64], spikes: int
) -> NDArray[np.int64]:
    dense = dense.copy()
    dense[:30] = dense[-10:] = 0
    onsets: list[int] = []
    while len(onsets) < spikes:
        drawn = int(generator.choice(len(dense), p=dense / dense.sum()))
        if all(abs(drawn - other) > 12 for other in onsets):
            onsets.append(drawn)
    return np.sort(np.array(onsets, dtype=np.int64))


def _decaying_loss(
    generator: np.random.Generator, steps: int, *, memory: float
) -> NDArray[np.float64]:
    noise = 0.02 * generator.standard_normal(steps)
    for step in range(1, steps):
        noise[step] += memory * noise[step - 1]
    return (2 + 4 * np.exp(-np.arange(steps) / (steps / 12))) * np.exp(noise)
