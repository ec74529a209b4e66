"""From further and further back: does the spike go if clamping ends earlier?

A clamp long before a spike can be its cause, through a weight that it bent or through what it left
in the optimizer. So where too little of a spike goes with the clamps shortly before it, the same
is asked from older snapshots, the latest first: they lie at growing distances, so all of them
together cost about twice the oldest alone, and the first that answers is the cheapest to go on
from. Those between which the log shows nothing clamped are passed over: nothing would change.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from unclamp.analysis.explanation import CLAMPING, MOST, NOT_CLAMPING, Verdict
from unclamp.analysis.horizon import Asked, Clamped, Horizon, Stop
from unclamp.errors import ReplayError
from unclamp.explain.attribution import ENOUGH
from unclamp.explain.game import BudgetSpent
from unclamp.explain.noise import Noise
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.start import Start

NO_NOISE = Noise(moved=(0.0,))
"""Where it was not asked."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What goes of a spike with nothing clamped from a start on, and what placebos move."""

    start: Start
    gone: float
    noise: Noise


def judged(gone: float, noise: Noise) -> Verdict:
    """Return what follows from the share that goes with nothing clamped.

    What placebos move may hide a share as large, so less than that is no sign of clamping; nor is
    it a sign of another cause, if it could hide most of the spike. A spike that does not come back
    with most placebos is chance itself.
    """
    if noise.typical >= MOST:
        return "cannot tell"
    if gone < max(NOT_CLAMPING, noise.limit):
        return "cannot tell" if gone + noise.limit >= MOST else "not clamping"
    if gone >= CLAMPING:
        return "clamping"
    return "mostly clamping" if gone >= MOST else "partly clamping"


class Backwards:
    """The starts that were asked, and the best of the answers.

    Args:
        first: The answer from the latest start.
        clamped_before: What the log says was clamped before a step; None if it is not known.
        begin: Makes a start of a snapshot.
        on_answer: Called with the horizon after each answer.
        is_measurable: Whether calm steps lie between a step and the spike. Without one a part of
            the spike is not told from a better training, so that no start before it is asked.

    Attributes:
        best: The answer by which most goes; of like ones the latest.
        horizon: How far back was asked.
    """

    def __init__(
        self,
        first: Answer,
        *,
        clamped_before: Callable[[int], Clamped] | None,
        begin: Callable[[Snapshot], Start],
        on_answer: Callable[[Horizon], None],
        is_measurable: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self.best = first
        self._is_measurable = is_measurable
        self._first, self._begin = first.start, begin
        self._clamped_before, self._on_answer = clamped_before, on_answer
        self.horizon = Horizon(asked=())
        self._extend(first)

    def ask(self, older: Iterable[Snapshot]) -> None:
        """Ask from older snapshots, the latest first, as far as it may matter."""
        self._reach_to("found" if self.best.gone >= ENOUGH else self._ask(older))

    def _ask(self, older: Iterable[Snapshot]) -> Stop:
        is_free, is_measured = False, True
        try:
            for snapshot in older:
                clamped = self.horizon.clamped
                if not self.horizon.is_open:
                    return "nothing clamped"
                if clamped is not None and _is_free_from(clamped, snapshot.step):
                    is_free = clamped.last is None
                    continue
                is_free, is_measured = False, self._is_measurable(snapshot.step)
                if not is_measured:
                    continue
                if snapshot.facts["sites"] != self._first.snapshot.facts["sites"]:
                    return "scaling changed"
                start = self._begin(snapshot)
                if not start.comes_back(start.plain()):
                    return "not reproduced"
                if not self._hear(start):
                    return "chaos"
                if self.best.gone >= ENOUGH:
                    return "found"
        except BudgetSpent:
            return "budget"
        except ReplayError:
            return "unreadable"
        if is_free:
            return "nothing clamped"
        return "no older snapshot" if is_measured else "no calm step"

    def _hear(self, start: Start) -> bool:
        """Take an older answer, and return whether chaos lets it be used.

        An answer that would change the verdict counts if placebos do not move as much. A negative
        verdict reaches as far back as this start only if it follows from this answer too.
        """
        gone, best = start.without_clamping(), self.best.gone
        is_much = (
            gone >= best + NOT_CLAMPING or gone >= NOT_CLAMPING > best or gone >= CLAMPING > best
        )
        is_negative = judged(best, self.best.noise) == "not clamping"
        noise = NO_NOISE
        if is_much or is_negative:
            self._hide(start, gone)  # what was seen is not lost where no placebo can be afforded
            noise = start.noise()
        answer = Answer(start=start, gone=gone, noise=noise)
        verdict = judged(gone, noise)
        if is_much and gone > best + noise.limit and verdict not in ("cannot tell", "not clamping"):
            self.best = answer
        elif is_much or is_negative:
            is_told = verdict == "not clamping" if is_negative else gone <= best + NOT_CLAMPING
            if not is_told:
                return False
        self._extend(answer)
        return True

    def _hide(self, start: Start, gone: float) -> None:
        self.horizon = replace(self.horizon, hidden=_asked(start, gone))
        self._on_answer(self.horizon)

    def _extend(self, answer: Answer) -> None:
        asked = _asked(answer.start, answer.gone)
        before = self._clamped_before
        self.horizon = Horizon(
            asked=(*self.horizon.asked, asked),
            clamped=None if before is None else before(asked.step),
        )
        self._on_answer(self.horizon)

    def _reach_to(self, stop: Stop) -> None:
        is_closed = stop == "no older snapshot" and not self.horizon.is_open
        self.horizon = replace(self.horizon, stop="nothing clamped" if is_closed else stop)
        self._on_answer(self.horizon)


def _asked(start: Start, gone: float) -> Asked:
    return Asked(step=start.snapshot.step, steps=start.steps, removed=gone)


def _is_free_from(clamped: Clamped, step: int) -> bool:
    """Whether the log shows that nothing clamped between a step and what was asked."""
    return clamped.covers(step) and (clamped.last is None or clamped.last < step)
