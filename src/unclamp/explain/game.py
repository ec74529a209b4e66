"""What a spike would have been with some sites un-clamped: replays, counted and kept.

A *question* is how the sites are scaled otherwise, and which sites. Its answer is a replay, which
is written to a file before anybody uses it: asked again, also by a later process, it costs
nothing. The budget bounds the answers that are replays.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.analysis.counterfactual import ACTUAL, Change, Question
from unclamp.explain.mend import SCALINGS
from unclamp.explain.replay import Replay, SiteCount, Trace
from unclamp.files import write_json
from unclamp.names import SiteName
from unclamp.policy import unclamped
from unclamp.scaling import HighPrecision, Scaling

CAP = 100.0
"""A loss counts at most so many times the level: Inf and NaN become this."""
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
    """

    first: int
    last: int
    level: float
    # Decided by the others and the snapshot, so no part of what identifies the answers.
    calm: Sequence[int] = field(default=range(0), repr=False)
    only: tuple[int, ...] = field(default=(), repr=False)

    @property
    def steps(self) -> Sequence[int]:
        """The steps that count."""
        return self.only or range(self.first, self.last + 1)

    def loss(self, losses: Mapping[int, float]) -> float:
        """Return the mean loss over the spike's steps; what is not finite counts as the cap."""
        return sum(self.capped(losses[n]) for n in self.steps) / len(self.steps)

    def capped(self, loss: float) -> float:
        """Return a loss, or the cap where it is higher or not finite."""
        top = CAP * abs(self.level)
        return min(loss, top) if math.isfinite(loss) else top


class Game:
    """Answers to questions about one spike.

    Args:
        replay: Makes the replays.
        window: The spike.
        budget: Most answers that are replays; those of earlier processes count.
        cache: The file that keeps answers.
        on_replay: Called after each replay.
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
        self._cache, self._on_replay = cache, on_replay
        self._actual = self._floor = math.nan

    @property
    def spent(self) -> int:
        """Replays so far, those of earlier processes that are of use here included."""
        return len(self.answers)

    @property
    def seconds(self) -> float:
        """Time of all replays."""
        return sum(trace.seconds for trace in self.answers.values())

    def begin(self, actual: Trace) -> None:
        """Take the plain replay; keep earlier answers if they started from the same one."""
        self.answers = {}
        earlier = _read(self._cache)
        if ACTUAL in earlier and _exact(earlier[ACTUAL]) == _exact(actual):
            self.answers = earlier
        self.answers[ACTUAL] = actual
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

    def removed(self, kind: Change, sites: Iterable[SiteName]) -> float:
        """Return the share of the spike that is gone with these sites scaled otherwise."""
        return self.share_gone(self.ask(kind, sites))

    def known(self, kind: Change, sites: Iterable[SiteName]) -> float | None:
        """Return what `removed` does if no replay is needed for it, else None."""
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
        rises = {n: window.capped(plain[n]) - window.level for n in window.steps}
        least = max(ELEVATED * abs(window.level), TINY * max(rises.values()))
        return {
            n: (window.capped(plain[n]) - window.capped(trace.losses[n])) / rise
            for n, rise in rises.items()
            if rise > 0 and rise >= least
        }

    def share_left_over(self, trace: Trace) -> float:
        """Return the share that is gone, less what came on top of steps that do not count.

        Nothing is taken off where all steps of the spike count.
        """
        window, plain = self.window, self.answers[ACTUAL].losses
        if not window.only:
            return self.share_gone(trace)
        added = [
            window.capped(loss) - window.capped(plain[n])
            for n, loss in trace.losses.items()
            if n not in window.only
        ]
        harm = sum(each for each in added if each >= ELEVATED * abs(window.level))
        return self.share_gone(trace) - harm / (self.rise * len(window.only))

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
            self.answers[question] = run()
            self._keep()
        return self.answers[question]

    def _keep(self) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        answers = [_to_data(question, trace) for question, trace in self.answers.items()]
        write_json(self._cache, {"answers": answers})
        self._on_replay()


def _exact(trace: Trace) -> dict[int, str]:
    """Return losses as text that is equal only for equal bits; NaN equals NaN."""
    return {step: float(loss).hex() for step, loss in trace.losses.items()}


def _to_data(question: Question, trace: Trace) -> dict[str, Any]:
    return {
        "question": question.to_dict(),
        "losses": {str(step): text for step, text in _exact(trace).items()},
        "sites": [[site.fqn, site.role, asdict(count)] for site, count in trace.sites.items()],
        "underflowed": trace.underflowed,
        "elements": trace.elements,
        "seconds": trace.seconds,
        "underflow": [[site.fqn, site.role, share] for site, share in trace.underflow.items()],
    }


def _read(path: Path) -> dict[Question, Trace]:
    """Return the answers of a file; none where there is no such file or it is no longer ours."""
    try:
        kept = json.loads(path.read_bytes())["answers"]
        return {Question.from_dict(question): _to_trace(data) for question, data in _pairs(kept)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _pairs(kept: Any) -> Iterator[tuple[Any, Any]]:
    """Yield questions and answers; an earlier version kept answers by the question's name."""
    if isinstance(kept, Mapping):
        yield from (({"name": name}, data) for name, data in kept.items())
    else:
        yield from ((data["question"], data) for data in kept)


def _to_trace(data: Mapping[str, Any]) -> Trace:
    return Trace(
        losses={int(step): float.fromhex(text) for step, text in data["losses"].items()},
        sites={
            SiteName.from_dict({"fqn": fqn, "role": role}): SiteCount(**count)
            for fqn, role, count in data["sites"]
        },
        underflowed=data["underflowed"],
        elements=data["elements"],
        seconds=data["seconds"],
        underflow={
            SiteName.from_dict({"fqn": fqn, "role": role}): share
            for fqn, role, share in data.get("underflow", [])
        },
    )
