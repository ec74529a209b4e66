"""The figures of one run, read from its log: curves, spikes, windows, totals a site. Torch-free."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclamp.analysis import Spike, find_spikes, run_curve
from unclamp.errors import AnalysisError
from unclamp.report.windows import CELLS, Windows, cut
from unclamp.runlog import RunLog

HEAT_SITES = 60
_NOBODY = {"fqn": "?", "role": "-", "format": "-", "scaling": "-", "overshoot": 0.0}
ROOT = "(the model itself)"
"""What stands for the empty dotted name of a root module."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The figures of one run.

    Attributes:
        steps: Step numbers of `loss` and `grad_norm`, rising; a step counts once.
        loss: Mean over ranks; None where none was recorded, which NaN is not.
        grad_norm: The same of the gradient norm; empty if it was never recorded.
        planted: Steps whose batch was planted.
        spikes: Of the loss and the gradient norm, by onset.
        windows: How the steps are cut for the figures of sites.
        sites: A row of totals a site, in the order of their ids.
        mixed: Whether ranks recorded different modules under the same id. Rows of casts then belong
            to nobody: `sites` has counts without names, formats and overshoot, `shares` is empty.
        recorded: Steps that have rows of casts, where not every step was to have them; else None.
        shares: Saturated share a window, by site (fqn, role), of the sites with the largest total
            clamp error, worst first.
    """

    status: str
    steps: list[int]
    loss: list[float | None]
    grad_norm: list[float | None]
    planted: list[int]
    spikes: list[Spike]
    tokens_per_s: float | None
    windows: Windows
    mixed: bool
    recorded: int | None
    sites: list[dict[str, Any]]
    shares: dict[tuple[str, str], np.ndarray]

    @property
    def extent(self) -> str:
        """Which steps the counts are of, to be said with them; "" where it is all."""
        if self.recorded is None:
            return ""
        return f" in the {self.recorded:,} recorded of {len(self.steps):,} steps"

    @property
    def loss_spikes(self) -> list[int]:
        """Steps at which a spike of the loss begins."""
        return [spike.onset for spike in self.spikes if spike.series == "loss"]


_SITES = f"""
WITH totals AS (
    SELECT site, sum(elements)::BIGINT AS elements, sum(saturated)::BIGINT AS saturated,
        sum(underflowed)::BIGINT AS underflowed, sum(nonfinite)::BIGINT AS nonfinite,
        sum(recast)::BIGINT AS recasts, sum(microsteps)::BIGINT AS casts,
        sum(steps)::BIGINT AS rows, sum(clamped)::BIGINT AS clamped_casts,
        max(scaled_amax) AS scaled_amax, sum(error) AS clamp_error,
        max(error_max) AS clamp_error_max,
        max_by(worst_step, (error_max, ~worst_step)) FILTER (error_max > 0) AS worst_step,
        min(sqnr_min) AS sqnr_db_min, sum(sqnr_sum) / nullif(sum(sqnr_steps), 0) AS sqnr_db_mean
    FROM {CELLS} GROUP BY site)
SELECT fqn, role, format, scaling, history_len, granularity, format_max, totals.*,
    scaled_amax / format_max AS overshoot
FROM (SELECT DISTINCT ON (site) * FROM sites ORDER BY site) JOIN totals USING (site) ORDER BY site
"""
_SHARES = f"""
SELECT site, cell, saturated / greatest(elements, 1)::DOUBLE AS share FROM {CELLS}
WHERE saturated > 0 AND list_contains($sites, site)
"""
_MIXED = """
SELECT site FROM sites GROUP BY site HAVING count(DISTINCT fqn) > 1 OR count(DISTINCT role) > 1
"""
_TOKENS_PER_S = """
SELECT median(map_extract(scalars, 'tokens')[1] / step_ms * 1e3) AS speed FROM steps
WHERE step_ms > 0 AND step > (SELECT min(step) FROM steps)
"""


def read_run(log: RunLog) -> RunFigures:
    """Return the figures of a run, finished or not; leaves the table `CELLS` in its connection.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    with ThreadPoolExecutor(1) as pool:  # DuckDB cuts while Python looks for spikes
        cutting = pool.submit(cut, log)
        with RunLog.open(log.path) as another:  # a connection is for one thread
            steps, series = _series(another)
        spikes = [
            spike
            for name, values in series.items()
            for spike in find_spikes(values, steps=steps, series=name)
        ]
        windows = cutting.result()
    sites = [_settled(site) for site in log.sql(_SITES).to_pylist()]
    mixed = log.sql(_MIXED).num_rows > 0
    if mixed:
        sites = [site | _NOBODY for site in sites]
    planted = log.sql("SELECT DISTINCT step FROM events WHERE kind = 'planted'").to_pydict()["step"]
    recorded = set(steps)
    return RunFigures(
        status=log.header.status,
        steps=steps,
        loss=series.get("loss", [None] * len(steps)),
        grad_norm=series.get("grad_norm", []),
        planted=sorted(step for step in planted if step in recorded),
        spikes=sorted(spikes, key=lambda spike: (spike.onset, spike.series != "loss")),
        tokens_per_s=log.sql(_TOKENS_PER_S).to_pydict()["speed"][0],
        windows=windows,
        mixed=mixed,
        recorded=_recorded_steps(log),
        sites=sites,
        shares={} if mixed else _shares(log, sites, windows),
    )


def _recorded_steps(log: RunLog) -> int | None:
    """Count the steps with rows of casts; None where the cadence is each step, or not said."""
    cadence = log.header.metadata.get("cadence")
    casts = cadence.get("casts") if isinstance(cadence, dict) else None
    every = casts.get("steps") if isinstance(casts, dict) else None
    if not isinstance(every, int) or every <= 1:
        return None
    return log.sql("SELECT count(DISTINCT step) AS steps FROM casts").to_pydict()["steps"][0]


def _settled(site: dict[str, Any]) -> dict[str, Any]:
    """Return a site with its sums of fractions to nine figures.

    DuckDB's threads add in any order, and one log gives one report.
    """
    sums = {name: site[name] for name in ("clamp_error", "sqnr_db_mean")}
    return site | {k: None if v is None else float(f"{v:.9g}") for k, v in sums.items()}


def site_name(fqn: str, role: str) -> str:
    """Return a site's name for people; a root module has no dotted name."""
    return f"{fqn or ROOT} {role}"


def by_clamp_error(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sites with the largest total clamp error first; then by name."""
    return sorted(sites, key=lambda site: (-site["clamp_error"], site["fqn"], site["role"]))


def _series(log: RunLog) -> tuple[list[int], dict[str, list[float | None]]]:
    """Return steps and series of a run; without any that recorded neither."""
    try:
        curve = run_curve(log)
    except AnalysisError:  # neither loss nor gradient norm
        return log.sql("SELECT DISTINCT step FROM steps ORDER BY step").to_pydict()["step"], {}
    return curve.steps.tolist(), curve.series


def _shares(
    log: RunLog, sites: list[dict[str, Any]], windows: Windows
) -> dict[tuple[str, str], np.ndarray]:
    clamped = [site for site in by_clamp_error(sites) if site["saturated"]][:HEAT_SITES]
    shares = {site["site"]: np.zeros(windows.count) for site in clamped}
    cells = log.sql(_SHARES, sites=list(shares)).to_pydict() if shares else {"site": []}
    for place, site in enumerate(cells["site"]):
        shares[site][cells["cell"][place]] = cells["share"][place]
    return {(site["fqn"], site["role"]): shares[site["site"]] for site in clamped}
