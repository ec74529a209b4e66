"""The published definitions of a spike, each computed as its source computes it.

A definition looks at a finite series and says, point by point, what it expected and from which
value on it speaks of a spike. Published ones have faults (a rolling mean lags behind a falling
loss; a warm-up judges nothing) and keep them here: they serve comparison with published numbers.
Non-finite values are taken out before a definition sees the series, in all of them: OLMo-core
would otherwise skip the 128 steps after a NaN. How points become spikes is for `spikes`; the
definition that unclamp recommends is in `robust`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

OLMO_WINDOW = 1000
OLMO_CORE_WINDOW = 128
ZCLIP_ALPHA = 0.97
ZCLIP_WARMUP = 25
ZCLIP_EPS = 1e-6
MEGATRON_SAMPLES = 100
ROUNDING = 1e-9
"""Deviations below this share of the level are rounding: a constant series has no spikes."""
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a definition says of each point of a series.

    Attributes:
        spike: Number of the spike that the point belongs to, -1 for none.
        level: The value expected; NaN where nothing could be judged yet.
        limit: The value above which the point is a spike; NaN likewise.
        spread: The standard deviation that the definition works with, in the unit of the series;
            NaN where it has none.
    """

    spike: np.ndarray
    level: np.ndarray
    limit: np.ndarray
    spread: np.ndarray


def judge_olmo(values: np.ndarray, threshold: float = 7.0) -> Judged:
    """Judge by the definition behind OLMo 2's spike score.

    A point is a spike if it is at least `threshold` standard deviations above the mean of the
    1,000 values before it. The score also counts points as far *below*: see `spike_score`.

    Numerics: the first 1,000 points are not judged.

    Source: OLMo Team, "2 OLMo 2 Furious" (arXiv 2501.00656), section 3.2, "Spike score". The
        paper does not say whether the window holds the point itself (here it does not), nor how
        it begins (here it has to be full). Standard deviations are of samples (n - 1).
    """
    mean, std = _window_moments(values, OLMO_WINDOW, least=OLMO_WINDOW)
    limit = mean + threshold * std
    spiky = (values >= limit) & (values - mean > ROUNDING * np.abs(mean))
    return Judged(spike=number_runs(spiky), level=mean, limit=limit, spread=std)


