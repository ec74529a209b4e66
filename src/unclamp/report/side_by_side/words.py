"""How the figures of a comparison are written: the same in the terminal and on the page."""

import math

from unclamp.report.side_by_side.comparison import RunRow
from unclamp.report.side_by_side.kinds import KindDifference
from unclamp.report.side_by_side.losses import LossDifference
from unclamp.report.side_by_side.sites import SiteLoss
from unclamp.report.side_by_side.verdict import count
from unclamp.written import counted, loss_text, percent, signed, times

DIFFERENCE_COLUMNS = ("arm", "runs", "steps", "loss", "baseline", "difference", "95 %")
RUN_COLUMNS = ("run", "seed", "status", "steps", "final loss", "spikes", "clamped")
KIND_COLUMNS = (
    "arm",
    "kind of batch",
    "batches",
    "loss",
    "baseline",
    "ratio",
    "fell, times as fast",
)
SITE_FIGURES = ("clamped casts", "elements", "clamp error", "overshoot", "underflow")


def difference_row(found: LossDifference) -> list[str]:
    """Return an arm against the baseline as cells under `DIFFERENCE_COLUMNS`."""
    shown = found.paired or found.unpaired
    runs = "-"
    if found.paired is not None:
        runs = counted(found.paired.pairs, "pair")
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
        "-" if shown is None else signed(shown.mean),
        "-" if ends is None else f"{signed(ends[0])} to {signed(ends[1])}",
    ]


def kind_row(found: KindDifference) -> list[str]:
    """Return an arm against the baseline among one kind's batches, under `KIND_COLUMNS`."""
    shown = found.paired or found.unpaired
    ratio = pace = "-"
    if shown is not None and math.isfinite(shown.mean):
        ratio = times(math.exp(shown.mean))
        if shown.interval is not None:
            low, high = (times(math.exp(end))[:-1] for end in shown.interval)
            ratio += f" ({low} to {high})"
    if found.pace is not None and found.pace.interval is not None:
        low, high = found.pace.interval
        pace = f"{found.pace.ratio:.2g} ({low:.2g} to {high:.2g})"
    return [
        found.arm,
        found.group or "without a group",
        f"{found.batches:,}",
        _loss(found.own_loss),
        _loss(found.other_loss),
        ratio,
        pace,
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
        _clamped(run),
    ]


def _clamped(run: RunRow) -> str:
    if not run.casts:
        return "no cast"
    return "not counted" if run.saturated is None else f"{run.saturated:,}"


def site_figures(loss: SiteLoss | None) -> list[str]:
    """Return what an arm lost at a site as cells under `SITE_FIGURES`."""
    if loss is None:
        return ["not there", *["-"] * (len(SITE_FIGURES) - 1)]
    return [
        f"{count(loss.clamped_casts)} of {count(loss.casts)}",
        "-" if loss.saturated is None else count(loss.saturated),
        "-" if loss.clamp_error is None else percent(loss.clamp_error),
        "-" if loss.overshoot is None else times(loss.overshoot),
        "-" if loss.underflow_share is None else percent(loss.underflow_share),
    ]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else loss_text(loss)
