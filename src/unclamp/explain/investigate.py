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

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from unclamp.analysis.counterfactual import ACTUAL, Change, ScalingName
from unclamp.analysis.explanation import CLAMPING, NOT_CLAMPING, Explanation, Verdict
from unclamp.analysis.spikes import Spike
from unclamp.errors import ReplayError, UnclampError
from unclamp.explain.attribution import ENOUGH, NOISE_FACTOR, Attribution
from unclamp.explain.facts import MACHINE, differing, recipe_of
from unclamp.explain.findings import Findings
from unclamp.explain.game import BudgetSpent, Game, Window
from unclamp.explain.limits import Limits
from unclamp.explain.mend import make_override
from unclamp.explain.players import Player, group_sites, joined
from unclamp.explain.replay import Replay, Trace, same_losses
from unclamp.explain.smallest import smallest_set
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Step, Training
from unclamp.names import SiteName
from unclamp.policy import unclamped

MAX_STEPS = 8
"""Steps of a spike that count: later ones are consequences of consequences."""
PLACEBOS = 2


def investigate(
    training: Training,
    step: Step,
    snapshot: Snapshot,
    *,
    spike: Spike,
    level: float,
    run: Path,
    limits: Limits = Limits(),
    notes: Sequence[str] = (),
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
        notes: What a reader must know whatever the answer is.
        on_progress: Called after each replay with the answer so far.

    Returns:
        The answer; with status "interrupted" after Ctrl-C.

    Raises:
        ReplayError: The snapshot does not reach the spike or does not fit the training.
    """
    asked = _Investigation(training, step, snapshot, spike, level, run, limits, notes, on_progress)
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
        notes: Sequence[str],
        on_progress: Callable[[Explanation], None],
    ) -> None:
        if not snapshot.step <= spike.onset <= snapshot.last_step:
            raise ReplayError(
                f"the snapshot before step {snapshot.step} has batches up to step "
                f"{snapshot.last_step}, which leaves out the spike at step {spike.onset}"
            )
        last = min(spike.end, spike.onset + MAX_STEPS - 1, snapshot.last_step)
        window = Window(first=spike.onset, last=last, level=level)
        self._replay = Replay(training, step, snapshot)
        self._snapshot, self._limits = snapshot, limits
        found = Explanation(
            run=str(run),
            onset=spike.onset,
            last=last,
            height=spike.height,
            level=level,
            kind=spike.kind,
            snapshot_step=snapshot.step,
            budget=limits.replays,
            notes=tuple(notes),
            others={},
            underflowed={},
        )
        self._findings = Findings(
            found,
            path=run / f"explain-{spike.onset}.json",
            steps=last - snapshot.step + 1,
            on_progress=on_progress,
        )
        self._game = self._findings.game = Game(
            self._replay,
            window,
            budget=limits.replays,
            cache=run / "explain-cache" / f"{_digest(snapshot, window)}.json",
            on_replay=self._findings.publish,
        )
        self._can_clamp = [k for k in self._replay.sites if unclamped(self._replay.original(k))]

    def run(self) -> Explanation:
        """Ask until all is answered, the budget is spent or Ctrl-C comes."""
        findings = self._findings
        try:
            try:
                self._ask()
            except BudgetSpent:
                findings.note(
                    f"The budget of {self._limits.replays} replays is spent; a larger one goes on "
                    "from here."
                )
            findings.publish(status="finished")
        except KeyboardInterrupt:
            findings.publish(status="interrupted")
        return findings.found

    def _ask(self) -> None:
        findings = self._findings
        if not self._reproduces() and not self._limits.anyway:
            return
        if not self._game.rise > 0:
            findings.note("In the replay the loss does not rise: there is nothing to explain.")
            findings.publish(verdict="not reproduced")
            return
        clamping_share, noise = self._without_clamping()
        if findings.found.verdict == "not clamping":
            self._other_questions()
            return
        attribution = Attribution(
            self._game, findings, self._limits, clamping_share=clamping_share, noise=noise
        )
        causes = attribution.share_out(self._players())
        self._mend(causes, clamping_share)
        if findings.found.verdict == "partly clamping":
            self._other_questions()

    # ---- does it come back -----------------------------------------------------------------

    def _reproduces(self) -> bool:
        snapshot, replay, findings = self._snapshot, self._replay, self._findings
        last = self._game.window.last
        plain = replay.run({}, last=last)
        self._game.begin(plain)
        if same_losses(plain.losses, snapshot.losses):
            findings.publish(reproduced=True)
            return True
        again = replay.run({}, last=last)
        findings.extra_replays += 1
        told = [_first_difference(snapshot.losses, plain.losses)]
        if not same_losses(plain.losses, again.losses):
            told.append(
                "Two replays differ from each other: the step function is not deterministic; use "
                "torch.use_deterministic_algorithms(True), and draw random numbers only from the "
                "generators of Python, NumPy and torch."
            )
        else:
            told.append("Two replays agree with each other, so something differs from the run.")
        # The number of threads is the run's: a replay sets it.
        machine = differing(snapshot.facts, replay.training.model, but=("threads",))
        if machine:
            told.append(f"What differs: {'; '.join(machine)}.")
        if not self._limits.anyway:
            told.append("No attribution without that, unless told to go on (--anyway).")
        verdict: Verdict = "unknown" if self._limits.anyway else "not reproduced"
        findings.publish(reproduced=False, differences=tuple(told), verdict=verdict)
        return False

    # ---- is it clamping --------------------------------------------------------------------

    def _without_clamping(self) -> tuple[float, float]:
        """Return the share that is gone with nothing clamped, and that of a placebo."""
        game = self._game
        free = game.ask("unclamped", self._can_clamp)
        game.lower_floor(free)
        gone = game.share_gone(free)
        noise = max(abs(game.share_gone(game.placebo(seed))) for seed in range(PLACEBOS))
        verdict: Verdict = "clamping" if gone >= CLAMPING else "partly clamping"
        if gone < max(NOT_CLAMPING, NOISE_FACTOR * noise):
            verdict = "not clamping"
        underflowed = {"actual": _underflow(game.answers[ACTUAL])}
        traces = (game.answers[ACTUAL], free)
        self._clamped = {key for trace in traces for key in trace.sites}
        self._findings.publish(
            clamping_share=gone,
            noise=noise,
            verdict=verdict,
            underflowed=underflowed,
            clamped_sites=len(self._clamped),
        )
        return gone, noise

    def _players(self) -> list[Player]:
        """Return who clamps, or would where nobody else does."""
        clamped = (key for key in self._can_clamp if key in self._clamped)
        return group_sites(clamped, self._limits.group)

    def _other_questions(self) -> None:
        """Ask for underflow, and whether it is FP8 at all."""
        findings = self._findings
        kinds: tuple[Change, ...] = ("blocks", "high_precision")
        for kind in kinds:
            try:
                trace = self._game.ask(kind, self._replay.sites)
            except (UnclampError, ValueError) as error:
                findings.note(f"The question {kind!r} could not be asked: {error}.")
                continue
            findings.publish(
                others={**findings.found.others, kind: self._game.share_gone(trace)},
                underflowed={**findings.found.underflowed, kind: _underflow(trace)},
            )

    # ---- what mends it ---------------------------------------------------------------------

    def _mend(self, causes: list[Player], clamping_share: float) -> None:
        """Find the smallest set that removes enough, and replay it as it would be recommended."""
        findings, game = self._findings, self._game
        target = ENOUGH * (1.0 if clamping_share >= ENOUGH else clamping_share)
        shares = {frozenset(row.members): row.share for row in findings.found.sites}
        chosen = smallest_set(
            sorted(causes, key=lambda p: (-shares.get(p.sites, -math.inf), p.name)),
            target,
            gain=lambda players: game.removed("unclamped", joined(players)),
            known=lambda players: game.known("unclamped", joined(players)),
        )
        named = {player.sites for player in chosen}
        findings.publish(
            sites=tuple(
                replace(row, named=frozenset(row.members) in named) for row in findings.found.sites
            )
        )
        scaling, removed = self._verified(joined(chosen), target)
        if removed is not None and removed < target:
            findings.note(f"That is less than the {100 * target:.0f} % aimed at.")
        if clamping_share < ENOUGH:
            findings.note(
                f"As {100 * clamping_share:.0f} % of the spike goes with the clamps, the set is "
                f"the smallest that removes {100 * ENOUGH:.0f} % of that."
            )
        recipe = recipe_of(self._snapshot.facts)
        override = make_override(joined(chosen), scaling, recipe=recipe, removed=removed)
        findings.publish(override=override)

    def _verified(
        self, sites: frozenset[SiteName], target: float
    ) -> tuple[ScalingName, float | None]:
        """Return the scaling to recommend, and what it removes in a replay."""
        tried: dict[ScalingName, float] = {}
        scalings: tuple[ScalingName, ...] = ("dynamic", "guarded")
        for scaling in scalings:
            try:
                tried[scaling] = self._game.removed(scaling, sites)
            except BudgetSpent:
                break
            if tried[scaling] >= target:
                return scaling, tried[scaling]
        if not tried:
            self._findings.note("The recommended change was not replayed: the budget is spent.")
            return "dynamic", None
        best = max(tried, key=lambda scaling: tried[scaling])
        return best, tried[best]


def _digest(snapshot: Snapshot, window: Window) -> str:
    """Return what identifies the questions: answers of others are of no use."""
    kept = {name: snapshot.facts.get(name) for name in ("code", "sites", "recipe", *MACHINE)}
    text = json.dumps([snapshot.step, kept, repr(window)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _underflow(trace: Trace) -> float:
    return trace.underflowed / max(1, trace.elements)


def _first_difference(run: Mapping[int, float], replayed: Mapping[int, float]) -> str:
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
