"""What mends a spike: the smallest set of sites that removes it, replayed as it is recommended."""

import math
from dataclasses import dataclass, replace

from unclamp.analysis.counterfactual import Change, ScalingName
from unclamp.explain.attribution import ENOUGH
from unclamp.explain.findings import Findings
from unclamp.explain.game import BudgetSpent, Game
from unclamp.explain.mend import make_override
from unclamp.explain.noise import Noise
from unclamp.explain.players import Player, joined
from unclamp.explain.smallest import smallest_set
from unclamp.names import SiteName
from unclamp.recipe import Recipe

REMEDIES: dict[Change, tuple[ScalingName, ...]] = {
    "unclamped": ("dynamic", "guarded"),
    "blocks": ("short history", "guarded", "dynamic", "blocks"),
}
"""What is recommended, the first that suffices, by how sites were mended to find them."""


def recommend(
    game: Game,
    findings: Findings,
    kind: Change,
    causes: list[Player],
    *,
    whole: float,
    noise: Noise,
    recipe: Recipe | None,
) -> None:
    """Find the smallest set that removes enough, replay it, and publish it as an override.

    Args:
        game: Answers questions.
        findings: Has the shares; gets the override.
        kind: How sites were mended when their shares were found.
        causes: Who may be in the set.
        whole: Share that is gone with all mended.
        noise: What placebos move.
        recipe: The run's, whose rules the override keeps.

    Raises:
        BudgetSpent: Before there was a set.
    """
    target = ENOUGH * (1.0 if whole >= ENOUGH else whole)
    shares = {frozenset(row.members): row.share for row in findings.found.sites}
    chosen = smallest_set(
        sorted(causes, key=lambda p: (-shares.get(p.sites, -math.inf), p.name)),
        target,
        gain=lambda players: game.removed(kind, joined(players)),
        known=lambda players: game.known(kind, joined(players)),
        slack=noise.slack,
    )
    named = {player.sites for player in chosen}
    findings.publish(
        sites=tuple(
            replace(row, named=frozenset(row.members) in named) for row in findings.found.sites
        )
    )
    remedy = _verified(game, findings, REMEDIES[kind], joined(chosen), target)
    if remedy.is_none:
        named_sites = ", ".join(map(str, sorted(joined(chosen))))
        findings.note(
            f"No change of scaling is recommended: each that was tried at {named_sites} removes "
            "nothing, or adds as much at other steps."
        )
        findings.publish(override=None)
        return
    if remedy.removed is not None and remedy.removed < target:
        findings.note(f"That is less than the {100 * target:.0f} % aimed at.")
    if whole < ENOUGH:
        is_narrow = kind == "blocks"
        goes = "in blocks" if is_narrow else "with the clamps"
        of = "of the rise of these steps" if is_narrow else "of the spike"
        findings.note(
            f"As {100 * whole:.0f} % {of} goes {goes}, the set is the smallest that "
            f"removes {100 * ENOUGH:.0f} % of that."
        )
    override = make_override(
        joined(chosen),
        remedy.scaling,
        recipe=recipe,
        removed=remedy.removed,
        added=remedy.added,
        instead=_instead(game, kind, causes, chosen, target - noise.slack),
    )
    findings.publish(override=override)


def _instead(
    game: Game, kind: Change, causes: list[Player], chosen: list[Player], target: float
) -> list[SiteName]:
    """Return the other sites that alone remove as much, where one site does."""
    if len(chosen) != 1:
        return []
    others = [player.sites for player in causes if player not in chosen and len(player.sites) == 1]
    gone = {sites: game.known(kind, sites) for sites in others}
    return [site for sites, share in gone.items() for site in sites if share and share >= target]


def _verified(
    game: Game,
    findings: Findings,
    scalings: tuple[ScalingName, ...],
    sites: frozenset[SiteName],
    target: float,
) -> "_Remedy":
    """Return what to recommend: the first scaling that suffices, or else the best that was tried.

    What it does to other steps counts against it: an outlier that no longer clamps may ruin its
    own step.
    """
    tried: list[_Remedy] = []
    for scaling in scalings:
        try:
            trace = game.ask(scaling, sites)
        except BudgetSpent:
            break
        remedy = _Remedy(
            scaling=scaling, removed=game.share_gone(trace), added=game.share_added(trace)
        )
        if remedy.left_over >= target:
            return remedy
        tried.append(remedy)
    if not tried:
        findings.note("The recommended change was not replayed: the budget is spent.")
        return _Remedy(scaling=scalings[0])
    return max(tried, key=lambda remedy: remedy.left_over)


@dataclass(frozen=True, kw_only=True)
class _Remedy:
    """A scaling, and what it removes of the spike and adds elsewhere; None if not replayed."""

    scaling: ScalingName
    removed: float | None = None
    added: float = 0.0

    @property
    def left_over(self) -> float:
        return (self.removed or 0.0) - self.added

    @property
    def is_none(self) -> bool:
        return self.removed is not None and self.left_over <= 0
