"""What the ranks of one run recorded apart: how each ended, what each overshot, who began when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unclamp.runlog.folder import Claim, read_claims
from unclamp.runlog.header import Attempt, Header
from unclamp.runlog.relations import Parts, first_steps
from unclamp.runlog.sites import PLACES_SQL, SiteInfo, over_ranks
from unclamp.runlog.windows import Cut, source_of
from unclamp.totals import CLAMPED_SQL, SCALED_AMAX_SQL


@dataclass(frozen=True, kw_only=True)
class RunAttempt:
    """One beginning of a run.

    Attributes:
        number: How often it had been begun before.
        created: When, ISO-8601 in UTC.
        world_size: Its ranks.
        first_step: The step it began with; None while it recorded none. Of earlier attempts no row
            from that step on is in any view.
        ended: How it ended, a status or "killed"; the run's status for the last one.
    """

    number: int
    created: str
    world_size: int
    first_step: int | None
    ended: str


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank's log ended.

    Attributes:
        rank: The rank.
        last_step: Its last one; None where it recorded none.
        closed: The status it was closed with; None where it was not.
        tells_of_close: Whether its writer would have said so.
    """

    rank: int
    last_step: int | None
    closed: str | None
    tells_of_close: bool


@dataclass(frozen=True, kw_only=True)
class RankOvershoot:
    """What one rank did at the sites that other ranks hold too.

    Attributes:
        rank: The rank.
        cells: Largest overshoot in each window; NaN in one without casts.
        worst: The site of the largest one.
        saturated: Finite elements that it clamped, but for those that a lower rank has clamped
            too; None where they were not counted.
        led: Share of windows and sites in which its amax was the largest, of those in which ranks
            differed; of equal ones that of the lowest rank counts.
    """

    rank: int
    cells: NDArray[np.float64]
    worst: SiteInfo
    saturated: int | None
    led: float

    @property
    def overshoot(self) -> float:
        """The largest one of the run."""
        return float(np.nanmax(self.cells))


def attempts_of(header: Header, parts: Parts) -> list[RunAttempt]:
    """Return how a run was begun, from its header and where its parts begin."""
    known = header.attempts or [
        Attempt(
            number=0,
            created=header.created,
            world_size=header.world_size,
            unclamp_version=header.unclamp_version,
            run_id=header.run_id,
        )
    ]
    if len(known) == 1 and parts["steps"]:  # without a look at the ends of thousands of parts
        parts = {"steps": parts["steps"], "casts": []}
    firsts = first_steps(parts)
    return [
        RunAttempt(
            number=each.number,
            created=each.created,
            world_size=each.world_size,
            first_step=firsts.get(each.number),
            ended=header.status if each.ended is None else each.ended,
        )
        for each in known
    ]


def read_ends(
    sql: Callable[[str], pa.Table], path: Path, header: Header, last: RunAttempt
) -> list[RankEnd]:
    """Return how each rank of the run's last attempt ended, all ranks of its world."""
    steps = sql("SELECT rank, max(step) AS last FROM steps GROUP BY rank").to_pylist()
    ends = {row["rank"]: row["last"] for row in steps}
    begin = last.first_step
    claims = {c.rank: c for c in read_claims(path) if c.attempt == last.number}
    return [
        _end(rank, None if begin is None else ends.get(rank), begin, claims.get(rank))
        for rank in range(header.world_size)
    ]


def _end(rank: int, step: int | None, begin: int | None, claim: Claim | None) -> RankEnd:
    is_before = step is not None and begin is not None and step < begin
    return RankEnd(
        rank=rank,
        last_step=None if is_before else step,
        closed=None if claim is None else claim.closed,
        tells_of_close=claim is not None and claim.tells_of_close,
    )


def read_overshoots(
    sql: Callable[[str], pa.Table], cut: Cut, sites: list[SiteInfo]
) -> list[RankOvershoot]:
    """Return what ranks overshot, by rank; empty where no two hold a site, or all did the same."""
    source = source_of(cut)
    scaled = "scaled_amax_max" if cut.from_summaries else SCALED_AMAX_SQL
    amax = "amax_max" if cut.from_summaries else "amax"
    clamped = "clamped > 0" if cut.from_summaries else CLAMPED_SQL
    uncounted = "coalesce(uncounted, 0) > 0" if cut.from_summaries else "elements IS NULL"
    rows = sql(
        f"""
        WITH places AS MATERIALIZED (
            SELECT rank, site, place, format_max, replicated FROM ({PLACES_SQL})
            WHERE NOT only_counted AND place IN (
                SELECT place FROM ({PLACES_SQL}) GROUP BY place HAVING count(DISTINCT rank) > 1)),
        found AS (
            SELECT rank, place, {source.cell} AS cell, max({amax}) AS amax,
                max(CASE WHEN {clamped} THEN {scaled} / format_max
                    ELSE least({scaled} / format_max, 1) END)
                    FILTER (isfinite({scaled})) AS overshoot,
                {over_ranks("sum(saturated)")} AS saturated, bool_or({uncounted}) AS uncounted
            FROM {source.table} JOIN places USING (rank, site) GROUP BY ALL),
        compared AS (
            SELECT *, rank = first_value(rank) OVER (
                    PARTITION BY place, cell ORDER BY amax DESC, rank)
                    AND max(amax) OVER (PARTITION BY place, cell)
                        > min(amax) OVER (PARTITION BY place, cell) AS leads,
                max(overshoot) OVER (PARTITION BY place, cell) AS most,
                min(overshoot) OVER (PARTITION BY place, cell) AS least
            FROM found)
        SELECT rank, cell, max(overshoot) AS overshoot, max_by(place, (overshoot, -place)) AS worst,
            sum(saturated)::BIGINT AS saturated, count(*) FILTER (leads) AS led,
            bool_or(uncounted) AS uncounted,
            count(*) AS casts, bool_or(most > least) AS differs
        FROM compared WHERE overshoot IS NOT NULL GROUP BY rank, cell ORDER BY rank, cell"""
    ).to_pylist()
    if not any(row["differs"] for row in rows):
        return []
    of_rank: dict[int, list[dict]] = {}
    for row in rows:
        of_rank.setdefault(row["rank"], []).append(row)
    every = sum(row["led"] for row in rows)
    return [_overshoot(rank, own, cut, sites, every) for rank, own in of_rank.items()]


def _overshoot(
    rank: int, rows: list[dict], cut: Cut, sites: list[SiteInfo], every: int
) -> RankOvershoot:
    cells = np.full(cut.count, np.nan)
    cells[[row["cell"] for row in rows]] = [row["overshoot"] for row in rows]
    worst = max(rows, key=lambda row: (row["overshoot"], -row["cell"]))
    return RankOvershoot(
        rank=rank,
        cells=cells,
        worst=sites[worst["worst"]],
        saturated=None if any(r["uncounted"] for r in rows) else _total(rows, "saturated"),
        led=_total(rows, "led") / max(1, every),
    )


def _total(rows: Iterable[dict], name: str) -> int:
    return sum(row[name] for row in rows)
