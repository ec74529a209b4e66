"""What casts cost, in units of the loss: which sites' clamping harmed, and by how much.

The run log has, for each cast of an input or weight that was priced, the first-order change of the
loss that its error made (`numerics.price`). Here these are added up by site. Prices of ranks are
each of the loss that the rank's own backward ran on: a site's is the mean over the ranks that cast
it, and one that is not known on some rank is not known.

A gradient that clamps on its way down makes the prices of the casts below it too small. So steps in
which any did are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.names import SiteName
from unclamp.runlog import COMPUTED_SQL, RunLog
from unclamp.written import counted, listed, signed

MOST_SITES = 3
"""Sites that a sentence names."""

_STEPS = f"""
    WITH places AS MATERIALIZED (SELECT rank, site, role, place FROM ({COMPUTED_SQL})),
    own_casts AS ($own),
    own AS (
        SELECT place, step, max(saturated) > 0 AS has_clamped,
            bool_and(saturated = 0 OR price_clamp IS NOT NULL) AS is_known,
            sum(CASE WHEN saturated = 0 THEN 0 ELSE price_clamp END) / count(*) AS clamp,
            bool_and(price_rounding IS NOT NULL) AS has_rounding,
            sum(price_rounding) / count(*) AS rounding
        FROM own_casts GROUP BY place, step
        HAVING has_clamped OR has_rounding),
    low AS (
        SELECT DISTINCT step FROM clamped_casts JOIN places USING (rank, site)
        WHERE role = 'grad_output' AND saturated > 0 $steps)
    SELECT place,
        count(*) FILTER (has_clamped AND is_known) AS steps,
        count(*) FILTER (has_clamped AND NOT is_known) AS unknown,
        count(*) FILTER (has_clamped AND is_known AND low.step IS NOT NULL) AS low,
        coalesce(sum(clamp) FILTER (has_clamped AND is_known), 0) AS clamp,
        max(clamp) FILTER (has_clamped AND is_known) AS worst,
        arg_max(own.step, (clamp, -own.step)) FILTER (has_clamped AND is_known) AS worst_step,
        count(*) FILTER (has_rounding) AS rounding_steps,
        coalesce(sum(rounding) FILTER (has_rounding), 0) AS rounding
    FROM own LEFT JOIN low USING (step) GROUP BY place ORDER BY place"""
_COLUMNS = "place, step, saturated, price_clamp, price_rounding"
_MARKED = f"""
    SELECT {_COLUMNS} FROM clamped_casts JOIN places USING (rank, site)
    WHERE role <> 'grad_output' AND saturated > 0 $steps"""
"""Casts that clamped: with a step to each, few of a log's rows, and read without the others."""
_ROUNDED = f"""
    SELECT {_COLUMNS} FROM casts JOIN places USING (rank, site)
    WHERE role <> 'grad_output' AND price_rounding IS NOT NULL AND saturated = 0 $steps"""
_OF_ALL_RANKS = f"""
    SELECT {_COLUMNS} FROM casts JOIN places USING (rank, site)
    SEMI JOIN (SELECT DISTINCT place, step FROM ({_MARKED} UNION ALL {_ROUNDED}))
    USING (place, step) WHERE role <> 'grad_output' $steps"""
"""The same, and what the other ranks cast of these sites in these steps."""


