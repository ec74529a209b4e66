"""Ask the questions about a spike in order, each answer a replay: what did clamping cause?

1. Nothing changed. If the losses do not come back bit for bit, no attribution.
2. Nothing clamped. If not all of the spike goes, the same from older snapshots (`backwards`), and
   the rest is asked about: is it underflow, is it FP8 as a whole? If little goes, clamping is not
   the cause, as far back as was asked; unless it is underflow, that ends it.
3. One screening pass ranks the sites that clamp, or would once others do not.
4. The leading ones exactly, both ways: only this one un-clamped, only this one clamped. Clamps in
   series show in the second, clamps in parallel in the first, and either alone is wrong.
5. Shapley values of those that matter, over whatever budget is left.
6. The smallest set that removes the spike, replayed with the scaling that is recommended.

Underflow is attributed in the same way, with blocks in place of un-clamping, and over the steps at
which it does harm; clamping and underflow together with blocks too, which end both, over all steps.

After every replay the answer so far is written.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from unclamp.analysis.counterfactual import ACTUAL, Change
from unclamp.analysis.explanation import Explanation, Verdict
from unclamp.analysis.horizon import Clamped
from unclamp.analysis.spikes import Spike
from unclamp.errors import ReplayError, UnclampError
from unclamp.explain.across import tell_of_ranks
from unclamp.explain.attribution import Attribution
from unclamp.explain.backwards import Answer, Backwards, judged
from unclamp.explain.comeback import differences
from unclamp.explain.facts import recipe_of
from unclamp.explain.findings import Findings
from unclamp.explain.game import BudgetSpent, Window
from unclamp.explain.limits import Limits
from unclamp.explain.noise import Noise, noise_of
from unclamp.explain.players import Player, group_sites
from unclamp.explain.ranks import ALONE, Ranks
from unclamp.explain.remedy import recommend
from unclamp.explain.replay import Trace
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.start import Start, identity_of
from unclamp.explain.training import Step, Training
from unclamp.explain.underflow import find_underflow, is_too, underflowing_sites
from unclamp.explain.watch import calm_steps

MAX_STEPS = 8
"""Steps of a spike that count: later ones are consequences of consequences."""


def investigate(
    training: Training,
    step: Step,
    snapshot: Snapshot,
    *,
    spike: Spike,
    level: float,
    spikes: Sequence[Spike],
    kin: frozenset[int] | None = None,
    run: Path,
    older: Iterable[Snapshot] = (),
    clamped_before: Callable[[int], Clamped] | None = None,
    limits: Limits = Limits(),
    notes: Sequence[str] = (),
    on_progress: Callable[[Explanation], None] = lambda explanation: None,
    ranks: Ranks = ALONE,
) -> Explanation:
    """Explain a spike by replays from a snapshot, and where too little goes, from older ones.

    Args:
        training: Made by the build function; it is taken over.
        step: The step function.
        snapshot: Of a step at or before the spike's onset.
        spike: The spike.
        level: The loss that it rises from; NaN where no calm step comes before it.
        spikes: All spikes of the loss: a step in another one is not calm.
        kin: Steps whose batch is of the spike's kind, which alone count; None where all are.
        run: Where RUN/explain-<onset>.json and the cache of answers go.
        older: Snapshots of earlier steps with all batches up to the spike, the latest first.
        clamped_before: What the run's log says was clamped before a step; None if not known.
        limits: How much to ask.
        notes: What a reader must know whatever the answer is.
        on_progress: Called after each replay with the answer so far.
        ranks: Who asks together, all the same; the first of them writes.

    Returns:
        The answer; with status "interrupted" after Ctrl-C.

    Raises:
        ReplayError: The snapshot does not reach the spike or does not fit the training.
    """
    asked = _Investigation(
        training, step, snapshot, spike, level, spikes, kin, run, limits, notes, on_progress, ranks
    )
    return asked.run(older, clamped_before)


class _Investigation:
    def __init__(
        self,
        training: Training,
        step: Step,
        snapshot: Snapshot,
        spike: Spike,
        level: float,
        spikes: Sequence[Spike],
        kin: frozenset[int] | None,
        run: Path,
        limits: Limits,
        notes: Sequence[str],
        on_progress: Callable[[Explanation], None],
        ranks: Ranks,
    ) -> None:
        if not snapshot.step <= spike.onset <= snapshot.last_step:
            raise ReplayError(
                f"the snapshot before step {snapshot.step} has batches up to step "
                f"{snapshot.last_step}, which leaves out the spike at step {spike.onset}"
            )
        last = min(spike.end, spike.onset + MAX_STEPS - 1, snapshot.last_step)
        only: tuple[int, ...] = ()
        if kin is not None:
            only = tuple(n for n in range(spike.onset, last + 1) if n in kin)
            last = only[-1]
        self._training, self._step, self._run, self._limits = training, step, run, limits
        self._spikes, self._kin, self._ranks = spikes, kin, ranks
        self._of_kind = [other for other in spikes if other.group == spike.group]
        self._window = Window(first=spike.onset, last=last, level=level, only=only)
        found = Explanation(
            run=str(run),
            onset=spike.onset,
            last=last,
            height=spike.height,
            level=level,
            kind=spike.kind,
            snapshot_step=snapshot.step,
            budget=limits.replays,
            identity=ranks.first(lambda: identity_of(snapshot, self._window, limits)),
            notes=tuple(notes),
            others={},
            underflowed={},
        )
        path = run / f"explain-{spike.onset}.json"
        self._findings = Findings(found, path=path, on_progress=on_progress, ranks=ranks)
        self._from(self._begin(snapshot, self._window))

    def run(
        self, older: Iterable[Snapshot], clamped_before: Callable[[int], Clamped] | None
    ) -> Explanation:
        """Ask until all is answered, the budget is spent or Ctrl-C comes.

        Nothing is asked for less than a whole answer from before has cost.
        """
        findings = self._findings
        if (stored := findings.stored()) is not None:
            return stored
        try:
            try:
                self._ask(older, clamped_before)
            except BudgetSpent:
                findings.note(
                    f"The budget of {self._limits.replays} replays is spent; a larger one goes on "
                    "from here."
                )
            return findings.end("finished")
        except KeyboardInterrupt:
            return findings.end("interrupted")

    def _ask(
        self, older: Iterable[Snapshot], clamped_before: Callable[[int], Clamped] | None
    ) -> None:
        findings = self._findings
        if not self._reproduces() and not self._limits.anyway:
            return
        unmeasured = self._unmeasured()
        if unmeasured:
            findings.note(unmeasured)
            findings.publish(verdict="unknown" if findings.found.reproduced else "not reproduced")
            return
        answer = self._without_clamping(older, clamped_before)
        tell_of_ranks(self._game, findings)
        if findings.found.verdict != "clamping":
            self._other_questions()
            self._judge_underflow(answer)
        if findings.found.verdict == "underflow":
            self._attribute_underflow(answer)
        elif findings.found.verdict == "clamping and underflow":
            self._attribute_both(answer)
        elif findings.found.verdict in ("clamping", "mostly clamping", "partly clamping"):
            self._attribute("unclamped", self._players(), answer.gone, answer.noise)

    def _attribute(self, kind: Change, players: list[Player], whole: float, noise: Noise) -> None:
        """Find who caused how much, and the smallest set that mends it."""
        attribution = Attribution(self._game, self._findings, self._limits, kind=kind, whole=whole)
        causes = attribution.share_out(players)
        recipe = recipe_of(self._snapshot.facts)
        recommend(self._game, self._findings, kind, causes, whole=whole, noise=noise, recipe=recipe)

    # ---- where replays begin ---------------------------------------------------------------

    def _begin(self, snapshot: Snapshot, window: Window) -> Start:
        """Return a start, which takes the training over from the one before."""
        findings = self._findings
        if findings.games:
            self._replay.undo()
        start = Start(
            self._training,
            self._step,
            snapshot,
            window=window,
            run=self._run,
            budget=self._limits.replays - findings.replays,
            on_replay=findings.publish,
            ranks=self._ranks,
        )
        findings.games[start.game] = start.steps
        self._replay = start.replay
        return start

    def _begin_earlier(self, snapshot: Snapshot) -> Start:
        """Return a start from further back.

        Raises:
            BudgetSpent: It could not be asked whether it comes back, and what goes.
        """
        if self._limits.replays - self._findings.replays < 2:
            raise BudgetSpent
        calm = self._calm_from(snapshot.step)
        return self._begin(snapshot, replace(self._window, calm=tuple(calm)))

    def _calm_from(self, step: int) -> list[int]:
        """Return the steps by which a replay from a step tells a better training from a spike.

        They are of the spike's kind, or of any where there is none.
        """
        before, kin = range(step, self._window.first), self._kin
        own = [] if kin is None else calm_steps([n for n in before if n in kin], self._of_kind)
        return own or calm_steps(before, self._spikes)

    def _from(self, start: Start) -> None:
        """Ask from this start on, within what is left of the budget."""
        findings = self._findings
        if start.replay is not self._replay:
            self._replay.undo()
        self._start, self._snapshot = start, start.snapshot
        self._replay, self._game = start.replay, start.game
        start.game.budget = self._limits.replays - (findings.replays - start.game.spent)
        findings.game = start.game

    # ---- does it come back -----------------------------------------------------------------

    def _reproduces(self) -> bool:
        replay, findings = self._replay, self._findings
        plain = self._start.plain()
        if self._start.comes_back(plain):
            findings.publish(reproduced=True)
            return True
        again = replay.run({}, last=self._window.last)
        findings.extra_replays += 1
        told = differences(replay, plain, again)
        if not self._limits.anyway:
            told.append("No attribution without that, unless told to go on (--anyway).")
        verdict: Verdict = "unknown" if self._limits.anyway else "not reproduced"
        findings.publish(reproduced=False, differences=tuple(told), verdict=verdict)
        return False

    def _unmeasured(self) -> str:
        """Say why no share of the spike can be told; empty where it can."""
        if math.isnan(self._window.level):
            return (
                "No calm step comes before the spike, so there is no level to count its rise from, "
                "and whether clamping is the cause cannot be measured."
            )
        if self._game.rise > 0:
            return ""
        if not self._findings.found.reproduced:
            return "In the replay the loss does not rise: there is nothing to explain."
        loss = self._window.loss(self._game.answers[ACTUAL].losses)
        return (
            f"The mean loss of these steps, {loss:.4g}, is not above the level, "
            f"{self._window.level:.4g}, the median of the latest calm steps before: there is no "
            "rise of which a share could be told."
        )

    # ---- is it clamping --------------------------------------------------------------------

    def _without_clamping(
        self, older: Iterable[Snapshot], clamped_before: Callable[[int], Clamped] | None
    ) -> Answer:
        """Return what goes with nothing clamped, from the start from which most goes."""
        start, findings = self._start, self._findings
        first = Answer(start=start, gone=start.without_clamping(), noise=start.noise())
        self._judge(first)
        backwards = Backwards(
            first,
            clamped_before=clamped_before,
            begin=self._begin_earlier,
            on_answer=lambda horizon: findings.publish(horizon=horizon),
            is_measurable=lambda step: bool(self._calm_from(step)),
        )
        backwards.ask(older)
        self._from(backwards.best.start)
        self._judge(backwards.best, is_measured=backwards.horizon.stop != "no calm step")
        return backwards.best

    def _judge(self, answer: Answer, *, is_measured: bool = True) -> None:
        """Publish what follows from an answer; nothing negative where older ones lack a measure."""
        start, gone, noise = answer.start, answer.gone, answer.noise
        self._clamped = start.clamped()
        verdict = judged(gone, noise)
        self._findings.publish(
            snapshot_step=start.snapshot.step,
            clamping_share=gone,
            noise=noise.largest,
            placebos=len(noise.moved),
            verdict="unknown" if verdict == "not clamping" and not is_measured else verdict,
            underflowed={"actual": _underflow(start.game.answers[ACTUAL])},
            clamped_sites=len(self._clamped),
        )

    def _players(self) -> list[Player]:
        """Return who clamps, or would where nobody else does."""
        clamped = (key for key in self._start.can_clamp if key in self._clamped)
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

    # ---- is it underflow -------------------------------------------------------------------

    def _judge_underflow(self, answer: Answer) -> None:
        """Publish where blocks help and un-clamping does not, and the verdict if that decides."""
        findings, game = self._findings, self._game
        if "blocks" not in findings.found.others:
            return
        found = find_underflow(
            game,
            blocks=self._in_blocks(),
            free=self._start.free(),
            placebos=[game.placebo(seed) for seed in range(len(answer.noise.moved))],
        )
        verdict = findings.found.verdict
        gone = game.share_gone(self._in_blocks())
        if found is None or verdict == "cannot tell":
            pass
        elif is_too(found, freed=answer.gone, gone=gone, noise=answer.noise):
            verdict = "clamping and underflow"
        elif verdict != "mostly clamping" and 2 * len(found.by_step) >= found.elevated:
            verdict = "underflow"
        findings.publish(underflow=found, verdict=verdict)

    def _attribute_both(self, answer: Answer) -> None:
        """Share the spike out among who clamps or underflows: blocks end both."""
        game, blocks = self._game, self._in_blocks()
        either = {
            *underflowing_sites(game, blocks),
            *(site for player in self._players() for site in player.sites),
        }
        ordered = [site for site in self._replay.sites if site in either]
        players = group_sites(ordered, self._limits.group)
        self._attribute("blocks", players, game.share_gone(blocks), answer.noise)

    def _attribute_underflow(self, answer: Answer) -> None:
        """Count the steps of underflow alone, and share their rise out among who underflows."""
        findings, game = self._findings, self._game
        assert findings.found.underflow is not None
        blocks = self._in_blocks()
        game.narrow(findings.found.underflow.by_step, blocks)
        noise = noise_of(game, answer.noise)
        findings.publish(noise=noise.largest)
        players = group_sites(underflowing_sites(game, blocks), self._limits.group)
        self._attribute("blocks", players, game.share_gone(blocks), noise)

    def _in_blocks(self) -> Trace:
        return self._game.ask("blocks", self._replay.sites)


def _underflow(trace: Trace) -> float:
    return trace.underflowed / max(1, trace.elements)
