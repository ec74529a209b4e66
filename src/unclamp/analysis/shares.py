"""How shares of a spike are written: one way for the paragraph, the terminal and the page."""

import math
from collections.abc import Iterable, Mapping

from unclamp.analysis.counterfactual import SiteShare

LEAST_SHARE = 0.0005
"""Smaller shares of a spike are noise of the arithmetic, and are written as 0."""
ENOUGH_PAIRS = 20
"""Sampled shares of fewer pairs of orders have a range, and no interval."""
TOLD = 0.1
"""A step is told if at least such a share of its rise goes, or comes on top of it."""


def gone(share: float) -> str:
    """Return a share that is gone as a clause."""
    if share < -0.005:
        return f"it is {percent(-share)} higher"
    return f"{percent(max(share, 0.0))} of it is gone"


def steps_between(first: int, last: int) -> str:
    """Return a range of steps in words."""
    return f"step {first}" if first == last else f"steps {first} to {last}"


def listed_steps(steps: Iterable[int]) -> str:
    """Return steps in words, those that follow on one another as a range."""
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in runs]
    many = len(texts) > 1 or runs[0][0] != runs[0][1]
    return f"{'steps' if many else 'step'} {', '.join(texts)}"


def by_step(
    shares: Mapping[int, float], losses: Mapping[int, float], plain: Mapping[int, float]
) -> str:
    """Return what goes at which steps where signs differ; empty where they do not.

    Args:
        shares: Share of the rise that is gone by step, of steps above the level.
        losses: All losses of the replay.
        plain: Those of the replay without a change.
    """
    better = {n: share for n, share in shares.items() if share >= TOLD}
    rises = {n: (plain[n] - losses[n]) / share for n, share in better.items() if n in plain}
    if not better or not all(map(math.isfinite, rises.values())):
        return ""
    usual = sorted(rises.values())[len(rises) // 2]
    worse = [n for n in losses if n in plain and plain[n] + TOLD * usual < losses[n]]
    if not worse:
        return ""
    part = sum(share * rises[n] for n, share in better.items()) / sum(rises.values())
    high = max(worse, key=lambda n: losses[n] - plain[n])
    which = "" if len(worse) == 1 else ", the worst"
    return (
        f"By step: at {listed_steps(better)} {percent(part)} of it is gone, and at "
        f"{listed_steps(worse)} the loss is higher: {losses[high]:.4g} in place of "
        f"{plain[high]:.4g}{which}."
    )


def range_of(site: SiteShare) -> str:
    """Return in words how far a site's share is known; empty where nothing is in doubt."""
    if site.how == "both ways" and site.only is not None and site.last is not None:
        return f" ({percent(site.only)} alone, {percent(site.last)} beside all others)"
    if not math.isfinite(site.low) or site.high - site.low < 0.005:
        return ""
    if site.pairs >= ENOUGH_PAIRS:
        return f" (95 % interval of {site.pairs} pairs of orders {interval(site)})"
    if site.pairs:
        return f" (range over {site.pairs} pairs of orders {interval(site)})"
    return f" (give or take chaos {interval(site)})"


def interval(site: SiteShare) -> str:
    """Return the ends of a site's range, "-" where there is none."""
    if not (math.isfinite(site.low) and math.isfinite(site.high)):
        return "-"
    return f"{spike_share(site.low)} to {spike_share(site.high)}"


def spike_share(share: float | None) -> str:
    """Return a share of a spike as percent, "-" for None; what is noise is 0."""
    if share is None:
        return "-"
    return percent(0.0 if abs(share) < LEAST_SHARE else share)


def percent(share: float) -> str:
    """Return a fraction as percent: whole from 1 % on, below with two figures.

    Chaos moves a share by more than the third figure that `written.percent` gives.
    """
    value = 100 * share
    if not math.isfinite(value):
        return "?"
    shown = f"{value:.0f}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{'0' if shown == '-0' else shown} %"
