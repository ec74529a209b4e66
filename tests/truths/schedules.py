"""Synthetic runs whose loss and clamping follow one schedule and have no other link.

Each family is a schedule of a training: of the learning rate, of the data or of the length of
sequences. The loss, the density of spikes and the clamping of some sites each answer to it in a
way of their own; given the schedule they are independent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truths.arrays import Planted, plant
from unclamp.analysis.spikes import find_spikes

Rng = np.random.Generator
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a training is subjected to, a value a step.

    Attributes:
        lr: Learning rate.
        loss: Its effect on the logarithm of the loss; of size one.
        clamping: Its effect on the logarithm of how often sites clamp; of size one.
    """

    lr: Floats
    loss: Floats
    clamping: Floats


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A run without a culprit, and the learning rate that its log would have."""

    run: Planted
    lr: Floats


def plant_scheduled(seed: int, *, family: str, sites: int = 24, steps: int = 5000) -> Scheduled:
    """Return a run in which clamping, loss and spikes follow one schedule, and nothing else.

    Half of the sites or all follow it and clamp 11 to 150 times as often at its height. The loss
    changes by 1 to 20 %. Spikes are those that are found in the loss; in half of the runs ten more
    are planted, more of them where the schedule raises the loss.
    """
    rng = np.random.default_rng([seed, *family.encode()])
    schedule = FAMILIES[family](rng, steps)
    base = plant(seed, sites=sites, steps=steps, spikes=1)
    size = np.exp(rng.uniform(np.log(0.01), np.log(0.2)))
    loss = _without_spikes(base) * np.exp(size * schedule.loss)
    for onset in _onsets(
        rng, int(rng.choice([0, 10])), np.exp(rng.uniform(0, 1.5) * schedule.loss)
    ):
        length = int(rng.integers(1, 8))
        loss[onset : onset + length] *= 1 + rng.uniform(0.2, 1.5) * np.exp(-np.arange(length) / 3)
    found = find_spikes(loss.tolist())
    return Scheduled(
        run=Planted(
            errors=_scheduled_errors(rng, base.errors, schedule.clamping),
            loss=loss,
            onsets=np.array([spike.onset for spike in found], dtype=np.int64),
            spikes=[(spike.onset, spike.end) for spike in found],
        ),
        lr=schedule.lr,
    )


def _without_spikes(run: Planted) -> Floats:
    loss = run.loss.copy()
    for onset, end in run.spikes:
        loss[onset : end + 1] = loss[onset - 1]
    return loss


def _onsets(rng: Rng, count: int, dense: Floats) -> list[int]:
    chance = dense[30:-10] / dense[30:-10].sum()
    onsets: list[int] = []
    while len(onsets) < count:
        drawn = int(rng.choice(np.arange(30, len(dense) - 10), p=chance))
        if all(abs(drawn - other) > 12 for other in onsets):
            onsets.append(drawn)
    return onsets


def _scheduled_errors(rng: Rng, errors: Floats, effect: Floats) -> Floats:
    """Return the clamping of bursts, and at the sites that follow the schedule that of its own."""
    follows = rng.random(len(errors)) < rng.choice([0.5, 1.0])
    count, steps = int(follows.sum()), errors.shape[1]
    rates = np.clip(np.exp(rng.normal(np.log(0.005), 0.3, (count, 1))), 5e-4, 0.3)
    strength = rng.uniform(0.8, 1, (count, 1)) * rng.uniform(3, 5)
    delays = rng.integers(0, 4, count)
    own = np.stack([np.roll(effect, delay) for delay in delays]) if count else np.empty((0, steps))
    clamps = rng.random((count, steps)) < np.minimum(rates * np.exp(strength * own), 0.95)
    sizes = np.exp(rng.normal(-6, 1.5, (count, steps)) + rng.uniform(0, 1) * own)
    errors = errors.copy()
    errors[follows] = sizes * clamps
    return errors


def _relaxed(drive: Floats, pace: float) -> Floats:
    """Return what follows `drive` with a delay of about `pace` steps."""
    level = np.empty_like(drive)
    level[0] = drive[0]
    for i in range(1, len(drive)):
        level[i] = level[i - 1] + (drive[i] - level[i - 1]) / pace
    return level


def _scaled(values: Floats) -> Floats:
    values = values - np.median(values)
    return values / np.max(np.abs(values))


def _ages(starts: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Return the steps since the last of `starts`, of which the first is 0."""
    time = np.arange(steps)
    return time - starts[np.searchsorted(starts, time, side="right") - 1]


def _width(rng: Rng) -> float:
    """Return for how long a change is felt: a step to fifty."""
    return float(np.exp(rng.uniform(0, np.log(50))))


