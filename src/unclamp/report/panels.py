"""A site's own panel as compact data: its range over time, what it lost, its exponents. Torch-free.

A page cannot hold all windows of thousands of sites; `choose_sites` takes those that a reader will
want. What a site adds up to over the whole run is in `figures`.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from unclamp.errors import UnclampError
from unclamp.formats import FORMATS
from unclamp.report.figures import ROOT, RunFigures, by_clamp_error, site_name
from unclamp.report.windows import CELLS
from unclamp.rule import matches
from unclamp.runlog import RunLog

WORST_PANELS = 60
ALL_CELLS = 30_000
"""A run of no more sites times windows has the panels of all sites in its page."""
HISTOGRAM_STEPS = 1_000
"""Of a long run, the exponents of so many last steps are added up."""

_CELLS = f"""
SELECT site, cell, amax, scale_min, scale_max, elements, saturated, underflowed, recast, sqnr_min,
    sqnr_sum / nullif(sqnr_steps, 0) AS sqnr_mean
FROM {CELLS} WHERE site IN """
_EXPONENTS = """
WITH looked AS (
    SELECT site, step, scale, exponents FROM casts
    WHERE step >= $from AND exponents IS NOT NULL AND site IN ({sites})),
newest AS (
    SELECT site, max(step) AS newest, min(step) AS oldest, count(DISTINCT step) AS looks,
        arg_max(scale, step) AS scale
    FROM looked GROUP BY site),
counted AS (
    SELECT site, step, unnest(map_entries(exponents)) AS entry FROM looked)
SELECT site, entry.key::INTEGER AS exponent, sum(entry.value)::BIGINT AS total,
    coalesce(sum(entry.value) FILTER (step = newest), 0)::BIGINT AS latest,
    any_value(newest) AS newest, any_value(oldest) AS oldest, any_value(looks) AS looks,
    any_value(scale) AS scale
FROM counted JOIN newest USING (site) GROUP BY site, exponent ORDER BY site, exponent
"""


def choose_sites(
    figures: RunFigures, *, globs: Sequence[str] = (), named: Iterable[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """Return the sites whose panels a page holds, worst first.

    All of a small run; of a large one the 60 with the largest clamp error (then underflow), those
    that are `named` by fqn and role, and those that a glob matches: a module's name or a tail of
    it, as in a recipe, or "name role".

    Raises:
        UnclampError: A glob matches no site.
    """
    ranked = by_clamp_error(figures.sites)
    ranked.sort(key=lambda site: (not site["saturated"], -site["clamp_error"], -_underflow(site)))
    wanted = {(site["fqn"], site["role"]) for site in ranked[:WORST_PANELS]} | set(named)
    for glob in globs:
        found = {(s["fqn"], s["role"]) for s in ranked if _matches(s, glob)}
        if not found:
            some = ", ".join(dict.fromkeys(site["fqn"] or ROOT for site in ranked[:3])) or "none"
            raise UnclampError(f"--site {glob!r} matches no site of the run; it has: {some}, ...")
        wanted |= found
    if len(ranked) * figures.windows.count <= ALL_CELLS:
        return ranked
    return [site for site in ranked if (site["fqn"], site["role"]) in wanted]


def read_panels(log: RunLog, figures: RunFigures, sites: list[dict[str, Any]]) -> dict[int, Any]:
    """Return the panels of `sites` by site id; `read_run` has cut this log into windows.

    A panel's series have a value a window, None in a window without casts: `amax`; `top`, the
    largest value that the scale represents, and `bottom`, its smallest subnormal, each as tight as
    it was in the window; `clamp` and `under`, shares of the elements; `sqnr` and `sqnr_min` in
    decibel; `recast`, a count. `histogram` is None where no cast was inspected.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    if not sites:
        return {}
    panels = {site["site"]: _empty_panel(site, figures.windows.count) for site in sites}
    ids = ", ".join(str(site) for site in panels)
    for cell in log.sql(f"{_CELLS} ({ids})").to_pylist():
        _fill(panels[cell["site"]], cell)
    is_long = figures.windows.from_summaries
    first = max(figures.steps, default=0) - HISTOGRAM_STEPS if is_long else -(2**62)
    for row in log.sql(_EXPONENTS.format(sites=ids), **{"from": first}).to_pylist():
        _add_exponent(panels[row["site"]], row)
    return panels


def _empty_panel(site: dict[str, Any], count: int) -> dict[str, Any]:
    fmt = FORMATS.get(site["format"])
    series = ("amax", "top", "bottom", "clamp", "under", "sqnr", "sqnr_min", "recast")
    return {
        "fqn": site["fqn"],
        "role": site["role"],
        "format_max": site["format_max"],
        "subnormal": None if fmt is None else fmt.min_subnormal,
        **{name: [None] * count for name in series},
        "histogram": None,
    }


def _fill(panel: dict[str, Any], cell: dict[str, Any]) -> None:
    place, elements = cell["cell"], max(cell["elements"], 1)
    small = panel["subnormal"]
    values = {
        "amax": cell["amax"],
        "top": _over(panel["format_max"], cell["scale_max"]),
        "bottom": None if small is None else _over(small, cell["scale_min"]),
        "clamp": cell["saturated"] / elements,
        "under": cell["underflowed"] / elements,
        "sqnr": cell["sqnr_mean"],
        "sqnr_min": cell["sqnr_min"],
        "recast": cell["recast"],
    }
    for name, value in values.items():
        panel[name][place] = rounded(value)


def _add_exponent(panel: dict[str, Any], row: dict[str, Any]) -> None:
    if panel["histogram"] is None:
        small = panel["subnormal"]
        panel["histogram"] = {
            "step": row["newest"],
            "since": row["oldest"],
            "looks": row["looks"],
            "top": rounded(_over(panel["format_max"], row["scale"])),
            "bottom": None if small is None else rounded(_over(small, row["scale"])),
            "exponent": [],
            "latest": [],
            "total": [],
        }
    for name in ("exponent", "latest", "total"):
        panel["histogram"][name].append(row[name])


def rounded(value: float | None) -> float | None:
    """Return a number with five figures, for a page; None for what JSON cannot hold."""
    if value is None or not abs(value) < float("inf"):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _over(value: float, scale: float) -> float | None:
    return value / scale if scale > 0 else None


def _underflow(site: dict[str, Any]) -> float:
    return site["underflowed"] / max(site["elements"], 1)


def _matches(site: dict[str, Any], glob: str) -> bool:
    return matches(site["fqn"], glob) or fnmatchcase(site_name(site["fqn"], site["role"]), glob)
