"""Who caused how much: leading sites, each exactly both ways, then Shapley values.

*Mended* is un-clamped where clamping is the cause, and in blocks where underflow is.

A site that matters in neither direction, and does not matter together with the others like it
either, is idle and out of the game; those that do not lead are the *rest*, one player. So the
exact part grows with the number of causes up to the budget, and not with the number of sites.
"""

from collections.abc import Callable, Mapping

import numpy as np

from unclamp.analysis.counterfactual import Change
from unclamp.explain.findings import Findings
from unclamp.explain.game import BudgetSpent, Game
from unclamp.explain.limits import Limits
from unclamp.explain.noise import LEAST_SHARE, placebo_noise
from unclamp.explain.players import Player, joined
from unclamp.explain.screening import screened
from unclamp.explain.shapley import Shares, exact_shares, sampled_pair, shares_of_pairs

ENOUGH = 0.9
"""Share of what all sites do, that the leading ones have to do."""
MORE_ROUNDS = 3
RESERVE = 8
"""Replays kept back for the smallest set."""

Ends = tuple[float, float, float]
"""A Shapley value, and the ends of its interval."""
Ways = tuple[float, float]
"""The share that is gone with only this player mended, and left with all others mended."""


class Attribution:
    """Shares a spike out among players.

    Args:
        game: Answers questions.
        findings: Gets the shares as they come.
        limits: How much to ask.
        kind: How sites are mended.
        whole: Share that is gone with all of them mended: what there is to share out.
    """

    def __init__(
        self,
        game: Game,
        findings: Findings,
        limits: Limits,
        *,
        kind: Change,
        whole: float,
    ) -> None:
        self._game, self._findings, self._limits = game, findings, limits
        self._kind: Change = kind
        self._whole = whole
        self._ways: dict[Player, Ways] = {}

    def share_out(self, players: list[Player]) -> list[Player]:
        """Find the players' shares, and return those that may be causes.

        Raises:
            BudgetSpent: Before each leading player was replayed by itself.
        """
        leading, rest = self._lead(players)
        active, rest, idle = self._both_ways(leading, rest)
        try:
            self._shapley(active, rest, idle)
        except BudgetSpent:
            self._findings.note(
                "The budget did not suffice for Shapley values: shares are the mean of both ways."
            )
        return active

    def _removed(self, players: list[Player]) -> float:
        return self._game.removed(self._kind, joined(players)) if players else 0.0

    # ---- who leads -------------------------------------------------------------------------

    def _lead(self, players: list[Player]) -> tuple[list[Player], list[Player]]:
        """Return the leading players, who together do nearly what all do, and the rest."""
        if len(players) == 1:
            return players, []
        ranked, count = self._ranked(players), self._limits.leading
        for _ in range(MORE_ROUNDS):
            if count >= len(ranked) or self._removed(ranked[:count]) >= ENOUGH * self._whole:
                break
            count += self._limits.leading
        return ranked[:count], ranked[count:]

    def _ranked(self, players: list[Player]) -> list[Player]:
        """Return players by first-order effect, and every third by clamp error instead.

        Where they may underflow, by how much of them does, and every third by clamp error; this
        costs no replay.

        Raises:
            BudgetSpent: No replay is left.
        """
        findings, replay = self._findings, self._game.replay
        if self._kind == "unclamped":
            game = self._game
            findings.effects = game.screen(lambda: screened(replay, last=game.window.last)).effects
            findings.publish()
            by_effect = sorted(players, key=lambda p: (-abs(findings.effect(p) or 0.0), p.name))
        else:
            by_effect = sorted(players, key=lambda p: (-findings.underflow(p), p.name))
        by_error = sorted(players, key=lambda p: (-findings.clamp_error(p), p.name))
        turns: dict[Player, int] = {}
        for n, player in enumerate(by_effect):
            turns[player] = n + n // 2
        for n, player in enumerate(by_error):
            turns[player] = min(turns[player], 3 * n + 2)
        return sorted(players, key=lambda p: (turns[p], p.name))

    # ---- both ways -------------------------------------------------------------------------

    def _both_ways(
        self, leading: list[Player], rest: list[Player]
    ) -> tuple[list[Player], list[Player], list[Player]]:
        """Replay each leading player by itself; return those that matter, the rest, and the idle.

        The idle are out of the game: they do nothing by themselves, nor together without the
        others, nor together beside the others. All of this is one family of questions: among
        players without effect one passes in 5 % of cases, however many there are.
        """
        everyone, least = [*leading, *rest], self._least_of(len(leading) + 1)
        for player in leading:
            only = self._removed([player])
            last = self._whole - self._removed([p for p in everyone if p is not player])
            self._ways[player] = (only, last)
            self._tell(leading)
        active = [p for p in leading if max(map(abs, self._ways[p])) > least]
        idle = [p for p in everyone if p not in active]
        if not active:
            return leading, rest, []
        is_all = abs(self._removed(active) - self._whole) <= least
        is_idle = abs(self._removed(idle)) <= least
        return (active, [], idle) if is_all and is_idle else (leading, rest, [])

    def _least_of(self, players: int) -> float:
        """Return the smallest share that counts for so many players, by as many placebos as need.

        Raises:
            BudgetSpent: No placebo was made before, and none can be.
        """
        noise = placebo_noise(self._game, sites=players)
        self._findings.publish(noise=noise.largest, placebos=len(noise.moved))
        return noise.least_of(players)

    def _tell(
        self,
        players: list[Player],
        shapley: Mapping[Player, Ends] | None = None,
        *,
        pairs: int = 0,
    ) -> None:
        known = shapley or {}
        rows = [
            self._findings.row(p, self._ways.get(p), known.get(p), pairs=pairs) for p in players
        ]
        ordered = sorted((r for r in rows if r), key=lambda r: (-r.share, r.fqn, r.role))
        self._findings.publish(sites=tuple(ordered))

    # ---- Shapley values --------------------------------------------------------------------

    def _shapley(self, active: list[Player], rest: list[Player], idle: list[Player]) -> None:
        """Find the values of the active players, with the rest as one more.

        Raises:
            BudgetSpent: Before there was any estimate.
        """
        groups = [[player] for player in active] + ([rest] if rest else [])

        def value(members: frozenset[int]) -> float:
            return self._removed([player for i in sorted(members) for player in groups[i]])

        def tell(shares: Shares) -> None:
            ends = list(zip(shares.values, shares.low, shares.high, strict=True))
            left = shares.values[-1] if rest else self._whole - sum(shares.values)
            self._findings.publish(rest_share=left)
            self._tell(
                [*active, *idle], {p: ends[i] for i, p in enumerate(active)}, pairs=shares.pairs
            )

        game, budget = self._game, self._game.budget
        game.budget = max(game.spent, budget - RESERVE)
        try:
            if 2 ** len(groups) <= game.budget - game.spent or len(groups) <= 2:
                tell(exact_shares(len(groups), value))
            else:
                self._sample(len(groups), value, tell)
        finally:
            game.budget = budget

    def _sample(
        self,
        count: int,
        value: Callable[[frozenset[int]], float],
        tell: Callable[[Shares], None],
    ) -> None:
        """Draw pairs of orders until the budget is spent, or nothing moves any more."""
        pairs: list[np.ndarray] = []
        while True:
            before = self._game.spent
            try:
                gains = sampled_pair(
                    count,
                    value,
                    seed=self._limits.seed,
                    pair=len(pairs),
                    tolerance=LEAST_SHARE / 2,
                )
            except BudgetSpent:
                if not pairs:
                    raise
                return
            pairs.append(gains)
            shares = shares_of_pairs(pairs)
            tell(shares)
            widest = max(h - low for h, low in zip(shares.high, shares.low, strict=True))
            is_stale = self._game.spent == before and len(pairs) >= 4 * count
            if len(pairs) > 2 and (widest < 2 * LEAST_SHARE or is_stale):
                return
