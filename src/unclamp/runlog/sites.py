"""Sites by name: which ids of which ranks stand for one operand of one product.

An id is one rank's, and unique in its run; the name is the same on every rank. What is asked of
a site is asked of its name, so that readers add up ranks by joining with `PLACES_SQL`.
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
