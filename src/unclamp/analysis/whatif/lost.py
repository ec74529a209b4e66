"""What a policy loses of the casts whose exponents are known."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unclamp.analysis.whatif.inspected import Inspected
from unclamp.analysis.whatif.losses import Estimate, Losses, losses
from unclamp.analysis.whatif.outcome import Lost, Range
from unclamp.analysis.whatif.spread import Spread
from unclamp.formats import Format
from unclamp.policy import Settings, overflows, scale_for
from unclamp.scaling import Scaling


def spreads_of(inspected: Inspected, formats: Sequence[Format]) -> dict[str, Spread]:
    """Return where the elements of inspected casts lie, by format of their sites."""
    names = np.array([fmt.name for fmt in formats])[inspected.place]
    whole = Spread.of(inspected.counts, inspected.lowest, inspected.amax, inspected.quarters)
    return {name: whole.rows(names == name) for name in dict.fromkeys(names.tolist())}


def lost_of(
    policy: Scaling,
    settings: Settings,
    scale: np.ndarray,
    inspected: Inspected,
    formats: Sequence[Format],
    spreads: dict[str, Spread],
) -> list[Lost | None]:
    """Return what a policy loses at each site; None where no cast of it was inspected.

    Args:
        policy: The scaling.
        settings: What it comes to at each site.
        scale: What each inspected cast is tried with, `[rows]`; 0: its own.
        inspected: The casts.
        formats: Of each site.
        spreads: Where their elements lie, by format.
    """
    sites: list[Lost | None] = [None] * len(formats)
    if not policy.casts:
        return sites
    for name, spread in spreads.items():
        fmt = next(each for each in formats if each.name == name)
        rows = np.flatnonzero([formats[p].name == name for p in inspected.place])
        place, amax = inspected.place[rows], inspected.amax[rows].astype(np.float32)
        used = _used(policy, settings, scale[rows], amax, place, fmt)
        found = losses(spread, used.astype(np.float64), fmt)
        elements = spread.total
        for site in np.unique(place).tolist():
            sites[site] = _summed(found, np.flatnonzero(place == site), elements)
    return sites


def _used(
    policy: Scaling,
    settings: Settings,
    scale: np.ndarray,
    amax: np.ndarray,
    place: np.ndarray,
    fmt: Format,
) -> np.ndarray:
    """Return the scale that is kept: the tensor's own where none is known, or a guard repeats."""
    powers = settings.power_of_two
    of_row = powers if isinstance(powers, bool) else powers[place]
    with np.errstate(all="ignore"):
        # A guard's own scale has no margin.
        largest = np.full(len(amax), fmt.max, np.float32)
        again = scale_for(amax, largest, power_of_two=of_row, previous=np.float32(1), xp=np)
        own = scale_for(
            amax, settings.largest[place], power_of_two=of_row, previous=np.float32(1), xp=np
        )
        repeats = policy.guards & overflows(amax, scale, fmt)
    return np.where(scale == 0, own, np.where(repeats, again, scale))


def _summed(found: Losses, rows: np.ndarray, elements: np.ndarray) -> Lost:
    clamped = found.clamped.value[rows] > 0
    hit = rows[clamped]
    return Lost(
        casts=len(rows),
        clamped_casts=len(hit),
        clamped=_range(found.clamped, rows, np.sum),
        clamp_error=_range(found.clamp_error, hit, np.mean),
        underflow=_range(found.underflow, rows, np.mean),
        elements=int(elements[rows].sum()),
    )


def _range(estimate: Estimate, rows: np.ndarray, over: Callable[[np.ndarray], Any]) -> Range:
    if not len(rows):
        return Range(value=0.0, low=0.0, high=0.0)
    return Range(
        value=float(over(estimate.value[rows])),
        low=float(over(estimate.low[rows])),
        high=float(over(estimate.high[rows])),
    )
