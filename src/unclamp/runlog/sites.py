"""Sites by name: which ids of which ranks stand for one operand of one product.

An id is one rank's, and unique in its run; the name is the same on every rank. What is asked of
a site is asked of its name, so that readers add up ranks by joining with `PLACES_SQL`.

What several ranks hold alike, such as a weight under data parallelism, each of them casts and
counts. A sum over ranks takes it once: `over_ranks` is the one place that says so.
"""

from dataclasses import dataclass
from typing import cast

from unclamp.names import Role, SiteName

PLACES_SQL = """
    SELECT *, dense_rank() OVER (ORDER BY first, fqn, role) - 1 AS place
    FROM (
        SELECT *, min(site) OVER (PARTITION BY fqn, role) AS first
        FROM (SELECT DISTINCT ON (rank, site) * FROM sites ORDER BY ALL)
    )"""
"""A row for each id of each rank: all columns of `sites`, and `place`, that of its name in
`RunLog.named_sites`. Join it by rank and site."""

SITES_SQL = """
    SELECT DISTINCT * REPLACE (
        coalesce(bool_or(replicated) OVER (PARTITION BY rank, site), false) AS replicated)
    FROM written_sites"""
"""The view `sites`: each row once, and none from before it was known to be replicated."""


def over_ranks(aggregate: str, where: str = "true") -> str:
    """Return a count or a sum of SQL that takes what several ranks hold alike once; 0 of no rows.

    For rows of `casts` or `summaries` joined with `PLACES_SQL`, those for which `where` is true.
    The largest and the smallest of all ranks need none of it.
    """
    return f"coalesce({aggregate} FILTER (NOT replicated AND {where}), 0)"


NAMED_SITES_SQL = f"""
    SELECT DISTINCT ON (place) first AS site, fqn, role, format, scaling, format_max, history_len,
        granularity
    FROM ({PLACES_SQL}) ORDER BY place, rank, site"""


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """What the table `sites` says of one site.

    Attributes:
        site: Its id; of a site that several ranks hold, the lowest.
        fqn: Dotted name of its product.
        role: Which operand.
        format: Name of the FP8 format.
        scaling: Kind of scaling at the beginning.
        format_max: Largest finite value of the format, in the scaled tensor's unit.
        history_len: Length of the amax history, updates; None where there is none.
        granularity: Which elements share a scale; None where that was not recorded.
    """

    site: int
    fqn: str
    role: str
    format: str
    scaling: str
    format_max: float
    history_len: int | None = None
    granularity: str | None = None

    @property
    def name(self) -> SiteName:
        """The name of the site, the same on every rank."""
        return SiteName(self.fqn, cast(Role, self.role))  # a log may hold what we do not know
