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
        game: Where the answers are that count; set before the first is published.
        games: All that were asked, with the steps of a replay.
        found: The explanation so far.
        effects: First-order effects by site, once there are any.
    """

    game: Game

    def __init__(
        self,
        found: Explanation,
        *,
        path: Path,
        on_progress: Callable[[Explanation], None],
    ) -> None:
        self.found = found
        self.effects: Mapping[SiteName, float] = {}
        self.extra_replays = 0
        self.games: dict[Game, int] = {}
        self._path, self._on_progress = path, on_progress

    @property
    def replays(self) -> int:
        """All replays so far."""
        return sum(game.spent for game in self.games) + self.extra_replays

    def publish(self, **changes: Any) -> None:
        """Take in what is new, write the answer so far, and tell."""
        game = self.game
        seconds = sum(each.seconds for each in self.games)
        steps = sum(each.spent * steps for each, steps in self.games.items())
        self.found = replace(
            self.found,
            **changes,
            replays=self.replays,
            replay_s=seconds,
            step_s=seconds / max(1, steps),
            counterfactuals=tuple(
                Counterfactual(
                    question=question,
                    losses=dict(trace.losses),
                    removed=game.share_gone(trace) if game.rise > 0 else None,
                    by_step=game.by_step(trace) if game.rise > 0 else {},
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

    def underflow(self, player: Player) -> float:
        """Return the largest share of a player's elements that underflowed in a step."""
        lost = self.game.answers[ACTUAL].underflow
        return max((lost.get(site, 0.0) for site in player.sites), default=0.0)

    def row(
        self,
        player: Player,
        ways: tuple[float, float] | None,
        shapley: tuple[float, float, float] | None,
        *,
        pairs: int = 0,
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
            pairs=0 if shapley is None else pairs,
            only=only,
            last=last,
            effect=self.effect(player),
            clamp_error=self.clamp_error(player),
            overshoot=max((counts[s].overshoot for s in player.sites if s in counts), default=0.0),
            underflow=self.underflow(player),
            sites=tuple(sorted(player.sites)) if player.is_group else (),
        )
