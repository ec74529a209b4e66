"""The answer while it grows: written after every replay, so that it can always be read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unclamp.analysis.counterfactual import ACTUAL, Counterfactual, SiteShare
from unclamp.analysis.explanation import Explanation
from unclamp.explain.game import Game
from unclamp.explain.players import Player
from unclamp.files import write_json
from unclamp.names import SiteName


class Findings:
    """An explanation in the making.

    Attributes:
        game: Where the answers are; set before the first is published.
        found: The explanation so far.
        effects: First-order effects by site, once there are any.
    """

    game: Game

    def __init__(
        self,
        found: Explanation,
        *,
        path: Path,
        steps: int,
        on_progress: Callable[[Explanation], None],
    ) -> None:
        self.found = found
        self.effects: Mapping[SiteName, float] = {}
        self.extra_replays = 0
        self._path, self._steps, self._on_progress = path, steps, on_progress

    def publish(self, **changes: Any) -> None:
        """Take in what is new, write the answer so far, and tell."""
        game = self.game
        self.found = replace(
            self.found,
            **changes,
            replays=game.spent + self.extra_replays,
            replay_s=game.seconds,
            step_s=game.seconds / max(1, game.spent * self._steps),
            counterfactuals=tuple(
                Counterfactual(
                    question=question,
                    losses=dict(trace.losses),
                    removed=game.share_gone(trace) if game.rise > 0 else None,
                )
                for question, trace in game.answers.items()
            ),
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self.found.to_dict())
        self._on_progress(self.found)

    def note(self, note: str) -> None:
        """Add what else a reader must know; published with the next answer."""
        self.found = replace(self.found, notes=(*self.found.notes, note))

    def effect(self, player: Player) -> float | None:
        """Return the first-order effect of a player's clamps; None where it has none."""
        known = [self.effects[site] for site in player.sites if site in self.effects]
        return sum(known) if known else None

    def clamp_error(self, player: Player) -> float:
        """Return the clamp error of a player's sites in the plain replay."""
        counts = self.game.answers[ACTUAL].sites
        return sum(counts[site].clamp_error for site in player.sites if site in counts)

    def row(
        self,
        player: Player,
        ways: tuple[float, float] | None,
        shapley: tuple[float, float, float] | None,
    ) -> SiteShare | None:
        """Return what is known of a player; None if nothing is."""
        if shapley is not None:
            share, low, high = shapley
        elif ways is not None:
            share, low, high = sum(ways) / 2, min(ways), max(ways)
        else:
            return None
        counts, noise = self.game.answers[ACTUAL].sites, self.found.noise or 0.0
        only, last = (None, None) if ways is None else ways
        return SiteShare(
            fqn=player.fqn,
            role=player.role,
            share=share,
            low=low - noise,
            high=high + noise,
            how="both ways" if shapley is None else "shapley",
            only=only,
            last=last,
            effect=self.effect(player),
            clamp_error=self.clamp_error(player),
            overshoot=max((counts[s].overshoot for s in player.sites if s in counts), default=0.0),
            sites=tuple(sorted(player.sites)) if player.is_group else (),
        )
