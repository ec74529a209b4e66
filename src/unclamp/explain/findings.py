"""The answer while it grows: written after every replay, so that it can always be read.

An answer that was written before is replaced only by one that asked more, or something else.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unclamp.analysis.counterfactual import ACTUAL, Counterfactual, SiteShare
from unclamp.analysis.explanation import Explanation, Status
from unclamp.errors import AnalysisError
from unclamp.explain.game import Game
from unclamp.explain.players import Player
from unclamp.explain.ranks import ALONE, Ranks
from unclamp.files import write_json
from unclamp.names import SiteName


class Findings:
    """An explanation in the making.

    Args:
        found: What is known from the start.
        path: The file for the answer; one to the same question that is there already counts.
        on_progress: Called with the answer so far.
        ranks: Of whom the first reads and writes the file.

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
        ranks: Ranks = ALONE,
    ) -> None:
        self.found = found
        self.effects: Mapping[SiteName, float] = {}
        self.extra_replays = 0
        self.games: dict[Game, int] = {}
        self._given = len(found.notes)
        self._path, self._on_progress = path, on_progress
        self._writes = ranks.is_first
        self._stored = ranks.first(lambda: _read(path, found.identity))

    def stored(self) -> Explanation | None:
        """Return the answer from before, if it is whole and had at least this budget."""
        stored = self._stored
        if stored is None or stored.status != "finished" or stored.budget <= self.found.budget:
            return None
        return self._shown(stored)

    @property
    def replays(self) -> int:
        """All replays so far."""
        return sum(game.spent for game in self.games) + self.extra_replays

    def publish(self, **changes: Any) -> None:
        """Take in what is new, write the answer so far, and tell."""
        game = self.game
        seconds = sum(each.seconds for each in self.games)
        steps = sum(each.spent * steps for each, steps in self.games.items())
        extra = self.extra_replays * next(iter(self.games.values()))
        self.found = replace(
            self.found,
            **changes,
            replays=self.replays,
            steps=steps + extra,
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
        if self._writes and self._replaces():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self.found.to_dict())
        self._on_progress(self.found)

    def end(self, status: Status) -> Explanation:
        """Return the answer, or the one from before if that asked more."""
        self.publish(status=status)
        if self._stored is None or self._replaces():
            return self.found
        is_interrupted = status == "interrupted"
        stored = replace(self._stored, status=status) if is_interrupted else self._stored
        return self._shown(stored)

    def _replaces(self) -> bool:
        """Whether the answer so far takes the place of the one from before.

        It does if it asked as much, or asked all there was to ask within a larger budget.
        """
        stored, found = self._stored, self.found
        if stored is None or found.replays >= stored.replays:
            return True
        return found.status == "finished" and found.budget > stored.budget

    def _shown(self, stored: Explanation) -> Explanation:
        """Return the answer from before, with what must be known now and what it cost."""
        found = self.found
        notes = dict.fromkeys((*found.notes[: self._given], *stored.notes))
        if stored.replays > found.budget:
            cost = f"{stored.replays} replays, more than the {found.budget} asked for now"
            notes[f"This is the answer from before, which cost {cost}."] = None
        return replace(stored, run=found.run, notes=tuple(notes))

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


def _read(path: Path, identity: str) -> Explanation | None:
    """Return a written answer to the same question; None where there is none."""
    try:
        stored = Explanation.from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, AnalysisError):
        return None
    return stored if identity and stored.identity == identity else None
