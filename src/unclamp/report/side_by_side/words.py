"""How the figures of a comparison are written: the same in the terminal and on the page."""

from unclamp.report.side_by_side.comparison import RunRow
from unclamp.report.side_by_side.losses import LossDifference
from unclamp.report.side_by_side.sites import SiteLoss
from unclamp.report.side_by_side.verdict import count
from unclamp.written import counted, loss_text, percent, signed, times

DIFFERENCE_COLUMNS = ("arm", "runs", "steps", "loss", "baseline", "difference", "95 %")
RUN_COLUMNS = ("run", "seed", "status", "steps", "final loss", "spikes", "clamped")
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
        "-" if loss.overshoot is None else times(loss.overshoot),
        percent(loss.underflow_share),
    ]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else loss_text(loss)
