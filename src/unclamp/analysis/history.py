"""What a run recorded of loss and clamping, on one axis of steps, and what is missing from it.

Steps and loss are those of the run's curve, so that an association and a report tell of the same
run. A step that was recorded again after the run went back counts as it was recorded last. What
the record cannot answer is said here, in words; the question itself is for `association`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.curves import Losses, run_losses
from unclamp.analysis.evidence import Clamping
from unclamp.analysis.groups import Group
from unclamp.errors import AnalysisError
from unclamp.runlog import COMPUTED_SQL, RunLog, SiteInfo, thinned_words
from unclamp.totals import CLAMPED_SQL, LOST_SQL, UNDECIDED_SQL
from unclamp.written import counted

EFFECT_LAG = {"grad_output": 1}
"""A gradient is cast after the loss of its step is known; other operands act at once."""
MOST_LEFT_OUT = 0.5
"""With a larger share of the clamped steps without a loss, nothing can be told."""
MOST_GAPS = 0.1
"""With a larger share of steps that do not follow the one before, a lag is no count of steps."""
_PLACES = f"WITH places AS MATERIALIZED (SELECT rank, site, place FROM ({COMPUTED_SQL}))"
_NEAR = 100
"""Steps apart within which casts that were recorded again are read at one go."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Loss and clamping of one run.

    Attributes:
        steps: Those with a loss, rising.
        loss: One for each of them, the mean over ranks; NaN and Inf stay.
        groups: The kind of each step's batch; empty where no step has one.
        lr: Learning rate of each, NaN where it is not known; None without any. Ranks share it.
        clamping: At those steps, one row a site.
        names: Id, fqn and role of each site, ranks taken together; of several ids the lowest.
        sqnr_db: Least signal-to-noise ratio by that id, where it was measured; decibel.
        is_counted: Whether elements were counted; else the errors of `clamping` only order it.
        refusal: Why nothing can be told from this record, a sentence; None where something can.
        notes: What else to know of the record, a sentence each.
    """

    steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    groups: list[Group]
    lr: NDArray[np.float64] | None
    clamping: Clamping
    names: list[tuple[int, str, str]]
    sqnr_db: dict[int, float]
    is_counted: bool
    refusal: str | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Clamped:
    """Where anything was clamped: ordered by place of the site, then step, each pair once."""

    place: NDArray[np.int64]
    step: NDArray[np.int64]
    error: NDArray[np.float64]


def has_casts(log: RunLog) -> bool:
    """Return whether a run recorded any cast."""
    return log.sql("SELECT 1 FROM casts LIMIT 1").num_rows > 0


def read_history(log: RunLog) -> History:
    """Read what an association needs.

    Raises:
        AnalysisError: There are no losses or no sites.
        RunLogError: The run cannot be read.
    """
    losses = _read_loss(log)
    steps, loss = np.array(losses.steps, dtype=np.int64), np.array(losses.values, dtype=np.float64)
    sites, named = log.computed_sites(), len(log.named_sites())
    if not named:
        raise AnalysisError(
            f"expected the sites of {log.path} beside its casts, but it has none: its folder "
            "`sites` is missing or empty; copy the run again, with all of its folders"
        )
    clamped = _read_clamped(log)
    known = np.isin(clamped.step, steps)
    refusals, notes = _judge_steps(steps, clamped.step, known)
    if (sparse := _judge_cadence(log)) is not None:
        refusals.insert(0, sparse)
    if (thinned := thinned_words(log.header.thinned)) is not None:
        notes.append(f"{thinned} No clamped cast is missing.")
    if only_counted := named - len(sites):
        notes.append(
            f"{counted(only_counted, 'site is', 'sites are')} left out, since nothing is computed "
            "from the casts there: they are only counted."
        )
    if (undecided := _count_undecided(log)) and not len(clamped.step):
        refusals.append(
            f"of {counted(undecided, 'recorded cast')} nobody knows whether they clamped, and none "
            "of the others did."
        )
    elif undecided:
        notes.append(
            f"Of {counted(undecided, 'recorded cast')} nobody knows whether they clamped: here "
            "they count as casts that did not."
        )
    return History(
        steps=steps,
        loss=loss,
        groups=losses.groups,
        lr=_read_lr(log, steps),
        clamping=_to_clamping(clamped, known, steps, sites),
        names=[(site.site, site.fqn, site.role) for site in sites],
        sqnr_db=_read_sqnr(log, sites),
        is_counted=log.header.counts == "elements",
        refusal=refusals[0] if refusals else None,
        notes=notes + refusals[1:],
    )


def _count_undecided(log: RunLog) -> int:
    """Return how many recorded casts, of which anything is computed, may have clamped or not."""
    if log.header.counts == "elements":
        return 0
    (found,) = log.sql(
        f"{_PLACES} SELECT count(*) AS n FROM casts JOIN places USING (rank, site) "
        f"WHERE {UNDECIDED_SQL}"
    ).to_pylist()
    return found["n"]


def _read_loss(log: RunLog) -> Losses:
    if not log.sql("SELECT 1 FROM steps WHERE loss IS NOT NULL LIMIT 1").num_rows:
        raise AnalysisError(
            f"expected losses in {log.path}, but it has none: give them to "
            "`recorder.step(loss=...)`"
        )
    return run_losses(log)


def _read_lr(log: RunLog, steps: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Return the learning rate of each step, that which was recorded last."""
    rows = log.sql("SELECT step, lr FROM steps WHERE lr IS NOT NULL AND isfinite(lr)")
    if not rows.num_rows:
        return None
    lr = dict(zip(rows["step"].to_pylist(), rows["lr"].to_pylist(), strict=True))
    return np.array([lr.get(step, np.nan) for step in steps.tolist()])


