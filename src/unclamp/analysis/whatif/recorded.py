"""What the run's own scalings did, as the log counted it: what other policies stand beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.analysis.whatif.amaxes import ELEMENTS_SQL, SEEN_SQL
from unclamp.runlog import RunLog
from unclamp.runlog.sites import PLACES_SQL, SiteInfo, over_ranks
from unclamp.scaling import SCALINGS
from unclamp.totals import CLAMPED_SQL, share

ALONE_SQL = f"""
    WITH places AS MATERIALIZED ({PLACES_SQL}),
    alone AS (SELECT first FROM places GROUP BY first HAVING count(*) = 1),
    sums AS (
        SELECT rank, site, count(*) AS casts, count(*) FILTER ({CLAMPED_SQL}) AS clamped,
            count(*) FILTER (recast > 0) AS recast, sum({ELEMENTS_SQL}) AS elements,
            coalesce(sum({ELEMENTS_SQL}) FILTER (recast > 0), 0) AS again
        FROM casts WHERE {SEEN_SQL} GROUP BY rank, site)
    SELECT first AS site, scaling, sums.* EXCLUDE (rank, site)
    FROM sums JOIN places USING (rank, site) SEMI JOIN alone USING (first)
"""
"""Of sites with one id: that has one row a step, unless a training went back."""
SEVERAL_SQL = f"""
    WITH places AS MATERIALIZED ({PLACES_SQL}),
    several AS (SELECT first FROM places GROUP BY first HAVING count(*) > $alone),
    ids AS (SELECT * FROM places SEMI JOIN several USING (first))
    SELECT first AS site, scaling, count(DISTINCT step) AS casts,
        count(DISTINCT step) FILTER ({CLAMPED_SQL}) AS clamped,
        count(DISTINCT step) FILTER (recast > 0) AS recast,
        {over_ranks(f"sum({ELEMENTS_SQL})")} AS elements,
        {over_ranks(f"sum({ELEMENTS_SQL})", "recast > 0")} AS again
    FROM casts JOIN ids USING (rank, site) WHERE {SEEN_SQL} GROUP BY first, scaling"""
"""Where a name has several ids, of ranks say, steps are told apart: that takes a table of all of
them, gigabytes of a long log's. `alone` is 1, or 0 to take every name."""
AGAIN_SQL = "SELECT count(*) > count(DISTINCT (rank, step)) AS has FROM steps"
"""Whether some rank recorded a step twice."""
HAS_SEVERAL_SQL = f"SELECT count(*) > count(DISTINCT first) AS has FROM ({PLACES_SQL})"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the log counted at the sites asked for.

    Attributes:
        casts: Its rows; one a step and site, whatever the ranks and microsteps.
        clamped: Of these, those in which anything was clamped.
        recast: Of these, those with a repeated cast.
        reads: Elements read an element cast, with the scalings that the sites began with.
        scalings: Their kinds.
    """

    casts: int
    clamped: int
    recast: int
    reads: float
    scalings: tuple[str, ...]


def recorded(log: RunLog, sites: Sequence[SiteInfo]) -> Recorded:
    """Return what the log counted at some sites."""
    wanted = {site.site for site in sites}
    rows = [row for row in _rows(log) if row["site"] in wanted]
    elements = sum(row["elements"] for row in rows)
    return Recorded(
        casts=sum(row["casts"] for row in rows),
        clamped=sum(row["clamped"] for row in rows),
        recast=sum(row["recast"] for row in rows),
        reads=share(sum(_reads(row) for row in rows), elements),
        scalings=tuple(sorted({row["scaling"] for row in rows})),
    )


def _rows(log: RunLog) -> list[dict[str, Any]]:
    (again,), (several,) = (log.sql(query).to_pylist() for query in (AGAIN_SQL, HAS_SEVERAL_SQL))
    if again["has"]:
        return log.sql(SEVERAL_SQL, alone=0).to_pylist()
    alone = log.sql(ALONE_SQL).to_pylist()
    return alone + log.sql(SEVERAL_SQL, alone=1).to_pylist() if several["has"] else alone


def _reads(row: dict[str, int]) -> float:
    kind = SCALINGS.get(str(row["scaling"]))
    if kind is not None and kind.takes_own:
        return 2 * row["elements"]
    return row["elements"] + row["again"]
