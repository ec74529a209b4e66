"""Does clamping at a site go with loss spikes, or a raised loss, more than chance would have it?

Each site is weighed twice (see `evidence`), and is named when what happened weighs more than the
heaviest site does at all but a few of the shifts (see `shifts`). The heaviest of all sites is
the measure, so the chance that anybody is named in a run without a culprit is bounded, however
many sites there are; a bound on that is also one on the false discovery rate.

Association is not cause: that is for a replay. What it says in words is in `sentences`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.evidence import Clamping, Weights, weigh
from unclamp.analysis.history import read_history
from unclamp.analysis.power import smallest_effects, to_change
from unclamp.analysis.response import make_response
from unclamp.analysis.sentences import Finding, describe
from unclamp.analysis.shifts import make_shifts
from unclamp.analysis.spikes import Spike, find_spikes
from unclamp.errors import AnalysisError
from unclamp.files import strict
from unclamp.runlog import RunLog
from unclamp.shown import Shown

MAX_LAG = 8
SHIFTS = 501
ALPHA = 0.05
GUARD = 0.4
"""Share of alpha that is spent: shifts stay local and are sampled, so the bound is approximate."""
TWO_SIDED_95 = 1.96
CLEARED = 0.02
"""A site whose interval ends at or below this rise of the loss is cleared; a share of it."""
LARGEST_LAG_SHARE = 10
"""Beyond one in so many steps a window of lags leaves too little of the run to compare with."""

Verdict = Literal["named", "none", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class SiteEvidence:
    """What a run shows about clamping at one site.

    Attributes:
        site: Id in the run; `fqn` and `role` name it.
        clamped_steps: Steps at which it clamped.
        followed: Of those, how many had a spike begin within the lags after them.
        hits: Spikes with clamping at this site within the lags before them.
        expected_hits: How many that would be by chance.
        lag: Steps from clamping to the spike at which the mean clamp error before spikes is
            largest; None without a hit.
        p: Chance that any site would look like this without a link, all sites counted.
        by: What it is named by, "spikes" or "loss"; None where it is not named.
        loss_change: Mean change of the loss just after clamping, a fraction (in the loss's own
            unit where it is not positive throughout); None where that is unknown.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        clamp_error: Mean clamp error over the clamped steps.
        sqnr_db: Least signal-to-noise ratio seen, decibel; None where none was measured.
        cleared: Whether the run shows it harmless: not named, `low` at most 0, `high` at most
            `CLEARED` (a share of the median size of the loss), not before every spike.
    """

    site: int
    fqn: str
    role: str
    clamped_steps: int
    followed: int
    hits: int
    expected_hits: float
    lag: int | None
    p: float
    by: Literal["spikes", "loss"] | None
    loss_change: float | None
    low: float | None
    high: float | None
    clamp_error: float
    sqnr_db: float | None = None
    cleared: bool = False


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
        level: A site is named where its `p` is at most this; a share of alpha.
        distinct_shifts: How many shifts differ.
        spikes_needed: Of the spikes, how many must have clamping before them for a typical site
            to be named; None where all would not do.
        loss_needed: Mean change of the loss after clamping at which a typical site is named, as
            `loss_change`; None where no change would do.
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
        AnalysisError: The run has no losses, no casts or no sites, or `max_lag` is
            above both 8 and a tenth of the steps.
        RunLogError: It cannot be read.
        ValueError: `max_lag` or `shifts` is below 1, or `alpha` not between 0 and 1.
    """
    history = read_history(log)
    steps = history.steps
    if spikes is None:
        spikes = find_spikes(history.loss.tolist(), steps=steps.tolist())
    return associate_series(
        history.clamping,
        history.loss,
        spikes=[_indexed(spike, steps) for spike in spikes],
        names=history.names,
        sqnr_db=history.sqnr_db,
        refusal=history.refusal,
        notes=history.notes,
        is_observed=log.header.observed,
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
        max_lag: As for `associate`, and so are the others.
        shifts: At most so many.
        alpha: Bound on the chance to name anybody without a link.
        seed: Of the draw of shifts.

    A NaN or Inf in `loss` counts as its highest value.

    Raises:
        AnalysisError: `max_lag` is above both 8 and a tenth of the steps.
        ValueError: `max_lag` or `shifts` is below 1, or `alpha` not between 0 and 1.
    """
    if max_lag < 1 or shifts < 1 or not 0 < alpha < 1:
        raise ValueError(
            f"max_lag and shifts must be at least 1 and alpha between 0 and 1, got "
            f"{max_lag}, {shifts} and {alpha}"
        )
    max_lag = _fitting_lag(max_lag, len(loss))
    onsets = np.array(sorted(onset for onset, _ in spikes), dtype=np.int64)
    in_spike = np.zeros(len(loss), dtype=bool)
    for onset, end in spikes:
        in_spike[onset : end + 1] = True
    response = make_response(loss, in_spike)
    moves = make_shifts(onsets, clamping.activity(), limit=shifts, seed=seed)
    weights = weigh(clamping, onsets, response, moves, max_lag=max_lag)
    level = GUARD * alpha
    is_relative = response is not None and response.is_relative
    power = smallest_effects(weights, len(onsets), clamping, moves, level, is_relative)
    evidence = _rank(weights, clamping, onsets, names, sqnr_db or {}, is_relative, max_lag, level)
    can_tell = refusal is None
    enough = can_tell and level * min(moves.distinct, len(moves.offsets)) >= 1
    if not enough:
        evidence = [replace(e, by=None) for e in evidence]
    else:
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


def _fitting_lag(max_lag: int, steps: int) -> int:
    """Return the lag to ask, cut to the run where even the default is longer than it."""
    largest = max(MAX_LAG, steps // LARGEST_LAG_SHARE)
    if max_lag > largest:
        raise AnalysisError(
            f"expected a max_lag of at most {largest} in a run of {steps:,} steps with a loss "
            f"(a tenth of them, or {MAX_LAG}), got {max_lag}"
        )
    return max(1, min(max_lag, steps - 1))


def _size(loss: NDArray[np.float64], is_relative: bool) -> float:
    """Return what a change of the loss is a share of, in the unit of such changes."""
    finite = loss[np.isfinite(loss)]
    return 1.0 if is_relative or not len(finite) else float(np.median(np.abs(finite)))


def _is_cleared(site: SiteEvidence, spikes: int, most: float) -> bool:
    if site.by is not None or site.low is None or site.high is None:
        return False
    return site.low <= 0 and site.high <= most and not 0 < spikes == site.hits


def _verdict(
    sites: list[SiteEvidence],
    power: tuple[int | None, float | None] | None,
    spikes: int,
    can_tell: bool,
) -> Verdict:
    """Return the verdict; `power` is None where nobody could be named whatever happened."""
    if any(site.by for site in sites):
        return "named"
    if can_tell and not sites:
        return "none"
    if power is None:
        return "cannot tell"
    # Without enough spikes the loss alone answers, and it must answer for every site.
    by_loss = power[1] is not None and (spikes == 0 or all(site.cleared for site in sites))
    return "none" if power[0] is not None or by_loss else "cannot tell"


def _indexed(spike: Spike, steps: NDArray[np.int64]) -> tuple[int, int]:
    onset, end = np.searchsorted(steps, [spike.onset, spike.end]).tolist()
    last = len(steps) - 1
    return min(onset, last), min(end, last)


def _rank(
    weights: Weights,
    clamping: Clamping,
    onsets: NDArray[np.int64],
    names: Sequence[tuple[int, str, str]],
    sqnr_db: dict[int, float],
    is_relative: bool,
    max_lag: int,
    level: float,
) -> list[SiteEvidence]:
    """Return the sites that clamped, heaviest first, then by how often they clamped."""
    highest = np.sort(weights.highest()) if clamping.sites else np.zeros(1)
    own = np.maximum(weights.spikes[:, 0], weights.loss[:, 0])
    p = 1 - np.searchsorted(highest, own, side="left") / len(highest)
    counts = clamping.counts()
    order = np.lexsort((np.arange(len(own)), -counts, -own))
    found = []
    for row in order[counts[order] > 0]:
        part = slice(clamping.starts[row], clamping.starts[row + 1])
        steps, errors = clamping.steps[part], clamping.errors[part]
        lags = range(int(clamping.first_lags[row]), max_lag + 1)
        by_spikes = weights.spikes[row, 0] >= weights.loss[row, 0]
        number, fqn, role = names[row]
        change, low, high = _interval(
            float(weights.excess[row]), float(weights.excess_sd[row]), is_relative
        )
        found.append(
            SiteEvidence(
                site=number,
                fqn=fqn,
                role=role,
                clamped_steps=len(steps),
                followed=_followed(steps, onsets, lags),
                hits=_hits(steps, onsets, lags),
                expected_hits=float(weights.expected[row]),
                lag=_peak_lag(steps, errors, onsets, lags),
                p=float(p[row]),
                by=("spikes" if by_spikes else "loss") if p[row] <= level else None,
                loss_change=change,
                low=low,
                high=high,
                clamp_error=float(errors.mean()),
                sqnr_db=sqnr_db.get(number),
            )
        )
    return found


def _hits(steps: NDArray[np.int64], onsets: NDArray[np.int64], lags: range) -> int:
    """Return how many onsets have one of `steps` at one of the lags before them."""
    return int(np.isin(onsets[:, None] - np.array(lags), steps).any(axis=1).sum())


def _followed(steps: NDArray[np.int64], onsets: NDArray[np.int64], lags: range) -> int:
    return int(np.isin(steps[:, None] + np.array(lags), onsets).any(axis=1).sum())


def _peak_lag(
    steps: NDArray[np.int64], errors: NDArray[np.float64], onsets: NDArray[np.int64], lags: range
) -> int | None:
    """Return the lag at which the event-synchronous average of the clamp error is largest."""
    sums = [errors[np.isin(steps, onsets - lag)].sum() for lag in lags]
    return lags[int(np.argmax(sums))] if max(sums, default=0) > 0 else None


def _interval(
    mean: float, sd: float, is_relative: bool
) -> tuple[float, float, float] | tuple[None, None, None]:
    if not np.isfinite(mean) or not sd > 0:
        return None, None, None
    ends = [mean, mean - TWO_SIDED_95 * sd, mean + TWO_SIDED_95 * sd]
    change, low, high = (to_change(x, is_relative) for x in ends)
    return change, low, high
