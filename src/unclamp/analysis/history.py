"""What a run recorded of loss and clamping, on one axis of steps, and what is missing from it.

Steps and loss are those of the run's curve, so that an association and a report tell of the same
run. A step that was recorded again after the run went back counts as it was recorded last. What
the record cannot answer is said here, in words; the question itself is for `association`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.curves import run_curve
from unclamp.analysis.evidence import Clamping
from unclamp.errors import AnalysisError
from unclamp.runlog import RunLog

EFFECT_LAG = {"grad_output": 1}
"""A gradient is cast after the loss of its step is known; other operands act at once."""
MOST_LEFT_OUT = 0.5
"""With a larger share of the clamped steps without a loss, nothing can be told."""
MOST_GAPS = 0.1
"""With a larger share of steps that do not follow the one before, a lag is no count of steps."""
_NEAR = 100
"""Steps apart within which casts that were recorded again are read at one go."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Loss and clamping of one run.

    Attributes:
        steps: Those with a loss, rising.
        loss: One for each of them, the mean over ranks; NaN and Inf stay.
        clamping: At those steps, one row a site.
        names: Id, fqn and role of each site.
        sqnr_db: Least signal-to-noise ratio by site, where it was measured; decibel.
        refusal: Why nothing can be told from this record, a sentence; None where something can.
        notes: What else to know of the record, a sentence each.
    """

    steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    clamping: Clamping
    names: list[tuple[int, str, str]]
    sqnr_db: dict[int, float]
    refusal: str | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Clamped:
    """Where anything was clamped: ordered by site, then step, each pair once."""

    site: NDArray[np.int64]
    step: NDArray[np.int64]
    error: NDArray[np.float64]


def read_history(log: RunLog) -> History:
    """Read what an association needs.

    Raises:
        AnalysisError: There are no losses, no casts or no sites, or the ranks recorded different
            modules.
        RunLogError: The run cannot be read.
    """
    steps, loss = _read_loss(log)
    if not log.sql("SELECT 1 FROM casts LIMIT 1").num_rows:
        raise AnalysisError(
            f"expected casts in {log.path}, but it has none: it trained without FP8 casts, or "
            "was stopped before the first were written"
        )
    if log.has_mixed_sites:
        raise AnalysisError(
            f"expected one module behind each site of {log.path}, but its ranks recorded "
            "different modules under the same site: association cannot tell them apart; record "
            "each such rank as a run of its own"
        )
    rows = log.sql("SELECT DISTINCT site, fqn, role FROM sites ORDER BY site").to_pylist()
    if not rows:
        raise AnalysisError(
            f"expected the sites of {log.path} beside its casts, but it has none: its folder "
            "`sites` is missing or empty; copy the run again, with all of its folders"
        )
    names = [(row["site"], row["fqn"], row["role"]) for row in rows]
    clamped = _read_clamped(log)
    known = np.isin(clamped.step, steps)
    refusals, notes = _judge_steps(steps, clamped.step, known)
    if (sparse := _judge_cadence(log)) is not None:
        refusals.insert(0, sparse)
    return History(
        steps=steps,
        loss=loss,
        clamping=_to_clamping(clamped, known, steps, names),
        names=names,
        sqnr_db=_read_sqnr(log),
        refusal=refusals[0] if refusals else None,
        notes=notes + refusals[1:],
    )


def _read_loss(log: RunLog) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if not log.sql("SELECT 1 FROM steps WHERE loss IS NOT NULL LIMIT 1").num_rows:
        raise AnalysisError(
            f"expected losses in {log.path}, but it has none: give them to "
            "`recorder.step(loss=...)`"
        )
    curve = run_curve(log)
    known = [value is not None for value in curve.series["loss"]]
    loss = np.array([value for value in curve.series["loss"] if value is not None])
    return curve.steps[known].astype(np.int64), loss.astype(np.float64)


def _judge_steps(
    steps: NDArray[np.int64], clamped: NDArray[np.int64], known: NDArray[np.bool_]
) -> tuple[list[str], list[str]]:
    """Return what forbids an answer and what to know, of steps without a loss."""
    refusals, notes = [], []
    every, left_out = len(np.unique(clamped)), len(np.unique(clamped[~known]))
    if left_out:
        said = (
            f"Of the {every:,} steps at which anything was clamped, {left_out:,} have no recorded "
            "loss, or the run went back behind them, and are left out"
        )
        too_many = left_out > MOST_LEFT_OUT * every
        remedy = ": give `recorder.step` the loss of every step." if too_many else "."
        (refusals if too_many else notes).append(said + remedy)
    gaps = int(np.sum(np.diff(steps) != 1))
    if gaps:
        said = f"{gaps:,} of {len(steps):,} recorded losses do not follow on the step before"
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
    cadence = log.header.metadata.get("cadence")
    casts = cadence.get("casts") if isinstance(cadence, dict) else None
    if not isinstance(casts, dict) or casts.get("or_clamped"):
        return None
    every = casts.get("steps")
    if not isinstance(every, int) or every <= 1:
        return None
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
        "SELECT site, step, max(saturated_error) AS error FROM casts WHERE saturated > 0 "
        f"AND saturated_error > 0 AND NOT ({again}) GROUP BY site, step"
    )
    parts = [tuple(once[name].to_numpy() for name in ("site", "step", "error"))]
    if ranges:
        parts.append(_read_last(log, again))
    site, step, error = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((step, site))
    site, step, error = site[order], step[order], error[order].astype(np.float64)
    is_new = (np.diff(site) != 0) | (np.diff(step) != 0)
    starts = np.append(0, np.flatnonzero(is_new) + 1)[: len(site)]
    error = np.maximum.reduceat(error, starts) if len(site) else error
    return _Clamped(site=site[starts].astype(np.int64), step=step[starts], error=error)


def _read_last(log: RunLog, where: str) -> tuple[NDArray, NDArray, NDArray]:
    """Return the clamped of the last recordings of each step, rank and site."""
    rows = log.sql(
        "SELECT site, step, rank, if(saturated > 0, saturated_error, 0) AS error "
        f"FROM casts WHERE {where}"
    )
    site, step, rank, error = (rows[name].to_numpy() for name in ("site", "step", "rank", "error"))
    order = np.lexsort((rank, step, site))  # stable: the last of equal ones was written last
    keys = np.stack([site, step, rank])[:, order]
    is_last = np.append(np.any(np.diff(keys, axis=1) != 0, axis=0), True)[: len(order)]
    kept = order[is_last]
    kept = kept[error[kept] > 0]
    return site[kept], step[kept], error[kept]


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
    names: list[tuple[int, str, str]],
) -> Clamping:
    ids = np.array([site for site, _, _ in names], dtype=np.int64)
    known = known & np.isin(clamped.site, ids)
    row = np.searchsorted(ids, clamped.site[known])
    return Clamping(
        starts=np.searchsorted(row, np.arange(len(ids) + 1)),
        steps=np.searchsorted(steps, clamped.step[known]),
        errors=clamped.error[known],
        first_lags=np.array([EFFECT_LAG.get(role, 0) for _, _, role in names], dtype=np.int64),
        length=len(steps),
    )


def _read_sqnr(log: RunLog) -> dict[int, float]:
    rows = log.sql(
        "SELECT site, min(sqnr_db) AS sqnr FROM casts WHERE sqnr_db IS NOT NULL "
        "AND isfinite(sqnr_db) GROUP BY site"
    ).to_pylist()
    return {row["site"]: row["sqnr"] for row in rows}
