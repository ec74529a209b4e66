"""One step's rows of the tables `steps` and `casts` as named numbers, for any dashboard.

Pure functions: what is sent where is for the sinks. A number that is not known is left out; NaN
and Inf that were recorded stay what they are.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from unclamp.names import ROLES
from unclamp.rule import matches
from unclamp.runlog import Columns, SiteInfo
from unclamp.totals import overshoot, scaled_amax, share

_NOT_NUMBERS = ("step", "rank", "time_s", "scalars", "group")
"""Columns of `steps` that are not one number of the step under its own name."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many elements lie between neighbouring edges; one edge more than counts."""

    counts: np.ndarray
    edges: np.ndarray


def site_infos(*columns: Columns) -> dict[int, SiteInfo]:
    """Return the sites of one or more pieces of the table `sites`, by the site's id."""
    names = [field.name for field in fields(SiteInfo)]
    infos = {}
    for piece in columns:
        rows = len(piece.get("site", ()))
        known = [piece.get(name, [None] * rows) for name in names]
        for row in zip(*known, strict=True):
            info = SiteInfo(**dict(zip(names, row, strict=True)))
            infos[info.site] = info
    return infos


def choose(sites: Mapping[int, SiteInfo], globs: Collection[str]) -> set[int]:
    """Return the ids of the sites whose module one of the globs matches, as recipes match."""
    return {i for i, site in sites.items() if any(matches(site.fqn, glob) for glob in globs)}


def summarise(
    sites: Mapping[int, SiteInfo], steps: Columns, casts: Columns | None
) -> dict[str, float]:
    """Return the step's numbers, and the casts' under `unclamp/`, for the model and per role.

    Sites that are only counted are in none of these: see `per_site`.

    Args:
        sites: The sites that the casts refer to, by id.
        steps: One row of the table `steps`.
        casts: The step's rows of the table `casts`; None, or no rows, where none were recorded.

    Returns:
        `loss`, `grad_norm`, `lr`, `step_ms` (milliseconds) and the user's scalars, those that
        are known; of a step with a group its loss once more, as `loss/<group>`, unless
        a scalar of the user has this name. Then, as
        `unclamp/<name>` over all sites and as `unclamp/<role>/<name>`:
        `saturated` and `nonfinite` (elements), `clamped_casts` (sites that clamped anything),
        `recast` (casts), `underflow_share` (fraction of the elements), `clamp_error_max`
        (fraction) and `overshoot_max` (amax over the largest representable value),
        `sqnr_db_min` where a cast was inspected, and `grad_error_max` (fraction) where it was
        measured.
    """
    numbers = _own_numbers(steps)
    if casts is None or not len(casts.get("site", ())):
        return numbers
    rows = _Rows(sites, casts)
    if not rows.is_computed.any():
        return numbers
    numbers |= _model_numbers("unclamp", rows, rows.is_computed)
    for role in ROLES:
        of_role = rows.is_computed & (rows.role == role)
        if of_role.any():
            numbers |= _model_numbers(f"unclamp/{role}", rows, of_role)
    return numbers


def per_site(
    sites: Mapping[int, SiteInfo], casts: Columns | None, chosen: Collection[int]
) -> dict[str, float]:
    """Return clamp error, overshoot and underflow share of each chosen site that was cast.

    Their names are `unclamp/sites/<fqn>/<role>/<clamp_error, overshoot or underflow_share>`.
    """
    if casts is None or not chosen or not len(casts.get("site", ())):
        return {}
    rows = _Rows(sites, casts)
    numbers = {}
    for row, site in enumerate(rows.site):
        if site in chosen:
            name = _site_name(sites[site])
            numbers[f"{name}/clamp_error"] = float(rows.clamp_error[row])
            numbers[f"{name}/overshoot"] = float(rows.overshoot[row])
            if rows.elements[row]:
                lost = share(rows.underflowed[row], rows.elements[row])
                numbers[f"{name}/underflow_share"] = float(lost)
    return numbers