def _judge_steps(
    steps: NDArray[np.int64], clamped: NDArray[np.int64], known: NDArray[np.bool_]
) -> tuple[list[str], list[str]]:
    """Return what forbids an answer and what to know, of steps without a loss."""
    refusals, notes = [], []
    every, left_out = len(np.unique(clamped)), len(np.unique(clamped[~known]))
    if left_out:
        said = (
            f"Of the {counted(every, 'step')} at which anything was clamped, "
            f"{counted(left_out, 'has', 'have')} no recorded loss, or the run went back behind "
            f"{'it, and is' if left_out == 1 else 'them, and are'} left out"
        )
        too_many = left_out > MOST_LEFT_OUT * every
        remedy = ": give `recorder.step` the loss of every step." if too_many else "."
        (refusals if too_many else notes).append(said + remedy)
    gaps = int(np.sum(np.diff(steps) != 1))
    if gaps:
        said = f"{gaps:,} of {counted(len(steps), 'recorded loss', 'recorded losses')} "
        said += f"{'does' if gaps == 1 else 'do'} not follow on the step before"
        if gaps > MOST_GAPS * len(steps):
            refusals.append(
                f"{said}, so that a lag is no number of steps: give `recorder.step` the loss of "
                "every step."
            )
        else:
            notes.append(f"{said}: there a lag counts recorded losses, not steps.")
    return refusals, notes


def _judge_cadence(log: RunLog) -> str | None:
    """Return why casts were written too rarely to tell, None where they were not."""
    cadence = log.header.cadence
    if cadence is None or cadence.casts.or_clamped or not cadence.is_sparse:
        return None
    every = cadence.casts.steps
    return (
        f"Only every {every}-th step's casts were written, so that clamping in between is not "
        f"known; to ask this, record with casts=Every({every}, or_clamped=True)."
    )


