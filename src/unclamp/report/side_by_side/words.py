"""How the figures of a comparison are written: the same in the terminal and on the page."""

import math

from unclamp.report.side_by_side.comparison import RunRow
from unclamp.report.side_by_side.losses import LossDifference
from unclamp.report.side_by_side.sites import SiteLoss
from unclamp.report.side_by_side.verdict import count
from unclamp.written import percent

DIFFERENCE_COLUMNS = ("arm", "runs", "steps", "loss", "baseline", "difference", "95 %")
RUN_COLUMNS = ("run", "seed", "status", "steps", "final loss", "spikes", "clamped")
SITE_FIGURES = ("clamped casts", "elements", "clamp error", "overshoot", "underflow")


def difference_row(found: LossDifference) -> list[str]:
    """Return an arm against the baseline as cells under `DIFFERENCE_COLUMNS`."""
    shown = found.paired or found.unpaired
    runs = "-"
    if found.paired is not None:
        runs = "1 pair" if found.paired.pairs == 1 else f"{found.paired.pairs} pairs"
    elif found.unpaired is not None:
        runs = f"{found.unpaired.own_runs} and {found.unpaired.other_runs}"
    steps = "-" if found.end_first is None else f"{found.end_first:,} to {found.last:,}"
    ends = found.interval
    return [
        found.arm,
        runs,
        steps,
        _loss(found.own_loss),
        _loss(found.other_loss),
        "-" if shown is None else _signed(shown.mean),
        "-" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}",
    ]


def run_row(run: RunRow) -> list[str]:
    """Return a run as cells under `RUN_COLUMNS`."""
    seed = "-" if run.seed is None else str(run.seed)[:12]
    return [
        run.name,
        seed,
        run.status,
        "-" if run.last is None else f"{run.first:,} to {run.last:,}",
        _loss(run.final_loss),
        f"{len(run.spikes):,}",
        f"{run.saturated:,}" if run.casts else "no cast",
    ]


def site_figures(loss: SiteLoss | None) -> list[str]:
    """Return what an arm lost at a site as cells under `SITE_FIGURES`."""
    if loss is None:
        return ["not there", *["-"] * (len(SITE_FIGURES) - 1)]
    return [
        f"{count(loss.clamped_casts)} of {count(loss.casts)}",
        count(loss.saturated),
        "-" if loss.clamp_error is None else percent(loss.clamp_error),
        "-" if loss.overshoot is None else _times(loss.overshoot),
        percent(loss.underflow_share),
    ]


def _loss(loss: float | None) -> str:
    if loss is None:
        return "-"
    if not math.isfinite(loss):
        return "not finite"
    return f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if math.isfinite(value) else "not finite"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1e4 else f"{ratio:.2g}x"