def histograms(
    sites: Mapping[int, SiteInfo], casts: Columns | None, chosen: Collection[int]
) -> dict[str, Histogram]:
    """Return the exponents' histogram of each chosen site that was inspected.

    The elements with floor(log2 |x|) = e lie between the edges e and e + 1. Their names are
    `unclamp/sites/<fqn>/<role>/exponents`.
    """
    if casts is None or not chosen:
        return {}
    found = {}
    pairs = zip(casts.get("site", ()), casts.get("exponents", ()), strict=False)
    for site, exponents in pairs:
        if exponents and int(site) in chosen:
            found[f"{_site_name(sites[int(site)])}/exponents"] = _histogram(dict(exponents))
    return found


class _Rows:
    """The columns of `casts` as arrays; a missing or null number is NaN."""

    def __init__(self, sites: Mapping[int, SiteInfo], casts: Columns) -> None:
        self.site = [int(site) for site in casts["site"]]
        self.role = np.array([sites[site].role for site in self.site])
        self.is_computed = np.array([not sites[site].only_counted for site in self.site])
        self.elements = _floats(casts["elements"])
        self.saturated = _floats(casts["saturated"])
        self.underflowed = _floats(casts["underflowed"])
        self.nonfinite = _floats(casts["nonfinite"])
        self.recast = _floats(casts["recast"])
        self.clamp_error = _floats(casts["saturated_error"])
        largest = np.array([sites[site].format_max for site in self.site])
        with np.errstate(invalid="ignore"):  # amax 0 at scale Inf says nothing: NaN
            scaled = scaled_amax(_floats(casts["amax"]), _floats(casts["scale"]))
            self.overshoot = overshoot(scaled, largest)
        inspected = casts.get("sqnr_db")
        unknown = np.full(len(self.site), np.nan)
        self.sqnr_db = unknown if inspected is None else _floats(inspected)
        changed = casts.get("grad_error")
        self.grad_error = unknown if changed is None else _floats(changed)


def _own_numbers(steps: Columns) -> dict[str, float]:
    known = {name: steps[name][0] for name in steps if name not in _NOT_NUMBERS}
    known |= dict((steps.get("scalars") or [None])[0] or [])
    group = (steps.get("group") or [None])[0]
    if group is not None:
        known.setdefault(f"loss/{group}", known.get("loss"))  # the user's own wins
    return {name: float(value) for name, value in known.items() if value is not None}


def _model_numbers(prefix: str, rows: _Rows, where: np.ndarray) -> dict[str, float]:
    elements = rows.elements[where].sum()
    numbers = {
        "saturated": rows.saturated[where].sum(),
        "clamped_casts": np.count_nonzero(rows.saturated[where]),
        "recast": rows.recast[where].sum(),
        "nonfinite": rows.nonfinite[where].sum(),
        "underflow_share": share(rows.underflowed[where].sum(), elements) if elements else None,
        "clamp_error_max": _extreme(np.max, rows.clamp_error[where]),
        "overshoot_max": _extreme(np.max, rows.overshoot[where]),
        "sqnr_db_min": _extreme(np.min, rows.sqnr_db[where]),
        "grad_error_max": _extreme(np.max, rows.grad_error[where]),
    }
    return {f"{prefix}/{n}": float(value) for n, value in numbers.items() if value is not None}


def _extreme(reduce: Callable[[np.ndarray], float], values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(reduce(known)) if len(known) else None


def _floats(values: Sequence[object] | np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)  # None becomes NaN


def _site_name(site: SiteInfo) -> str:
    return "/".join(part for part in ("unclamp/sites", site.fqn, site.role) if part)


def _histogram(exponents: Mapping[int, int]) -> Histogram:
    low, high = min(exponents), max(exponents)
    counts = np.zeros(high - low + 1, dtype=np.int64)
    for exponent, count in exponents.items():
        counts[exponent - low] = count
    return Histogram(counts=counts, edges=np.arange(low, high + 2))
