"""The figures of one run, read from its log: losses, spikes, and totals a site. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.analysis import find_spikes
from unclamp.runlog import RunLog


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The figures of one run.

    Attributes:
        steps: Step numbers of `loss`.
        planted: Steps whose batch was planted.
        spikes: Steps at which a detected spike begins.
        sites: A row of totals a site.
        shares: Saturated share `[sites, steps]`, in the order of `sites` and `steps`.
    """

    status: str
    steps: list[int]
    loss: list[float]
    planted: list[int]
    spikes: list[int]
    tokens_per_s: float | None
    sites: list[dict[str, Any]]
    shares: np.ndarray


_SITES = """
SELECT fqn, role, any_value(format) AS format, any_value(scaling) AS scaling,
       sum(elements)::BIGINT AS elements, sum(saturated)::BIGINT AS saturated,
       sum(underflowed)::BIGINT AS underflowed, sum(nonfinite)::BIGINT AS nonfinite,
       count(*) FILTER (saturated > 0)::BIGINT AS clamped_casts,
       sum(recast)::BIGINT AS recasts, sum(microsteps)::BIGINT AS casts,
       max(amax::DOUBLE * scale / format_max) AS overshoot,
       sum(saturated_error) AS clamp_error,
       arg_max(step, saturated_error) FILTER (saturated > 0) AS worst_step
FROM casts JOIN sites USING (site) GROUP BY site, fqn, role ORDER BY site
"""
_SHARES = """
SELECT site, step, sum(saturated) / greatest(sum(elements), 1)::DOUBLE AS share
FROM casts WHERE saturated > 0 GROUP BY site, step
"""


def read_run(path: Path) -> RunFigures:
    """Return the figures of a run, finished or not.

    Raises:
        RunLogError: No run, or one that another version wrote.
    """
    with RunLog.open(path) as log:
        steps = log.steps().to_pydict()
        sites = log.sql(_SITES).to_pylist()
        ids = log.sql("SELECT DISTINCT site FROM casts ORDER BY site").to_pydict()["site"]
        cells = log.sql(_SHARES).to_pydict()
        planted = log.sql("SELECT step FROM events WHERE kind = 'planted'").to_pydict()["step"]
        status = log.header.status
    column = {step: i for i, step in enumerate(steps["step"])}
    row = {site: i for i, site in enumerate(ids)}
    shares = np.zeros((len(ids), len(column)))
    for site, step, share in zip(cells["site"], cells["step"], cells["share"], strict=True):
        if step in column:
            shares[row[site], column[step]] = share
    loss = [float("nan") if v is None else v for v in steps["loss"]]
    recorded = any(v is not None for v in steps["loss"])
    spikes = find_spikes(loss, steps=steps["step"]) if recorded else []
    return RunFigures(
        status=status,
        steps=steps["step"],
        loss=loss,
        planted=sorted(step for step in planted if step in column),
        spikes=[spike.onset for spike in spikes],
        tokens_per_s=_tokens_per_s(steps),
        sites=sites,
        shares=shares,
    )


def _tokens_per_s(steps: dict[str, list[Any]]) -> float | None:
    """Return the median speed; the first step pays for warming up."""
    speeds = [
        dict(scalars)["tokens"] / ms * 1e3
        for scalars, ms in zip(steps["scalars"], steps["step_ms"], strict=True)
        if ms and scalars and "tokens" in dict(scalars)
    ]
    return float(np.median(speeds[1:])) if len(speeds) > 1 else None