def _answers(rng: Rng, trend: Floats, ages: NDArray[np.int64], later: NDArray) -> tuple:
    """Return how loss and clamping answer: to the trend, and to each change for a while.

    Args:
        trend: What the schedule does for long; of any size.
        ages: Steps since the last change.
        later: How many changes there were.
    """
    answers = []
    for slowness in (rng.uniform(1, 40), 1.0):
        pulse = np.where(later > 0, np.exp(-ages / _width(rng)), 0.0)
        mix = rng.choice([0.0, 0.5, 1.0])
        answers.append(_scaled(_relaxed(mix * _scaled(trend), slowness) + (1 - mix) * pulse))
    return tuple(answers)


def _restarts(rng: Rng, steps: int, lengths: list[int]) -> Schedule:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ages = _ages(starts, steps)
    later = np.searchsorted(starts, np.arange(steps), side="right") - 1
    lr = 0.5 * (1 + np.cos(np.pi * ages / np.array([*lengths, steps])[later]))
    loss, clamping = _answers(rng, lr, ages, later)
    return Schedule(lr=1e-3 * lr + 1e-6, loss=loss, clamping=clamping)


def cosine_restarts(rng: Rng, steps: int) -> Schedule:
    period = int(rng.integers(200, 1001))
    return _restarts(rng, steps, [period] * (steps // period))


def growing_restarts(rng: Rng, steps: int) -> Schedule:
    """Cosine restarts, each period twice as long as the one before."""
    first = int(rng.integers(50, 301))
    return _restarts(rng, steps, [first * 2**k for k in range(10) if first * (2**k - 1) < steps])


def _warm_decay(steps: int) -> Floats:
    return (
        1e-3 * np.minimum(1, np.arange(1, steps + 1) / 100) * (1 - 0.9 * np.arange(steps) / steps)
    )


def epoch_sawtooth(rng: Rng, steps: int) -> Schedule:
    """The loss jumps where an epoch begins, and data come in one order in each epoch."""
    period = rng.uniform(100, 1000)
    starts = np.round(np.arange(0, steps, period)).astype(np.int64)
    ages = _ages(starts, steps)
    later = np.searchsorted(starts, np.arange(steps), side="right") - 1
    saw = rng.choice([-1, 1]) * (ages / period) ** rng.uniform(0.3, 2)
    loss, clamping = _answers(rng, saw, ages, later)
    return Schedule(lr=_warm_decay(steps), loss=loss, clamping=clamping)


def sharp_epochs(rng: Rng, steps: int) -> Schedule:
    """The loss jumps up where an epoch begins and falls over it; sites clamp just after."""
    period = int(rng.integers(100, 601))
    phase = np.arange(steps) % period
    clamping = np.where(phase < rng.integers(4, 50), 1.0, 0.0)
    return Schedule(lr=_warm_decay(steps), loss=_scaled(1 - phase / period), clamping=clamping)


def _changes(rng: Rng, steps: int) -> NDArray[np.int64]:
    return np.sort(rng.choice(np.arange(300, steps - 300), int(rng.integers(2, 6)), replace=False))


def learning_rate_steps(rng: Rng, steps: int) -> Schedule:
    at = _changes(rng, steps)
    later = np.searchsorted(at, np.arange(steps), side="right")
    trend = -later.astype(np.float64)
    ages = _ages(np.concatenate([[0], at]), steps)
    loss = _scaled(_relaxed(trend, rng.uniform(1, 30)))
    _, clamping = _answers(rng, trend, ages, later)
    return Schedule(
        lr=1e-3 * np.exp(np.log(0.3) * later.astype(np.float64)), loss=loss, clamping=clamping
    )


def sequence_lengths(rng: Rng, steps: int) -> Schedule:
    """Sequences get longer at a few steps; the loss jumps up there, or falls, and settles."""
    at = _changes(rng, steps)
    later = np.searchsorted(at, np.arange(steps), side="right")
    ages = _ages(np.concatenate([[0], at]), steps)
    loss, clamping = _answers(rng, -later.astype(np.float64), ages, later)
    return Schedule(lr=_warm_decay(steps), loss=loss, clamping=clamping)


FAMILIES: dict[str, Callable[[Rng, int], Schedule]] = {
    "cosine restarts": cosine_restarts,
    "cosine restarts, growing": growing_restarts,
    "epoch sawtooth": epoch_sawtooth,
    "epoch sawtooth, clamping just after": sharp_epochs,
    "learning-rate steps": learning_rate_steps,
    "sequence lengths": sequence_lengths,
}