@dataclass(frozen=True, kw_only=True)
class SitePrice:
    """What the casts of one site cost, in units of the loss; above 0 they raised it.

    Attributes:
        name: Of the site.
        steps: Steps in which it clamped and was priced.
        unknown: Steps in which it clamped and was not.
        low: Of `steps`, those in which some gradient clamped too: their prices are too small.
        clamp: Sum of the prices of clamping over `steps`.
        worst: The largest of them; None where there is none.
        worst_step: The first step that had it.
        rounding_steps: Steps in which rounding was priced.
        rounding: Sum of the prices of rounding over these.
    """

    name: SiteName
    steps: int = 0
    unknown: int = 0
    low: int = 0
    clamp: float = 0.0
    worst: float | None = None
    worst_step: int | None = None
    rounding_steps: int = 0
    rounding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What the casts of a run cost.

    Attributes:
        sites: Those that clamped, or whose rounding was priced; the one whose clamping cost most
            in a single step first, those whose price is not known last.
    """

    sites: tuple[SitePrice, ...] = ()

    @property
    def by_name(self) -> dict[SiteName, SitePrice]:
        """The sites by name."""
        return {site.name: site for site in self.sites}

    def words(self) -> list[str]:
        """Return it as sentences; none where nothing that clamped was priced.

        Example:
            >>> site = SitePrice(name=SiteName("up", "input"), steps=2, low=1, unknown=1,
            ...     clamp=0.5, worst=0.4, worst_step=7)
            >>> for sentence in Prices(sites=(site,)).words():
            ...     print(sentence)
            By the price of clamping (first order, in units of the loss) the costliest casts are those of up input: 0.4 at step 7, 0.5 in 2 steps.
            In 1 of these 2 steps of sites some gradient clamped as well, so that their prices are too small; 1 step of a site that clamped has no price.
        """  # noqa: E501
        priced = [site for site in self.sites if (site.worst or 0) > 0]
        if not priced:
            return []
        named = [
            f"{site.name}: {_figure(site.worst or 0)} at step {site.worst_step}, "
            f"{_figure(site.clamp)} in "
            f"{counted(site.steps, 'step')}"
            for site in priced[:MOST_SITES]
        ]
        said = [
            "By the price of clamping (first order, in units of the loss) the costliest casts are "
            f"those of {listed(named)}."
        ]
        steps, low = sum(s.steps for s in self.sites), sum(s.low for s in self.sites)
        unknown = sum(site.unknown for site in self.sites)
        doubts = []
        if low:
            doubts.append(
                f"in {low:,} of these {counted(steps, 'step')} of sites some gradient clamped as "
                "well, so that their prices are too small"
            )
        if unknown:
            verb = "has" if unknown == 1 else "have"
            doubts.append(
                f"{counted(unknown, 'step')} of {'a site' if unknown == 1 else 'sites'} that "
                f"clamped {verb} no price"
            )
        if doubts:
            text = "; ".join(doubts)
            said.append(f"{text[0].upper()}{text[1:]}.")
        return said


def _figure(price: float) -> str:
    """Return a price as people write numbers of that size.

    Example:
        >>> _figure(0.4), _figure(1763.2), _figure(5.6e-5), _figure(-3.0)
        ('0.4', '1,763', '5.6e-5', '-3')
    """
    return signed(price).removeprefix("+")


def cast_prices(log: RunLog, *, steps: Sequence[int] | None = None) -> Prices:
    """Return what the casts of a run cost, or of some of its steps.

    Logs from before casts were priced have none.

    Args:
        log: The run.
        steps: Only these steps; all without it.

    Raises:
        RunLogError: The run cannot be read.
    """
    asked = "" if steps is None else "AND step IN (SELECT unnest($asked::BIGINT[]))"
    params = {} if steps is None else {"asked": list(steps)}
    (ranks,) = log.sql("SELECT count(DISTINCT rank) AS n FROM sites")["n"].to_pylist()
    own = f"{_MARKED} UNION ALL {_ROUNDED}" if ranks < 2 else _OF_ALL_RANKS
    query = _STEPS.replace("$own", own).replace("$steps", asked)
    rows = log.sql(query, **params).to_pylist()
    names = [site.name for site in log.computed_sites()]
    sites = [
        SitePrice(
            name=names[row["place"]],
            **{key: _settled(value) for key, value in row.items() if key != "place"},
        )
        for row in rows
    ]
    return Prices(sites=tuple(sorted(sites, key=_rank)))


def _rank(site: SitePrice) -> tuple[bool, float, SiteName]:
    return site.worst is None, -(site.worst or 0.0), site.name


def _settled(value: Any) -> Any:
    """Return a sum without the last digits, which the order of adding decides."""
    return float(f"{value:.9g}") if isinstance(value, float) else value
