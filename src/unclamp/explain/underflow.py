"""Is it underflow? Steps of a spike that a scale for every 32 elements mends, and un-clamping not.

After an outlier a history keeps its amax, and for as many updates as it is long everything else of
the tensor underflows. That harms other steps than the outlier's own, at which a remedy may even
cost something: so steps are judged one by one. Blocks end clamping too; a step that un-clamping
mends is no case of underflow. Where un-clamping mends some steps and blocks the others, or each a
part of all, it is both.
"""

from collections.abc import Iterable

from unclamp.analysis.counterfactual import ACTUAL, Underflow
from unclamp.analysis.explanation import MOST, NOT_CLAMPING
from unclamp.explain.game import Game
from unclamp.explain.noise import Noise
from unclamp.explain.replay import Trace
from unclamp.names import SiteName

LEAST_UNDERFLOW = 0.01
"""A site whose elements underflow less than this in each step is not looked at."""


def find_underflow(
    game: Game, *, blocks: Trace, free: Trace, placebos: Iterable[Trace]
) -> Underflow | None:
    """Return what blocks mend beyond un-clamping; None where that is little, or no more than chaos.

    It is something where most of the rise goes at half of the elevated steps that un-clamping does
    not mend or more, and at more steps than with any placebo.

    Args:
        game: Has the plain replay.
        blocks: The replay with a scale for every 32 elements everywhere.
        free: The replay with nothing clamped.
        placebos: Those that were made.
    """
    plain = game.answers[ACTUAL]
    if not _underflowing(plain, blocks):
        return None
    elevated = game.by_step(plain)
    freed = _mended(game, free)
    mended = _mended(game, blocks) - freed
    by_chance = max((len(_mended(game, trace)) for trace in placebos), default=0)
    if len(mended) <= by_chance or 2 * len(mended) < len(elevated.keys() - freed):
        return None
    window, shares, freely = game.window, game.by_step(blocks), game.by_step(free)
    rises = {n: window.capped(plain.losses[n]) - window.level for n in elevated}
    # Also at steps that un-clamping mends, what it leaves of them.
    beyond = sum((shares[n] - max(0.0, freely[n])) * rises[n] for n in mended | freed)
    return Underflow(
        by_step={n: shares[n] for n in sorted(mended)},
        elevated=len(elevated),
        removed=sum(shares[n] * rises[n] for n in mended) / sum(rises[n] for n in mended),
        share=beyond / sum(rises.values()),
    )


def is_too(found: Underflow, *, freed: float, gone: float, noise: Noise) -> bool:
    """Whether underflow is a cause beside clamping, which alone is a part of it.

    Args:
        found: What blocks mend beyond un-clamping.
        freed: Share of the spike that goes with nothing clamped.
        gone: Share that goes in blocks, which end both.
        noise: What placebos move.
    """
    least = max(NOT_CLAMPING, noise.limit)
    return found.share is not None and min(found.share, gone - freed, freed) >= least


def underflowing_sites(game: Game, blocks: Trace) -> list[SiteName]:
    """Return the sites that underflow in the run, and less in blocks, in the model's order."""
    lost = _underflowing(game.answers[ACTUAL], blocks)
    return [site for site in game.replay.sites if site in lost]


def _underflowing(plain: Trace, blocks: Trace) -> set[SiteName]:
    return {
        site
        for site, lost in plain.underflow.items()
        if lost >= LEAST_UNDERFLOW and lost > blocks.underflow.get(site, 0.0)
    }


def _mended(game: Game, trace: Trace) -> set[int]:
    return {n for n, share in game.by_step(trace).items() if share >= MOST}
