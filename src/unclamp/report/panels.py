"""A site's own panel as compact data: its range over time, what it lost, its exponents. Torch-free.

A page cannot hold all windows of thousands of sites; `choose_sites` takes those that a reader will
want. What a site adds up to over the whole run is in `recorded`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from unclamp.errors import UnclampError
from unclamp.formats import FORMATS
from unclamp.names import SiteName, shown
from unclamp.report.recorded import RunRecord, SiteRecord, by_clamp_error
from unclamp.rule import matches
from unclamp.runlog import PLACES_SQL, RunLog, Windows

WORST_PANELS = 60
ALL_CELLS = 30_000
"""A run of no more sites times windows has the panels of all sites in its page."""
HISTOGRAM_STEPS = 1_000
"""Of a long run, the exponents of so many last steps are added up."""

_EXPONENTS = f"""
WITH places AS MATERIALIZED (
    SELECT rank, site, place FROM ({PLACES_SQL}) WHERE list_contains($places, place)),
looked AS (
    SELECT place, step, scale, exponents FROM casts JOIN places USING (rank, site)
    WHERE step >= $from AND exponents IS NOT NULL),
newest AS (
    SELECT place, max(step) AS newest, min(step) AS oldest, count(DISTINCT step) AS looks,
        arg_max(scale, step) AS scale
    FROM looked GROUP BY place),
counted AS (
    SELECT place, step, unnest(map_entries(exponents)) AS entry FROM looked),
added AS (
    SELECT place, entry.key::INTEGER AS exponent, sum(entry.value)::BIGINT AS total,
        coalesce(sum(entry.value) FILTER (step = newest), 0)::BIGINT AS latest
    FROM counted JOIN newest USING (place) GROUP BY place, exponent)
SELECT place, newest, oldest, looks, scale, list(exponent ORDER BY exponent) AS exponent,
    list(latest ORDER BY exponent) AS latest, list(total ORDER BY exponent) AS total
FROM added JOIN newest USING (place) GROUP BY ALL
"""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The exponents of a site's inspected casts.

    Attributes:
        step: Last step that was inspected.
        since: First one that is added up.
        looks: Steps added up.
        top: Largest value that the scale of the last step represents; None for a scale of 0.
        bottom: Its smallest subnormal; None for a format that we do not know.
        exponent: floor(log2 |x|), rising.
        latest: Elements in the last step, for each of them.
        total: Elements in all of them.
    """

    step: int
    since: int
    looks: int
    top: float | None
    bottom: float | None
    exponent: list[int]
    latest: list[int]
    total: list[int]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A site over time; its series have a value a window, None in a window without casts.

    Attributes:
        fqn: Dotted name of its product.
        role: Which operand.
        format_max: Largest value of the format.
        subnormal: Its smallest one; None for a format that we do not know.
        amax: Largest amax.
        top: Largest value that the scale represents, as tight as it was in the window.
        bottom: Its smallest subnormal, likewise.
        clamp: Share of the elements that were clamped; None where they were not counted.
        under: Share that underflowed.
        sqnr: Mean signal-to-noise ratio, decibel.
        sqnr_min: The least one.
        recast: Casts repeated.
        histogram: None where no cast was inspected.
    """

    fqn: str
    role: str
    format_max: float
    subnormal: float | None
    amax: list[float | None] = field(default_factory=list)
    top: list[float | None] = field(default_factory=list)
    bottom: list[float | None] = field(default_factory=list)
    clamp: list[float | None] = field(default_factory=list)
    under: list[float | None] = field(default_factory=list)
    sqnr: list[float | None] = field(default_factory=list)
    sqnr_min: list[float | None] = field(default_factory=list)
    recast: list[float | None] = field(default_factory=list)
    histogram: Histogram | None = None


def choose_sites(
    record: RunRecord, *, globs: Sequence[str] = (), named: Iterable[SiteName] = ()
) -> list[SiteRecord]:
    """Return the sites whose panels a page holds, worst first.

    All of a small run; of a large one the 60 with the largest clamp error (then underflow), those
    that are `named`, and those that a glob matches: a module's name or a tail of it, as in a
    recipe, or "name role".

    Raises:
        UnclampError: A glob matches no site.
    """
    ranked = by_clamp_error(record.every_site)
    ranked.sort(key=_by_loss)
    wanted = {site.name for site in ranked[:WORST_PANELS]} | set(named)
    for glob in globs:
        found = {site.name for site in ranked if _matches(site.name, glob)}
        if not found:
            names = dict.fromkeys(shown(site.info.fqn) for site in ranked[:3])
            some = ", ".join(names) or "none"
            raise UnclampError(f"--site {glob!r} matches no site of the run; it has: {some}, ...")
        wanted |= found
    if len(ranked) * record.cut.count <= ALL_CELLS:
        return ranked
    return [site for site in ranked if site.name in wanted]


def read_panels(log: RunLog, windows: Windows, sites: Sequence[SiteRecord]) -> dict[int, Panel]:
    """Return the panels of `sites` by site id, from the windows of the same log.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    if not sites:
        return {}
    histograms = _read_histograms(log, windows, sites)
    return {s.info.site: _panel(s, windows, histograms.get(s.place)) for s in sites}