def _read_clamped(log: RunLog) -> _Clamped:
    """Return where anything was clamped on any rank, with the largest error of the ranks.

    Steps that a rank recorded twice are those that `steps` has twice. Of these the last row of
    casts counts: parts are read in the order they were written in, and a merge keeps the order of
    rows of one site and step. If only `casts` has a step twice, its larger error counts.
    """
    ranges = _ranges(
        log.sql(
            "SELECT DISTINCT step FROM (SELECT step FROM steps GROUP BY step, rank "
            "HAVING count(*) > 1) ORDER BY step"
        )["step"].to_numpy()
    )
    again = " OR ".join(f"step BETWEEN {first} AND {last}" for first, last in ranges) or "false"
    once = log.sql(
        f"{_PLACES} SELECT place, step, max({LOST_SQL}) AS error "
        f"FROM clamped_casts JOIN places USING (rank, site) WHERE {CLAMPED_SQL} "
        f"AND {LOST_SQL} > 0 AND NOT ({again}) GROUP BY place, step"
    )
    parts = [tuple(once[name].to_numpy() for name in ("place", "step", "error"))]
    if ranges:
        parts.append(_read_last(log, again))
    place, step, error = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((step, place))
    place, step, error = place[order], step[order], error[order].astype(np.float64)
    is_new = (np.diff(place) != 0) | (np.diff(step) != 0)
    starts = np.append(0, np.flatnonzero(is_new) + 1)[: len(place)]
    error = np.maximum.reduceat(error, starts) if len(place) else error
    return _Clamped(place=place[starts].astype(np.int64), step=step[starts], error=error)


def _read_last(log: RunLog, where: str) -> tuple[NDArray, NDArray, NDArray]:
    """Return the clamped of the last recordings of each step, rank and site."""
    rows = log.sql(
        f"SELECT site, rank, step, if({CLAMPED_SQL}, {LOST_SQL}, 0) AS error "
        f"FROM casts WHERE {where}"
    )
    names = ("site", "rank", "step", "error")
    site, rank, step, error = (rows[name].to_numpy() for name in names)
    order = np.lexsort((rank, step, site))  # stable: the last of equal ones was written last
    keys = np.stack([site, step, rank])[:, order]
    is_last = np.append(np.any(np.diff(keys, axis=1) != 0, axis=0), True)[: len(order)]
    kept = order[is_last]
    kept = kept[error[kept] > 0]
    place = _places_of(log, site[kept], rank[kept])
    kept, place = kept[place >= 0], place[place >= 0]
    return place, step[kept], error[kept]


def _places_of(log: RunLog, site: NDArray, rank: NDArray) -> NDArray[np.int64]:
    """Return the place of each pair's name; -1 where `sites` has none for it."""
    rows = log.sql(f"{_PLACES} FROM places ORDER BY rank, site")
    known = rows["rank"].to_numpy().astype(np.int64) << 32 | rows["site"].to_numpy()
    asked = rank.astype(np.int64) << 32 | site
    at = np.searchsorted(known, asked)
    found = np.append(known, -1)[at] == asked
    return np.where(found, np.append(rows["place"].to_numpy(), -1)[at], -1)


def _ranges(steps: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return ranges that hold all of the rising `steps`, one for those near each other."""
    if not len(steps):
        return []
    cuts = np.flatnonzero(np.diff(steps) > _NEAR)
    firsts = steps[np.append(0, cuts + 1)].tolist()
    return list(zip(firsts, steps[np.append(cuts, len(steps) - 1)].tolist(), strict=True))


def _to_clamping(
    clamped: _Clamped,
    known: NDArray[np.bool_],
    steps: NDArray[np.int64],
    sites: list[SiteInfo],
) -> Clamping:
    return Clamping(
        starts=np.searchsorted(clamped.place[known], np.arange(len(sites) + 1)),
        steps=np.searchsorted(steps, clamped.step[known]),
        errors=clamped.error[known],
        first_lags=np.array([EFFECT_LAG.get(site.role, 0) for site in sites], dtype=np.int64),
        length=len(steps),
    )


def _read_sqnr(log: RunLog, sites: list[SiteInfo]) -> dict[int, float]:
    rows = log.sql(
        f"{_PLACES} SELECT place, min(least) AS sqnr_db FROM ("
        "SELECT rank, site, min(sqnr_db_min) AS least FROM coarsest_summaries GROUP BY rank, site "
        "UNION ALL SELECT rank, site, min(sqnr_db) AS least FROM casts_without_summary "
        "GROUP BY rank, site"
        ") JOIN places USING (rank, site) WHERE isfinite(least) GROUP BY place"
    ).to_pydict()
    pairs = zip(rows["place"], rows["sqnr_db"], strict=True)
    return {sites[place].site: sqnr_db for place, sqnr_db in pairs}
