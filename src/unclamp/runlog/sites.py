"""Sites by name: which ids of which ranks stand for one operand of one product.

An id is one rank's, and unique in its run; the name is the same on every rank. What is asked of
a site is asked of its name, so that readers add up ranks by joining with `PLACES_SQL`.

What several ranks hold alike, such as a weight under data parallelism, each of them casts and
counts. A sum over ranks takes it once: `over_ranks` is the one place that says so.

From some casts nothing is computed: they are made to count what FP8 would lose. What they clamp no
loss can have seen, so who asks what clamping did takes the sites of `COMPUTED_SQL` alone.
"""

from dataclasses import dataclass
from typing import cast

from unclamp.names import Role, SiteName


def _places_sql(where: str) -> str:
    return f"""
    SELECT *, dense_rank() OVER (ORDER BY first, fqn, role, only_counted) - 1 AS place
    FROM (
        SELECT *, min(site) OVER (PARTITION BY fqn, role, only_counted) AS first
        FROM (SELECT DISTINCT ON (rank, site) * FROM sites WHERE {where} ORDER BY ALL)
    )"""


PLACES_SQL = _places_sql("true")
"""A row for each id of each rank: all columns of `sites`, and `place`, that of its name in
`RunLog.named_sites`. Join it by rank and site."""

COMPUTED_SQL = _places_sql("NOT only_counted")
"""The same of the sites from whose casts something is computed; `place` is that of the name in
`RunLog.computed_sites`."""

SITES_SQL = """
    SELECT DISTINCT * REPLACE (
        coalesce(bool_or(replicated) OVER (PARTITION BY rank, site), false) AS replicated,
        coalesce(bool_or(only_counted) OVER (PARTITION BY rank, site), false) AS only_counted)
    FROM written_sites"""
"""The view `sites`: each row once, and none from before it was known to be replicated."""


def over_ranks(aggregate: str, where: str = "true") -> str:
    """Return a count or a sum of SQL that takes what several ranks hold alike once; 0 of no rows.

    For rows of `casts` or `summaries` joined with `PLACES_SQL`, those for which `where` is true.
    The largest and the smallest of all ranks need none of it.
    """
    return f"coalesce({aggregate} FILTER (NOT replicated AND {where}), 0)"


def named_sites_sql(places_sql: str) -> str:
    """Return the query of `PLACES_SQL`'s or `COMPUTED_SQL`'s names, with a `SiteInfo` each."""
    return f"""
    SELECT DISTINCT ON (place) first AS site, fqn, role, format, scaling, format_max, history_len,
        granularity, only_counted
    FROM ({places_sql}) ORDER BY place, rank, site"""


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
        only_counted: Whether nothing is computed from its casts.
    """

    site: int
    fqn: str
    role: str
    format: str
    scaling: str
    format_max: float
    history_len: int | None = None
    granularity: str | None = None
    only_counted: bool = False

    @property
    def name(self) -> SiteName:
        """The name of the site, the same on every rank."""
        return SiteName(self.fqn, cast(Role, self.role))  # a log may hold what we do not know
