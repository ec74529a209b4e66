"""Ask the questions about a spike in order, each answer a replay: what did clamping cause?

1. Nothing changed. If the losses do not come back bit for bit, no attribution.
2. Nothing clamped. If little of the spike goes, clamping is not the cause: ask for underflow and
   for FP8 as a whole, and stop.
3. One screening pass ranks the sites that clamp, or would once others do not.
4. The leading ones exactly, both ways: only this one un-clamped, only this one clamped. Clamps in
   series show in the second, clamps in parallel in the first, and either alone is wrong.
5. Shapley values of those that matter, over whatever budget is left.
6. The smallest set that removes the spike, replayed with the scaling that is recommended.

After every replay the answer so far is written.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.analysis.spikes import Spike
from unclamp.errors import ReplayError
from unclamp.explain.explanation import CLAMPING, NOT_CLAMPING, Explanation, SiteShare, Verdict
from unclamp.explain.facts import MACHINE, differing, recipe_of
from unclamp.explain.game import BudgetSpent, Game, Window, write_json
from unclamp.explain.mend import make_override
from unclamp.explain.players import Group, Player, group_sites, joined
from unclamp.explain.replay import Replay, Trace, same_losses, unclamped
from unclamp.explain.screening import Screening
from unclamp.explain.shapley import Shares, exact_shares, sampled_pair, shares_of_pairs
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Step, Training

MAX_STEPS = 8
"""Steps of a spike that count: later ones are consequences of consequences."""
PLACEBOS = 2
NOISE_FACTOR = 3.0
"""A share is significant beyond so many times the largest change that a placebo makes."""
LEAST_SHARE = 0.02
ENOUGH = 0.9
"""Share of a spike that the smallest set has to remove."""
MORE_ROUNDS = 3
RESERVE = 8
"""Replays kept back for the smallest set."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much to ask.

    Attributes:
        replays: Most replays, those of earlier processes included.
        leading: Sites that are replayed by themselves.
        group: What is un-clamped together.
        seed: Of the orders that are drawn.
        anyway: Go on though the losses do not come back.
    """

    replays: int = 100
    leading: int = 12
    group: Group = "site"
    seed: int = 0
    anyway: bool = False


def investigate(
    training: Training,
    step: Step,
    snapshot: Snapshot,
    *,
    spike: Spike,
    level: float,
    run: Path,
    limits: Limits = Limits(),
    on_progress: Callable[[Explanation], None] = lambda explanation: None,
) -> Explanation:
    """Explain a spike by replays from a snapshot.

    Args:
        training: Made by the build function; it is taken over.
        step: The step function.
        snapshot: Of a step at or before the spike's onset.
        spike: The spike.
        level: The loss that it rises from.
        run: Where RUN/explain-<onset>.json and the cache of answers go.
        limits: How much to ask.
        on_progress: Called after each replay with the answer so far.

    Returns:
        The answer; with status "interrupted" after Ctrl-C.

    Raises:
        ReplayError: The snapshot does not reach the spike or does not fit the training.
    """
    asked = _Investigation(training, step, snapshot, spike, level, run, limits, on_progress)
    return asked.run()


class _Investigation:
    def __init__(
        self,
        training: Training,
        step: Step,
        snapshot: Snapshot,
        spike: Spike,
        level: float,
        run: Path,
        limits: Limits,
        on_progress: Callable[[Explanation], None],
    ) -> None:
        if not snapshot.step <= spike.onset <= snapshot.last_step:
            raise ReplayError(
                f"the snapshot before step {snapshot.step} has batches up to step "
                f"{snapshot.last_step}, which leaves out the spike at step {spike.onset}"
            )
        last = min(spike.end, spike.onset + MAX_STEPS - 1, snapshot.last_step)
        self._replay = Replay(training, step, snapshot)
        self._snapshot, self._limits, self._on_progress = snapshot, limits, on_progress
        self._window = Window(first=spike.onset, last=last, level=level)
        self._path = run / f"explain-{spike.onset}.json"
        self._game = Game(
            self._replay,
            self._window,
            budget=limits.replays,
            cache=run / "explain-cache" / f"{self._digest()}.json",
            on_replay=lambda name: self._publish(),
        )
        self._found = Explanation(
            run=str(run),
            onset=spike.onset,
            last=last,
            height=spike.height,
            level=level,
            snapshot_step=snapshot.step,
            budget=limits.replays,
            others={},
            underflowed={},
        )
        self._extra = 0
        self._screening: dict[Any, float] = {}

    def _digest(self) -> str:
        facts = self._snapshot.facts
        kept = {name: facts.get(name) for name in ("code", "sites", "recipe", *MACHINE)}
        window = dataclasses.astuple(self._window)
        text = json.dumps([self._snapshot.step, kept, [str(w) for w in window]], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(self) -> Explanation:
        """Ask until all is answered, the budget is spent or Ctrl-C comes."""
        try:
            try:
                self._ask()
            except BudgetSpent:
                self._note(
                    f"The budget of {self._limits.replays} replays is spent; a larger one goes on "
                    "from here."
                )
            self._publish(status="finished")
        except KeyboardInterrupt:
            self._publish(status="interrupted")
        return self._found

    # ---- what is known ---------------------------------------------------------------------

    def _publish(self, **changes: Any) -> None:
        game = self._game
        steps = self._window.last - self._snapshot.step + 1
        spent = game.spent + self._extra
        self._found = replace(
            self._found,
            **changes,
            replays=spent,
            replay_s=game.seconds,
            step_s=game.seconds / max(1, game.spent * steps),
            counterfactuals=tuple(
                {
                    "name": name,
                    "losses": {str(n): loss for n, loss in trace.losses.items()},
                    "removed": None if math.isnan(game.actual_excess) else game.share_gone(trace),
                }
                for name, trace in game.answers.items()
            ),
        )
        write_json(self._path, self._found.to_dict())
        self._on_progress(self._found)

    def _note(self, note: str) -> None:
        self._found = replace(self._found, notes=(*self._found.notes, note))

    # ---- the questions ---------------------------------------------------------------------

    def _ask(self) -> None:
        if not self._reproduces() and not self._limits.anyway:
            return
        if self._game.actual_excess <= 0:
            self._publish(verdict="not reproduced")
            self._note("In the replay the loss does not rise above its level: nothing to explain.")
            return
        clamping_share, noise = self._without_clamping()
        if self._found.verdict == "not clamping":
            self._other_questions()
            return
        players = self._players()
        if players:
            leading, rest = self._lead(players, clamping_share)
            active, rest, ways = self._both_ways(leading, rest, noise, clamping_share)
            self._share_out(active, rest, ways)
            self._smallest_set(active or leading, clamping_share)
        if self._found.verdict == "partly clamping":
            self._other_questions()

    def _reproduces(self) -> bool:
        snapshot, replay = self._snapshot, self._replay
        plain = replay.run({}, last=self._window.last)
        self._game.begin(plain)
        if same_losses(plain.losses, snapshot.losses):
            self._publish(reproduced=True)
            return True
        again = replay.run({}, last=self._window.last)
        self._extra += 1
        told = [_first_difference(snapshot.losses, plain.losses)]
        if not same_losses(plain.losses, again.losses):
            told.append(
                "Two replays differ from each other: the step function is not deterministic; use "
                "torch.use_deterministic_algorithms(True), and draw random numbers only from the "
                "generators of Python, NumPy and torch."
            )
        else:
            told.append("Replays agree with each other, so something differs from the run.")
        machine = differing(snapshot.facts, replay.training.model)
        machine = [d for d in machine if not d.startswith("threads")]
        if machine:
            told.append(f"What differs: {'; '.join(machine)}.")
        if not self._limits.anyway:
            told.append("No attribution without that, unless told to go on (--anyway).")
        verdict: Verdict = "unknown" if self._limits.anyway else "not reproduced"
        self._publish(reproduced=False, differences=tuple(told), verdict=verdict)
        return False

    def _without_clamping(self) -> tuple[float, float]:
        everything = [k for k in self._replay.sites if unclamped(self._replay.original(k))]
        gone = self._game.removed("unclamped", everything)
        noise = 0.0
        for seed in range(PLACEBOS):
            noise = max(noise, abs(self._game.share_gone(self._game.placebo(seed))))
        if gone < max(NOT_CLAMPING, NOISE_FACTOR * noise):
            verdict: Verdict = "not clamping"
        else:
            verdict = "clamping" if gone >= CLAMPING else "partly clamping"
        underflowed = {"actual": _underflow(self._game.answers["actual"])}
        self._publish(clamping_share=gone, noise=noise, verdict=verdict, underflowed=underflowed)
        return gone, noise

    def _other_questions(self) -> None:
        for kind in ("blocks", "high_precision"):
            try:
                trace = self._game.ask(kind, self._replay.sites)
            except (ReplayError, ValueError, NotImplementedError) as error:
                self._note(f"The question {kind!r} could not be asked: {error}.")
                continue
            self._publish(
                others={**self._found.others, kind: self._game.share_gone(trace)},
                underflowed={**self._found.underflowed, kind: _underflow(trace)},
            )

    def _players(self) -> list[Player]:
        """Return who clamps, or would where nobody else does."""
        everything = [k for k in self._replay.sites if unclamped(self._replay.original(k))]
        traces = (self._game.answers["actual"], self._game.ask("unclamped", everything))
        clamped = {key for trace in traces for key in trace.sites}
        self._publish(clamped_sites=len(clamped))
        return group_sites((key for key in everything if key in clamped), self._limits.group)

    def _lead(
        self, players: list[Player], clamping_share: float
    ) -> tuple[list[Player], list[Player]]:
        """Return the leading players, and the rest; together the leading ones do what all do."""
        if len(players) == 1:
            return players, []
        ranked = self._rank(players)
        count = self._limits.leading
        for _ in range(MORE_ROUNDS):
            leading, rest = ranked[:count], ranked[count:]
            if not rest:
                break
            if self._game.removed("unclamped", joined(leading)) >= ENOUGH * clamping_share:
                break
            count += self._limits.leading
        return ranked[:count], ranked[count:]

    def _rank(self, players: list[Player]) -> list[Player]:
        """Return players by first-order effect, and every third by clamp error instead."""
        screening = Screening(self._replay.training.model)
        self._replay.run({}, last=self._window.last, watching=screening.watching)
        self._extra += 1
        self._screening = screening.effects
        by_effect = sorted(players, key=lambda p: (-abs(self._effect(p) or 0.0), p.name))
        by_error = sorted(players, key=lambda p: (-self._clamp_error(p), p.name))
        ranked: dict[str, Player] = {}
        effects, errors = iter(by_effect), iter(by_error)
        for turn in itertools.cycle((effects, effects, errors)):
            player = next((p for p in turn if p.name not in ranked), None)
            if player is None:
                break
            ranked[player.name] = player
        ranked |= {player.name: player for player in players if player.name not in ranked}
        return list(ranked.values())

    def _effect(self, player: Player) -> float | None:
        known = [self._screening[site] for site in player.sites if site in self._screening]
        return sum(known) if known else None

    def _clamp_error(self, player: Player) -> float:
        counts = self._game.answers["actual"].sites
        return sum(counts[site].clamp_error for site in player.sites if site in counts)

    def _both_ways(
        self, leading: list[Player], rest: list[Player], noise: float, clamping_share: float
    ) -> tuple[list[Player], list[Player], dict[str, tuple[float, float]]]:
        """Replay each leading player alone, both ways; return those that matter, and the rest."""
        ways: dict[str, tuple[float, float]] = {}
        all_sites = joined([*leading, *rest])
        for player in leading:
            only = self._game.removed("unclamped", player.sites)
            last = clamping_share - self._game.removed("unclamped", all_sites - player.sites)
            ways[player.name] = (only, last)
            self._publish(sites=self._tabulate(leading, ways))
        least = max(LEAST_SHARE, NOISE_FACTOR * noise)
        active = [p for p in leading if max(map(abs, ways[p.name])) > least]
        others = [p for p in [*leading, *rest] if p not in active]
        if not active:
            return leading, rest, ways
        if not others:
            return active, [], ways
        # Do those left out really do nothing, also together?
        explains = abs(self._game.removed("unclamped", joined(active)) - clamping_share) <= least
        is_idle = abs(self._game.removed("unclamped", joined(others))) <= least
        return (active, others, ways) if explains and is_idle else (leading, rest, ways)

    def _tabulate(
        self,
        players: list[Player],
        ways: dict[str, tuple[float, float]],
        shares: dict[str, tuple[float, float, float]] | None = None,
    ) -> tuple[SiteShare, ...]:
        actual, noise = self._game.answers["actual"], self._found.noise or 0.0
        rows = []
        for player in players:
            if shares is None and player.name not in ways:
                continue
            only, last = ways.get(player.name, (None, None))
            if shares is not None and player.name in shares:
                share, low, high = shares[player.name]
                how = "shapley"
            elif only is not None and last is not None:
                share, low, high, how = (only + last) / 2, min(only, last), max(only, last), "both ways"
            else:
                continue
            overshoots = [actual.sites[s].overshoot for s in player.sites if s in actual.sites]
            rows.append(
                SiteShare(
                    fqn=player.fqn,
                    role=player.role,
                    share=share,
                    low=low - noise,
                    high=high + noise,
                    how=how,
                    only=only,
                    last=last,
                    effect=self._effect(player),
                    clamp_error=self._clamp_error(player),
                    overshoot=max(overshoots, default=0.0),
                    sites=tuple(sorted(player.sites)) if self._limits.group != "site" else (),
                )
            )
        return tuple(sorted(rows, key=lambda row: (-row.share, row.fqn, row.role)))

    def _share_out(
        self, active: list[Player], rest: list[Player], ways: dict[str, tuple[float, float]]
    ) -> None:
        """Find Shapley values of the active players, with the rest as one more."""
        groups = [player.sites for player in active] + ([joined(rest)] if rest else [])
        count = len(groups)

        def value(members: frozenset[int]) -> float:
            sites = frozenset().union(*(groups[i] for i in members))
            return self._game.removed("unclamped", sites) if sites else 0.0

        def tell(shares: Shares) -> None:
            known = {
                player.name: (shares.values[i], shares.low[i], shares.high[i])
                for i, player in enumerate(active)
            }
            self._publish(
                sites=self._tabulate([*active, *rest], ways, known),
                rest_share=shares.values[-1] if rest else 0.0,
            )

        budget, game = self._game.budget, self._game
        game.budget = max(game.spent, budget - RESERVE)
        try:
            if 2**count <= max(game.budget - game.spent, 4):
                tell(exact_shares(count, value))
            else:
                tolerance = max(LEAST_SHARE, self._found.noise or 0.0)
                self._sample(count, value, tolerance, tell)
        except BudgetSpent:
            self._note("The budget did not suffice for Shapley values; shares are both ways' mean.")
        finally:
            game.budget = budget

    def _sample(
        self,
        count: int,
        value: Callable[[frozenset[int]], float],
        tolerance: float,
        tell: Callable[[Shares], None],
    ) -> None:
        """Draw pairs of orders until the budget is spent or nothing moves any more."""
        pairs: list[np.ndarray] = []
        seed = self._limits.seed
        for pair in itertools.count():
            before = self._game.spent
            try:
                pairs.append(
                    sampled_pair(count, value, seed=seed, pair=pair, tolerance=tolerance)
                )
            except BudgetSpent:
                if not pairs:
                    raise
                return
            shares = shares_of_pairs(pairs)
            tell(shares)
            widest = max(h - low for h, low in zip(shares.high, shares.low, strict=True))
            is_known = self._game.spent == before and pair >= 4 * count
            if len(pairs) > 2 and (widest < 2 * LEAST_SHARE or is_known):
                return

    def _smallest_set(self, candidates: list[Player], clamping_share: float) -> None:
        """Find the smallest set that removes enough, and replay it as it would be recommended."""
        target = ENOUGH * min(1.0, clamping_share)
        if clamping_share >= ENOUGH:
            target = ENOUGH
        chosen = self._greedy(candidates, target)
        chosen = self._smaller(candidates, chosen, target)
        names = {player.name for player in chosen}
        rows = tuple(replace(row, named=row.name in names) for row in self._found.sites)
        self._publish(sites=rows)
        sites = joined(chosen)
        recipe = recipe_of(self._snapshot.facts)
        best = ("dynamic", -math.inf)
        try:
            for scaling in ("dynamic", "guarded"):
                removed = self._game.removed(scaling, sites)
                if removed > best[1]:
                    best = (scaling, removed)
                if removed >= target:
                    break
        except BudgetSpent:
            self._note("The recommended change was not replayed: the budget is spent.")
        removed = best[1] if math.isfinite(best[1]) else None
        if removed is not None and removed < target:
            self._note(f"It removes less than the {100 * target:.0f} % aimed at.")
        if clamping_share < ENOUGH:
            self._note(
                f"As clamping caused {100 * clamping_share:.0f} % of the spike, the set is the "
                f"smallest that removes {100 * ENOUGH:.0f} % of that."
            )
        self._publish(override=make_override(sites, best[0], recipe=recipe, removed=removed))

    def _greedy(self, candidates: list[Player], target: float) -> list[Player]:
        shares = {row.name: row.share for row in self._found.sites}
        ranked = sorted(candidates, key=lambda p: -shares.get(p.name, -math.inf))
        chosen: list[Player] = []
        for player in ranked:
            chosen.append(player)
            if self._game.removed("unclamped", joined(chosen)) >= target:
                break
        for player in list(chosen)[::-1]:
            without = [other for other in chosen if other is not player]
            if without and self._game.removed("unclamped", joined(without)) >= target:
                chosen = without
        return chosen

    def _smaller(
        self, candidates: list[Player], chosen: list[Player], target: float
    ) -> list[Player]:
        """Return a smaller set, or one as small that removes more, among those replayed already."""
        budget, self._game.budget = self._game.budget, 0
        best = (len(chosen), -self._game.removed("unclamped", joined(chosen)), chosen)
        try:
            for size in range(1, min(len(chosen), 3) + 1):
                for members in itertools.combinations(candidates, size):
                    try:
                        removed = self._game.removed("unclamped", joined(members))
                    except BudgetSpent:
                        continue
                    if removed >= target and (size, -removed) < best[:2]:
                        best = (size, -removed, list(members))
        finally:
            self._game.budget = budget
        return best[2]


def _underflow(trace: Trace) -> float:
    return trace.underflowed / max(1, trace.elements)


def _first_difference(run: Any, replayed: Any) -> str:
    for n in sorted(set(run) & set(replayed)):
        one, other = run[n], replayed[n]
        if one != other and not (math.isnan(one) and math.isnan(other)):
            change = abs(other - one)
            size = f" ({change / abs(one):.2g} of it)" if one and math.isfinite(change) else ""
            return (
                f"The loss of step {n} was {one!r} in the run and is {other!r} in the replay, "
                f"{change:.3g} off{size}."
            )
    return "No step of the replay is in the run."