def _panel(site: SiteRecord, windows: Windows, histogram: Histogram | None) -> Panel:
    info, small = site.info, _subnormal(site)
    cells = {window.cell: window for window in windows.of(site.place)}
    panel = Panel(
        fqn=info.fqn,
        role=info.role,
        format_max=info.format_max,
        subnormal=small,
        histogram=histogram,
    )
    for cell in range(windows.cut.count):
        window = cells.get(cell)
        lost = None if window is None else window.totals
        panel.amax.append(rounded(window and window.amax))
        panel.top.append(rounded(window and _over(info.format_max, window.scale_max)))
        panel.bottom.append(rounded(window and _over(small, window.scale_min)))
        panel.clamp.append(rounded(lost and lost.saturated_share))
        panel.under.append(rounded(lost and lost.underflow_share))
        panel.sqnr.append(rounded(lost and lost.sqnr_db_mean))
        panel.sqnr_min.append(rounded(lost and lost.sqnr_db_min))
        panel.recast.append(rounded(lost and lost.recasts))
    return panel


def _read_histograms(
    log: RunLog, windows: Windows, sites: Sequence[SiteRecord]
) -> dict[int, Histogram]:
    """Return the histograms of the sites that were inspected, by place."""
    by_place = {site.place: site for site in sites}
    first = -(2**62)
    if windows.cut.from_summaries:
        first = log.sql("SELECT coalesce(max(step), 0) FROM steps").column(0)[0].as_py()
        first -= HISTOGRAM_STEPS
    params = {"from": first, "places": list(by_place)}
    found = {}
    for row in log.sql(_EXPONENTS, **params).to_pylist():
        site, scale = by_place[row["place"]], row["scale"]
        found[site.place] = Histogram(
            step=row["newest"],
            since=row["oldest"],
            looks=row["looks"],
            top=rounded(_over(site.info.format_max, scale)),
            bottom=rounded(_over(_subnormal(site), scale)),
            exponent=row["exponent"],
            latest=row["latest"],
            total=row["total"],
        )
    return found


def rounded(value: float | None) -> float | None:
    """Return a number with five figures, for a page; None for what JSON cannot hold."""
    if value is None or not abs(value) < float("inf"):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _subnormal(site: SiteRecord) -> float | None:
    fmt = FORMATS.get(site.info.format)
    return None if fmt is None else fmt.min_subnormal


def _over(value: float | None, scale: float | None) -> float | None:
    return None if value is None or scale is None or not scale > 0 else value / scale


def _by_loss(site: SiteRecord) -> tuple[bool, bool, float, float]:
    totals = site.totals
    ranked = (not totals.clamped_rows, -totals.clamp_error_sum, -(totals.underflow_share or 0.0))
    return (site.info.only_counted, *ranked)


def _matches(name: SiteName, glob: str) -> bool:
    return matches(name.fqn, glob) or fnmatchcase(str(name), glob)
