"""Does clamping at a site go with loss spikes, or a raised loss, more than chance would have it?

Each site is weighed twice (see `evidence`), and is named when what happened weighs more than the
heaviest site does at all but a few of the shifts (see `shifts`), unless a schedule that clamping
and loss both follow would look like it (see `schedules`). The heaviest of all sites is the
measure, so the chance that anybody is named in a run without a culprit is bounded, however
many sites there are; a bound on that is also one on the false discovery rate.

Association is not cause: that is for a replay. What it says in words is in `sentences`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.evidence import Clamping, Weights, weigh
from unclamp.analysis.groups import Group, has_kinds, kind_in_words, split_places
from unclamp.analysis.history import has_casts, read_history
from unclamp.analysis.kind_shifts import make_kind_shifts
from unclamp.analysis.power import smallest_effects
from unclamp.analysis.ranking import SiteEvidence, rank_sites
from unclamp.analysis.response import Response, make_response
from unclamp.analysis.schedules import (
    Doubted,
    Schedule,
    doubt_loss,
    doubt_spikes,
    read_schedule,
)
from unclamp.analysis.sentences import Finding, describe, without_casts
from unclamp.analysis.shifts import make_shifts
from unclamp.analysis.spikes import Spike, find_spikes
from unclamp.errors import AnalysisError
from unclamp.files import strict
from unclamp.runlog import RunLog
from unclamp.shown import Shown
from unclamp.written import counted, listed

MAX_LAG = 8
SHIFTS = 501
ALPHA = 0.05
GUARD = 0.4
"""Share of alpha that is spent: shifts stay local and are sampled, so the bound is approximate."""
CLEARED = 0.02
"""A site whose `bound` is at or below this rise of the loss is cleared; a share of it."""
MOST_KINDS = 6
"""Kinds of batches that a sentence tells of."""
LARGEST_LAG_SHARE = 10
"""Beyond one in so many steps a window of lags leaves too little of the run to compare with."""

Verdict = Literal["named", "none", "cannot tell"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Association(Shown):
    """Whether clamping goes with spikes or a raised loss in one run.

    Attributes:
        verdict: "named": some sites have evidence. "none": none has, and the run could have
            shown it, by a typical site before its spikes or by clearing every site. "cannot
            tell": it could not have.
        sites: Sites that clamped, strongest evidence first.
        all_sites: Sites recorded.
        spikes: How many spikes were asked about.
        steps: Steps with a recorded loss.
        max_lag: Steps within which clamping counts as before a spike.
        alpha: Bound on the chance to name anybody without a link.
        level: A site is named where its `p` is at most this, unless there is a `doubt`; a share
            of alpha.
        distinct_shifts: How many shifts differ.
        spikes_needed: Of the spikes, how many must have clamping before them for a typical site
            to be named; None where all would not do.
        loss_needed: Mean change of the loss after clamping at which a typical site is named, as
            `loss_change`; None where no change would do, as where it clamps in fewer than nine
            places.
        is_relative: Whether changes of the loss are fractions; else in the loss's own unit.
        is_observed: Whether nothing was cast in the training: clamping is what FP8 would have
            done, and cannot have moved the loss.
        sentences: All that in words.
    """

    verdict: Verdict
    sites: list[SiteEvidence]
    all_sites: int
    spikes: int
    steps: int
    max_lag: int
    alpha: float
    level: float
    distinct_shifts: int
    spikes_needed: int | None
    loss_needed: float | None
    is_relative: bool
    is_observed: bool
    sentences: list[str]

    def __str__(self) -> str:
        return "\n".join(f"- {sentence}" for sentence in self.sentences)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, ready for strict JSON: None for what is not finite."""
        return strict(asdict(self))


