"""How strong a link must be for this run to show it, at a site that is typical of it.

The weights are those of `evidence`; what is concluded from them is for `association`.
"""

import numpy as np

from unclamp.analysis.evidence import MIN_HITS, Clamping, Weights, tail_weights
from unclamp.analysis.schedules import LEAST_PLACES, places
from unclamp.analysis.shifts import Moves


def smallest_effects(
    weights: Weights,
    spikes: int,
    clamping: Clamping,
    shifts: Moves,
    level: float,
    is_relative: bool,
) -> tuple[int | None, float | None]:
    """Return the smallest effects by which a typical site is named: spikes, and loss.

    The typical site clamps as often, in as many places, and has the spread, of the median of those
    that clamped. In fewer than nine places no rise of the loss names it, however large: a schedule
    would be doubted.
    """
    asked = clamping.counts() >= MIN_HITS
    rank = int(level * len(shifts.offsets)) - 1
    if not asked.any() or rank < 0:
        return None, None
    bar = float(np.sort(weights.highest()[1:])[::-1][min(rank, len(shifts.offsets) - 2)])
    needed = None
    if spikes >= MIN_HITS:
        chance = np.clip(np.median(weights.expected[asked]) / spikes, 1e-4, 1 - 1e-6)
        enough = np.flatnonzero(tail_weights(np.array([chance]), spikes)[0] > bar)
        needed = int(enough[0]) if len(enough) else None
    if np.median(places(clamping)[asked]) < LEAST_PLACES:
        return needed, None
    sd = weights.excess_sd[asked]
    sd = sd[sd > 0]
    # -log of a normal tail is near z^2 / 2 + log(z) + 0.92: two steps of iteration do.
    z = np.sqrt(2 * bar)
    for _ in range(3):
        z = np.sqrt(max(2 * (bar - np.log(max(z, 1.0)) - 0.92), 0.25))
    change = to_change(float(z * np.median(sd)), is_relative) if len(sd) else np.inf
    return needed, change if np.isfinite(change) else None


def to_change(excess: float, is_relative: bool) -> float:
    """Return a mean excess as a change of the loss; Inf beyond the range of floats."""
    with np.errstate(over="ignore"):
        return float(np.expm1(excess)) if is_relative else excess