def judge_olmo_core(values: np.ndarray, threshold: float = 6.0) -> Judged:
    """Judge by the rule with which OLMo-core skips a step.

    A point is a spike if it is more than `threshold` standard deviations above the mean of the
    128 values before it, spikes among them included.

    Numerics: begins when half a window is there, the point included, that is at the 64th.

    Source: `SkipStepOptimizer.get_step_factor` in allenai/OLMo-core,
        src/olmo_core/optim/skip_step_optimizer.py, one-sided as in its present versions (early
        ones took the absolute value). OLMo-core skips if loss or gradient norm says so; here
        each series is judged by itself. `torch.std_mean` is of samples (n - 1).
    """
    mean, std = _window_moments(values, OLMO_CORE_WINDOW, least=OLMO_CORE_WINDOW // 2 - 1)
    limit = mean + threshold * std
    spiky = (values > limit) & (values - mean > ROUNDING * np.abs(mean))
    return Judged(spike=number_runs(spiky), level=mean, limit=limit, spread=std)


def judge_zclip(values: np.ndarray, threshold: float = 2.5) -> Judged:
    """Judge by the rule with which ZClip decides to clip a gradient norm.

    A point is a spike if its z-score against exponential averages (alpha 0.97) of mean and
    variance is above `threshold`. What then enters the averages is the clipped norm,
    `mean + threshold * std / (z / threshold)`. The variance is updated around the new mean.

    Numerics: the first 25 points make the first mean and variance (of n) and are not judged.

    Source: Kumar et al., "ZClip" (arXiv 2504.02507), and bluorion-com/ZClip, zclip/zclip.py, in
        its defaults: mode "zscore", "adaptive_scaling", clip_factor 1.
    """
    level, spread = np.full((2, len(values)), np.nan)
    spiky = np.zeros(len(values), dtype=bool)
    first = values[:ZCLIP_WARMUP].tolist()
    mean = sum(first) / max(len(first), 1)
    variance = sum((x - mean) ** 2 for x in first) / max(len(first), 1)
    for i, value in enumerate(values[ZCLIP_WARMUP:].tolist(), start=ZCLIP_WARMUP):
        std = variance**0.5
        level[i], spread[i] = mean, std
        z = (value - mean) / (std + ZCLIP_EPS)
        spiky[i] = z > threshold
        kept = mean + threshold * std / (z / threshold) if z > threshold else value
        mean = ZCLIP_ALPHA * mean + (1 - ZCLIP_ALPHA) * kept
        variance = ZCLIP_ALPHA * variance + (1 - ZCLIP_ALPHA) * (kept - mean) ** 2
    limit = level + threshold * (spread + ZCLIP_EPS)
    return Judged(spike=number_runs(spiky), level=level, limit=limit, spread=spread)


def judge_megatron(values: np.ndarray, threshold: float = 10.0) -> Judged:
    """Judge by Megatron's check for a spiky loss.

    A point is a spike if its absolute value is at least `threshold` times the largest absolute
    value of the first 100 points. The largest is never updated afterwards.

    Numerics: the first 100 points are not judged.

    Source: `RerunStateMachine.is_unexpectedly_large` in NVIDIA/Megatron-LM,
        megatron/core/rerun_state_machine.py, with the factor of `SPIKY_LOSS_FACTOR`. Megatron
        asks it of every microbatch's loss on every rank; here it is asked of the step's.
    """
    level, limit = np.full((2, len(values)), np.nan)
    if len(values) > MEGATRON_SAMPLES:
        level[MEGATRON_SAMPLES:] = np.abs(values[:MEGATRON_SAMPLES]).max()
        limit = level * threshold
    spiky = (values >= limit) & (values > 0)
    return Judged(
        spike=number_runs(spiky), level=level, limit=limit, spread=np.full(len(values), np.nan)
    )


def spike_score(
    values: Sequence[float | None] | np.ndarray,
    *,
    window: int = OLMO_WINDOW,
    threshold: float = 7.0,
) -> float:
    """Return OLMo 2's spike score of a series, a fraction (the paper prints percent).

    The share of all values that are at least `threshold` standard deviations away, above or
    below, from the mean of the `window` values before them.

    Numerics: non-finite values are left out. NaN for a series of at most `window` values, of
    which none can be judged.

    Source: as `judge_olmo`.
    """
    numbers = np.asarray([v for v in values if v is not None], dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if len(numbers) <= window:
        return float("nan")
    mean, std = _window_moments(numbers, window, least=window)
    away = np.abs(numbers - mean)
    return float(np.mean((away >= threshold * std) & (away > ROUNDING * np.abs(mean))))


def number_runs(spiky: np.ndarray) -> np.ndarray:
    """Return for each point the number of the run of True values it is in, -1 for False."""
    begins = spiky & ~np.concatenate([[False], spiky[:-1]]) if len(spiky) else spiky
    return np.where(spiky, np.cumsum(begins) - 1, -1)


def _window_moments(
    values: np.ndarray, window: int, *, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (n - 1) of up to `window` values before each point.

    NaN where fewer than `least` values are there. Each window is summed by itself: running sums
    would carry the rounding of one huge spike through the whole series.
    """
    mean, std = np.full((2, len(values)), np.nan)
    for i in range(least, min(window, len(values))):
        mean[i], std[i] = values[:i].mean(), values[:i].std(ddof=1)
    if len(values) > window:
        windows = sliding_window_view(values[:-1], window)
        for begin in range(0, len(windows), _BLOCK):
            block = windows[begin : begin + _BLOCK]
            at = slice(window + begin, window + begin + len(block))
            mean[at], std[at] = block.mean(axis=1), block.std(axis=1, ddof=1)
    return mean, std