def associate(
    log: RunLog,
    *,
    spikes: Sequence[Spike] | None = None,
    max_lag: int = MAX_LAG,
    shifts: int = SHIFTS,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Association:
    """Ask a run, finished or not, whether clamping at a site goes with its spikes.

    Args:
        log: With losses and casts.
        spikes: Those of the loss, as `find_spikes` finds them, without this.
        max_lag: Clamping counts as before a spike within so many steps, at least 1.
        shifts: How many shifts to draw at most.
        alpha: Bound on the chance to name anybody in a run without a link.
        seed: Of that draw; the same seed gives the same answer.

    Raises:
        AnalysisError: The run has casts, but no losses or no sites, or `max_lag` is above both 8
            and a tenth of the steps. Of a run without casts the answer says so.
        RunLogError: It cannot be read.
        ValueError: `max_lag` or `shifts` is below 1, or `alpha` not between 0 and 1.
    """
    if not has_casts(log):
        return _without_casts(log, max_lag=max_lag, alpha=alpha)
    history = read_history(log)
    steps = history.steps
    if spikes is None:
        spikes = find_spikes(history.loss.tolist(), steps=steps.tolist(), groups=history.groups)
    return associate_series(
        history.clamping,
        history.loss,
        spikes=[_indexed(spike, steps) for spike in spikes],
        names=history.names,
        sqnr_db=history.sqnr_db,
        refusal=history.refusal,
        notes=history.notes,
        is_observed=log.header.observed,
        is_counted=history.is_counted,
        lr=history.lr,
        groups=history.groups,
        max_lag=max_lag,
        shifts=shifts,
        alpha=alpha,
        seed=seed,
    )


def associate_series(
    clamping: Clamping,
    loss: NDArray[np.float64],
    *,
    spikes: Sequence[tuple[int, int]],
    names: Sequence[tuple[int, str, str]],
    sqnr_db: dict[int, float] | None = None,
    refusal: str | None = None,
    notes: Sequence[str] = (),
    is_observed: bool = False,
    is_counted: bool = True,
    lr: NDArray[np.float64] | None = None,
    groups: Sequence[Group] = (),
    max_lag: int = MAX_LAG,
    shifts: int = SHIFTS,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Association:
    """Ask arrays what `associate` asks a run.

    Args:
        clamping: Of all sites.
        loss: One a step.
        spikes: First and last index of each in `loss`.
        names: Id, fqn and role of each row of `clamping`.
        sqnr_db: Least signal-to-noise ratio by id, where it was measured.
        refusal: Why these arrays cannot tell, a sentence: then nobody is named.
        notes: Further sentences for the answer.
        is_observed: Whether the clamping is only what FP8 would have done.
        is_counted: Whether the errors of `clamping` are clamp errors; else they only order it, and
            the answer tells none.
        lr: Learning rate of each step, NaN where it is not known: its jumps are a schedule.
        groups: The kind of each step's batch: a loss is compared with those of its own kind.
            Without them all are of one kind.
        max_lag: As for `associate`, and so are the others.
        shifts: At most so many.
        alpha: Bound on the chance to name anybody without a link.
        seed: Of the draw of shifts.

    A NaN or Inf in `loss` counts as its highest value.

    Raises:
        AnalysisError: `max_lag` is above both 8 and a tenth of the steps.
        ValueError: `max_lag` or `shifts` is below 1, `alpha` not between 0 and 1, or `groups` has
            another length than `loss`.
    """
    if max_lag < 1 or shifts < 1 or not 0 < alpha < 1:
        raise ValueError(
            f"max_lag and shifts must be at least 1 and alpha between 0 and 1, got "
            f"{max_lag}, {shifts} and {alpha}"
        )
    if groups and len(groups) != len(loss):
        raise ValueError(f"expected a group a loss, got {len(groups)} groups, {len(loss)} losses")
    max_lag = _fitting_lag(max_lag, len(loss))
    onsets = np.array(sorted(onset for onset, _ in spikes), dtype=np.int64)
    in_spike = _in_spikes(spikes, groups, len(loss))
    response = make_response(loss, in_spike, groups)
    activity = clamping.activity()
    if has_kinds(groups):
        moves = make_kind_shifts(onsets, activity, groups, limit=shifts, seed=seed)
        notes = [*notes, *_about_kinds(groups, level=GUARD * alpha)]
    else:
        moves = make_shifts(onsets, activity, limit=shifts, seed=seed)
    weights = weigh(clamping, onsets, response, moves, max_lag=max_lag)
    level = GUARD * alpha
    is_relative = response is not None and response.is_relative
    power = smallest_effects(weights, len(onsets), clamping, moves, level, is_relative)
    evidence = rank_sites(
        weights, clamping, onsets, names, sqnr_db or {}, is_relative, max_lag, level
    )
    if not is_counted:
        evidence = [replace(e, clamp_error=None) for e in evidence]
    can_tell = refusal is None
    enough = can_tell and level * min(moves.distinct, len(moves.offsets)) >= 1
    if not enough:
        evidence = [replace(e, by=None) for e in evidence]
    else:
        if any(e.by for e in evidence):
            schedule = read_schedule(response, lr, len(loss))
            rows = {number: row for row, (number, _, _) in enumerate(names)}
            doubts = _Doubts(schedule, clamping, response, onsets, weights, max_lag, level)
            evidence = [doubts.judge(e, rows[e.site]) if e.by else e for e in evidence]
        most = CLEARED * _size(loss, is_relative)
        evidence = [replace(e, cleared=_is_cleared(e, len(onsets), most)) for e in evidence]
    fields: dict[str, Any] = {
        "verdict": _verdict(evidence, power if enough else None, len(onsets), can_tell),
        "sites": evidence,
        "all_sites": len(names),
        "spikes": len(onsets),
        "steps": len(loss),
        "max_lag": max_lag,
        "distinct_shifts": moves.distinct,
        "spikes_needed": power[0] if enough else None,
        "loss_needed": power[1] if enough else None,
        "is_relative": is_relative,
        "is_observed": is_observed,
    }
    finding = Finding(
        **fields,
        enough=enough,
        shifts_needed=int(np.ceil(1 / level)),
        period=moves.period,
        refusal=refusal,
        notes=list(notes),
    )
    return Association(**fields, alpha=alpha, level=level, sentences=describe(finding))


def _in_spikes(
    spikes: Sequence[tuple[int, int]], groups: Sequence[Group], length: int
) -> NDArray[np.bool_]:
    """Return which steps belong to a spike: only those whose batch is of its kind."""
    inside = np.zeros(length, dtype=bool)
    for onset, end in spikes:
        for i in range(onset, end + 1):
            inside[i] |= not groups or groups[i] == groups[onset]
    return inside


def _about_kinds(groups: Sequence[Group], *, level: float) -> list[str]:
    """Say that losses are compared within kinds, and of which kinds nothing can be told."""
    sizes = {group: len(places) for group, places in split_places(groups).items()}
    few = [group for group, size in sizes.items() if size * level < 1]
    said = [
        "Each loss was compared with those of its own kind of batch "
        f"({listed([f'{kind_in_words(g)}: {n:,}' for g, n in sizes.items()])})."
        if len(sizes) <= MOST_KINDS
        else f"Each loss was compared with those of its own kind of batch, of {len(sizes)} kinds."
    ]
    if few:
        which = listed([kind_in_words(group) for group in few[:MOST_KINDS]])
        more = "" if len(few) <= MOST_KINDS else f" and of {len(few) - MOST_KINDS} more kinds"
        said.append(
            f"Of {which}{more} there are fewer than {int(np.ceil(1 / level))}: a link with "
            "clamping that is only among these cannot be told from chance."
        )
    return said


def _without_casts(log: RunLog, *, max_lag: int, alpha: float) -> Association:
    """Return the answer of a run in which nothing was cast: one sentence."""
    is_over, is_plain = log.header.status == "finished", log.header.plain
    return Association(
        verdict="none" if is_over and is_plain else "cannot tell",
        sites=[],
        all_sites=0,
        spikes=0,
        steps=log.sql("SELECT count(DISTINCT step) AS n FROM steps WHERE loss IS NOT NULL")[
            "n"
        ].to_pylist()[0],
        max_lag=max_lag,
        alpha=alpha,
        level=GUARD * alpha,
        distinct_shifts=0,
        spikes_needed=None,
        loss_needed=None,
        is_relative=False,
        is_observed=log.header.observed,
        sentences=[without_casts(is_over=is_over, is_plain=is_plain)],
    )


@dataclass(frozen=True)
class _Doubts:
    """What judges named sites by the schedule of their run."""

    schedule: Schedule
    clamping: Clamping
    response: Response | None
    onsets: NDArray[np.int64]
    weights: Weights
    max_lag: int
    level: float

    def judge(self, named: SiteEvidence, row: int) -> SiteEvidence:
        """Return the site by what no schedule explains; unnamed, with the doubt, without such."""
        order: list[Literal["spikes", "loss"]] = ["spikes", "loss"]
        if named.by == "loss":
            order.reverse()
        doubt = None
        for by in order:
            if by != named.by and self._p(by, row) > self.level:
                continue
            found = self._doubt(by, row)
            if found is None:
                return replace(named, by=by)
            doubt = doubt or found
        return replace(named, by=None, doubt=doubt.doubt, period=doubt.period) if doubt else named

    def _p(self, by: Literal["spikes", "loss"], row: int) -> float:
        own = (self.weights.spikes if by == "spikes" else self.weights.loss)[row, 0]
        return float(np.mean(self.weights.highest() >= own))

    def _doubt(self, by: Literal["spikes", "loss"], row: int) -> Doubted | None:
        schedule, clamping, lag = self.schedule, self.clamping, self.max_lag
        if by == "spikes" or self.response is None:
            return doubt_spikes(schedule, clamping, row, self.onsets, max_lag=lag, level=self.level)
        return doubt_loss(schedule, clamping, row, self.response, max_lag=lag)


def _fitting_lag(max_lag: int, steps: int) -> int:
    """Return the lag to ask, cut to the run where even the default is longer than it."""
    largest = max(MAX_LAG, steps // LARGEST_LAG_SHARE)
    if max_lag > largest:
        raise AnalysisError(
            f"expected a max_lag of at most {largest} in a run of {counted(steps, 'step')} with a "
            f"loss (a tenth of them, or {MAX_LAG}), got {max_lag}"
        )
    return max(1, min(max_lag, steps - 1))


def _size(loss: NDArray[np.float64], is_relative: bool) -> float:
    """Return what a change of the loss is a share of, in the unit of such changes."""
    finite = loss[np.isfinite(loss)]
    return 1.0 if is_relative or not len(finite) else float(np.median(np.abs(finite)))


def _is_cleared(site: SiteEvidence, spikes: int, most: float) -> bool:
    if site.by is not None or site.doubt or site.low is None or site.bound is None:
        return False
    return site.low <= 0 and site.bound <= most and not 0 < spikes == site.hits


def _verdict(
    sites: list[SiteEvidence],
    power: tuple[int | None, float | None] | None,
    spikes: int,
    can_tell: bool,
) -> Verdict:
    """Return the verdict; `power` is None where nobody could be named whatever happened."""
    if any(site.by for site in sites):
        return "named"
    if any(site.doubt for site in sites):
        return "cannot tell"
    if can_tell and not sites:
        return "none"
    if power is None:
        return "cannot tell"
    # Without enough spikes the loss alone answers: without any by what it would have shown, else
    # by clearing every site.
    by_loss = (spikes == 0 and power[1] is not None) or all(site.cleared for site in sites)
    return "none" if power[0] is not None or by_loss else "cannot tell"


def _indexed(spike: Spike, steps: NDArray[np.int64]) -> tuple[int, int]:
    onset, end = np.searchsorted(steps, [spike.onset, spike.end]).tolist()
    last = len(steps) - 1
    return min(onset, last), min(end, last)
