"""What a spike would have been with some sites un-clamped: replays, counted and kept.

A *question* is how the sites are scaled otherwise, and which sites. Its answer is a replay, which
is written to a file before anybody uses it: asked again, also by a later process, it takes no
time. The budget bounds the answers that are used, wherever they come from, so that an answer under
a budget is the same whatever was asked before.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from unclamp.analysis.counterfactual import ACTUAL, OWN_SCALES, Change, Question
from unclamp.explain.kept import Kept, Screened, exact, read_kept, write_kept
from unclamp.explain.mend import SCALINGS
from unclamp.explain.replay import Replay, Trace
from unclamp.names import SiteName
from unclamp.policy import unclamped
from unclamp.scaling import HighPrecision, Scaling

CAP = 100.0
"""A loss counts at most so many times the level: Inf and NaN become this. Where the spike itself
is higher, as above a level of next to nothing, they count as twice its rise."""
ELEVATED = 0.1
"""A step has a share of its own if its loss is above the level by this fraction of it, and"""
TINY = 0.01
"""by such a part of the highest rise at least."""


class BudgetSpent(Exception):
    """Another replay would pass the budget."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps of a spike, and the level its loss rises from.

    `calm` are steps before the spike in which a replay from further back may take another level;
    a spike counts from there (`Game.share_gone`). `only` are the steps that count where not all do.
    `peak` is the highest finite loss of the spike; NaN before it is known, and where there is none.
    """

    first: int
    last: int
    level: float
    # Decided by the others and the snapshot, so no part of what identifies the answers.
    calm: Sequence[int] = field(default=(), repr=False)
    only: tuple[int, ...] = field(default=(), repr=False)
    peak: float = field(default=math.nan, repr=False)

    @property
    def steps(self) -> Sequence[int]:
        """The steps that count."""
        return self.only or range(self.first, self.last + 1)

    def loss(self, losses: Mapping[int, float]) -> float:
        """Return the mean loss over the spike's steps; what is not finite counts as the cap."""
        return sum(self.capped(losses[n]) for n in self.steps) / len(self.steps)

    @property
    def top(self) -> float:
        """The cap: above the level, whatever that is, and above every finite loss of the spike."""
        top = CAP * abs(self.level)
        if math.isfinite(self.peak):
            top = max(top, self.level + 2 * (self.peak - self.level))
        return top if top > self.level else self.level + 1.0

    def capped(self, loss: float) -> float:
        """Return a loss, or the cap where it is higher or not finite."""
        return min(loss, self.top) if math.isfinite(loss) else self.top


