"""What the run's own scalings did, as the log counted it: what other policies stand beside."""

from collections.abc import Sequence
from dataclasses import dataclass

from unclamp.runlog import RunLog
from unclamp.runlog.sites import PLACES_SQL, SiteInfo, over_ranks
from unclamp.scaling import SCALINGS
from unclamp.totals import share

RECORDED_SQL = f"""
    SELECT first AS site, scaling, count(DISTINCT step) AS casts,
        count(DISTINCT step) FILTER (saturated > 0) AS clamped,
        count(DISTINCT step) FILTER (recast > 0) AS recast,
        {over_ranks("sum(elements)")} AS elements,
        {over_ranks("sum(elements)", "recast > 0")} AS again
    FROM casts JOIN ({PLACES_SQL}) USING (rank, site) WHERE nonfinite < elements
    GROUP BY first, scaling"""


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
    rows = [row for row in log.sql(RECORDED_SQL).to_pylist() if row["site"] in wanted]
    elements = sum(row["elements"] for row in rows)
    return Recorded(
        casts=sum(row["casts"] for row in rows),
        clamped=sum(row["clamped"] for row in rows),
        recast=sum(row["recast"] for row in rows),
        reads=share(sum(_reads(row) for row in rows), elements),
        scalings=tuple(sorted({row["scaling"] for row in rows})),
    )


def _reads(row: dict[str, int]) -> float:
    kind = SCALINGS.get(str(row["scaling"]))
    if kind is not None and kind.takes_own:
        return 2 * row["elements"]
    return row["elements"] + row["again"]