class Game:
    """Answers to questions about one spike.

    Args:
        replay: Makes the replays.
        window: The spike.
        budget: Most replays whose answers are used, those of earlier processes included.
        cache: The file that keeps answers.
        on_replay: Called after each replay.

    Attributes:
        answers: Those that were used.
        screened: What a screening pass found; None before there was one.
    """

    def __init__(
        self,
        replay: Replay,
        window: Window,
        *,
        budget: int,
        cache: Path,
        on_replay: Callable[[], None] = lambda: None,
    ) -> None:
        self.replay, self.window, self.budget = replay, window, budget
        self.answers: dict[Question, Trace] = {}
        self.screened: Screened | None = None
        self._kept = Kept()
        self._cache, self._on_replay = cache, on_replay
        self._actual = self._floor = math.nan

    @property
    def spent(self) -> int:
        """Replays that were used so far, those of earlier processes included."""
        return len(self.answers) + (self.screened is not None)

    @property
    def seconds(self) -> float:
        """Time of all replays that were used."""
        screening = 0.0 if self.screened is None else self.screened.seconds
        return screening + sum(trace.seconds for trace in self.answers.values())

    def begin(self, actual: Trace) -> None:
        """Take the plain replay; use earlier answers if they started from the same one."""
        earlier = self.replay.ranks.first(lambda: read_kept(self._cache))
        before = earlier.answers.get(ACTUAL)
        self._kept = earlier if before is not None and exact(before) == exact(actual) else Kept()
        self.answers, self.screened = {ACTUAL: actual}, None
        finite = [loss for n in self.window.steps if math.isfinite(loss := actual.losses[n])]
        self.window = replace(self.window, peak=max(finite, default=math.nan))
        self._actual, self._floor = self._loss(actual), self.window.level
        self._keep()

    @property
    def rise(self) -> float:
        """How far the spike rises; NaN before there is a plain replay."""
        return self._actual - self._floor

    def lower_floor(self, without_clamping: Trace) -> None:
        """Count the spike from what its loss is with nothing clamped, if that is below the level.

        A batch may be easier than those before it; without this, shares would add up to more than
        the whole.
        """
        self._floor = min(self.window.level, self._loss(without_clamping))

    def narrow(self, steps: Iterable[int], without_cause: Trace) -> None:
        """Count only these steps from now on, and from what their loss is without a cause."""
        self.window = replace(self.window, only=tuple(sorted(steps)))
        self._actual = self._loss(self.answers[ACTUAL])
        self.lower_floor(without_cause)

    def ask(self, kind: Change, sites: Iterable[SiteName]) -> Trace:
        """Return the replay with these sites scaled otherwise.

        Raises:
            BudgetSpent: It would be one too many.
        """
        changes: dict[SiteName, Scaling] = {}
        for key in sorted(sites):
            scaling = self._changed(kind, key)
            if scaling is not None and scaling != self.replay.original(key):
                changes[key] = scaling
        if not changes:
            return self.answers[ACTUAL]
        question = Question(kind=kind, sites=tuple(changes))
        return self._answer(question, lambda: self.replay.run(changes, last=self.window.last))

    def placebo(self, seed: int) -> Trace:
        """Return the replay in which every weight is changed by a 4096th."""
        question = Question(kind="placebo", seed=seed)
        return self._answer(
            question, lambda: self.replay.run({}, last=self.window.last, perturb=seed)
        )

    def own_scales(self) -> Trace:
        """Return the replay in which each rank takes scales from its own amaxes alone.

        Raises:
            BudgetSpent: It would be one too many.
        """
        return self._answer(
            OWN_SCALES, lambda: self.replay.run({}, last=self.window.last, own_scales=True)
        )

    def screen(self, run: Callable[[], Screened]) -> Screened:
        """Return what the screening pass found, which is a replay too.

        Raises:
            BudgetSpent: It would be one too many.
        """
        if self.screened is None:
            if self.spent >= self.budget:
                raise BudgetSpent
            self.screened = self._kept.screened
            if self.screened is None:
                self.screened = run()
                self._keep()
        return self.screened

    def removed(self, kind: Change, sites: Iterable[SiteName]) -> float:
        """Return the share of the spike that is gone with these sites scaled otherwise."""
        return self.share_gone(self.ask(kind, sites))

    def known(self, kind: Change, sites: Iterable[SiteName]) -> float | None:
        """Return what `removed` does if its answer was used already, else None."""
        budget, self.budget = self.budget, 0
        try:
            return self.removed(kind, sites)
        except BudgetSpent:
            return None
        finally:
            self.budget = budget

    def share_gone(self, trace: Trace) -> float:
        """Return the share of the spike that is gone in a replay.

        What a replay from far back changes at the calm steps before the spike as well, a better
        training, is no part of the spike, and counts for nothing.
        """
        return (self._actual - self._loss(trace)) / self.rise

    def by_step(self, trace: Trace) -> dict[int, float]:
        """Return the share that is gone of each step in which the loss is well above the level."""
        window, plain = self.window, self.answers[ACTUAL].losses
        return {
            n: (window.capped(plain[n]) - window.capped(trace.losses[n])) / rise
            for n, rise in self._rises().items()
            if rise > 0 and rise >= self._least
        }

    def share_added(self, trace: Trace) -> float:
        """Return what a replay adds at steps that do not count, as a share of the rise.

        Those are the steps before the spike, and where not all of its own count, the others.
        """
        window, plain = self.window, self.answers[ACTUAL].losses
        added = [
            window.capped(loss) - window.capped(plain[n])
            for n, loss in trace.losses.items()
            if n not in window.steps
        ]
        harm = sum(each for each in added if each > 0 and each >= self._least)
        return harm / (self.rise * len(window.steps))

    @property
    def _least(self) -> float:
        """By how much the loss of a step has to differ for that step to be told from others."""
        return max(ELEVATED * abs(self.window.level), TINY * max(self._rises().values()))

    def _rises(self) -> dict[int, float]:
        window, plain = self.window, self.answers[ACTUAL].losses
        return {n: window.capped(plain[n]) - window.level for n in window.steps}

    def _loss(self, trace: Trace) -> float:
        """Return the loss of the spike's steps, less what the calm steps before moved by."""
        plain = self.answers[ACTUAL].losses
        moved = [trace.losses[n] - plain[n] for n in self.window.calm]
        finite = [change for change in moved if math.isfinite(change)]
        return self.window.loss(trace.losses) - (float(np.median(finite)) if finite else 0.0)

    def _changed(self, kind: Change, key: SiteName) -> Scaling | None:
        before = self.replay.original(key)
        if kind == "unclamped":
            return unclamped(before)
        if not before.casts:
            return None
        return HighPrecision() if kind == "high_precision" else SCALINGS[kind]

    def _answer(self, question: Question, run: Callable[[], Trace]) -> Trace:
        if question not in self.answers:
            if self.spent >= self.budget:
                raise BudgetSpent
            kept = self._kept.answers.get(question)
            self.answers[question] = run() if kept is None else kept
            if kept is None:
                self._keep()
        return self.answers[question]

    def _keep(self) -> None:
        """Write what was used and what was kept before, also for other questions, and tell."""
        answers = {**self._kept.answers, **self.answers}
        screened = self._kept.screened if self.screened is None else self.screened
        self._kept = Kept(answers=answers, screened=screened)
        if self.replay.ranks.is_first:
            write_kept(self._cache, self._kept)
        self._on_replay()
