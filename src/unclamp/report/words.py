"""The report's tables: their headings and cells, the same in the terminal and on the page.

How a single figure is written is in `figures`; what the words mean, in `glossary`.
"""

import math
from collections.abc import Mapping
from typing import Any

from unclamp.analysis.counterfactual import SiteShare
from unclamp.analysis.explanation import Verdict
from unclamp.analysis.groups import kind_in_words
from unclamp.analysis.labels import ways
from unclamp.analysis.paired import PairedDifference
from unclamp.analysis.shares import interval, spike_share
from unclamp.names import shown
from unclamp.report.arms import ArmView, ScenarioView
from unclamp.report.recorded import SiteRow
from unclamp.written import listed, loss_text, percent, signed, times

NOTE_MARK = "*"
"""Stands at an arm with notes, and before each of them."""

ARM_COLUMNS = (
    "arm",
    "final loss",
    "difference from dynamic",
    "loss at planted steps vs dynamic",
    "spikes, all seeds: planted + other",
    "clamped elements",
    "clamped casts",
    "re-cast",
    "largest overshoot",
    "underflow",
)
KIND_COLUMNS = ("arm", "kind of batch", "batches a run", "mean loss", "loss vs dynamic")
SITE_COLUMNS = (
    "site",
    "role",
    "scaling",
    "clamped elements",
    "clamped casts",
    "overshoot",
    "clamp error",
    "gradient error",
    "underflow",
    "worst step",
)

TABLE_COLUMNS = (
    ("fqn", "site", "name", "dotted name of the module"),
    ("role", "role", "text", "which operand: input, weight or grad_output"),
    ("scaling", "scaling, format", "scaling", "kind of scaling and FP8 format at the beginning"),
    ("saturated", "clamped elements", "count", "finite elements set to the largest value"),
    ("clamped_casts", "clamped casts", "count", "recorded casts in which anything was clamped; "
     "those of a site in one step and process count as one"),
    ("clamp_error", "clamp error", "share", "share of the tensor's squares that clamping removed, "
     "mean over the casts that clamped"),
    ("grad_error", "gradient error", "share", "how much clamping changed the weight's gradient, of "
     "its size without clamping, over the casts that clamped"),
    ("price", "price of clamping", "price", "how much clamping raised the loss in the step where "
     "it raised it most, to first order, in units of the loss; below 0 it lowered it"),
    ("overshoot", "overshoot", "ratio", "largest amax over the largest representable value, where "
     "anything was clamped"),
    ("underflow_share", "underflow", "share", "non-zero elements that became zero"),
    ("sqnr_db_min", "SQNR dB, min", "decibel", "signal to quantisation noise, smallest of the "
     "inspected casts"),
    ("sqnr_db_mean", "SQNR dB, mean", "decibel", "mean over the inspected casts"),
    ("sqnr_row_db_min", "SQNR dB, rows", "decibel", "median over the tensor's rows, smallest of "
     "the inspected casts: what one huge element does not decide"),
    ("recasts", "re-cast", "count", "casts that guarded scaling repeated"),
    ("nonfinite", "Inf, NaN", "count", "elements that were not finite"),
    ("worst_step", "worst step", "step", "step with the largest clamp error"),
)  # fmt: skip
"""The table of all sites: key of a row, heading, how it is written, and what it means."""
ASSOCIATION_COLUMNS = (
    "site",
    "role",
    "spikes after it",
    "by chance",
    "steps ahead",
    "p",
    "loss after it",
    "95 %",
    "named by",
)


def arm_columns(scenario: ScenarioView) -> list[str]:
    """Return the arm table's headings; what no arm can have is left out."""
    return [column.replace("planted", scenario.mark) for column in _columns(scenario)]


def _columns(scenario: ScenarioView) -> list[str]:
    """Return those of `ARM_COLUMNS` that a scenario has."""
    return [c for c in ARM_COLUMNS if scenario.planted or "planted steps" not in c]


def arm_row(arm: ArmView, scenario: ScenarioView) -> list[str]:
    """Return an arm as cells under `arm_columns`."""
    ratio = "-"
    if arm.planted_ratio is not None:
        mean, low, high = arm.planted_ratio
        ratio = times(mean)
        ratio += f" ({times(low)[:-1]} to {times(high)[:-1]})" if math.isfinite(mean) else ""
    is_unknown = not arm.casts or (arm.undecided_casts > 0 and not arm.clamped_casts)
    no_count = arm.saturated is None or not arm.casts
    cells = {
        "arm": _arm_cell(arm),
        "final loss": "-" if arm.final_loss is None else loss_text(arm.final_loss),
        "difference from dynamic": difference_cell(arm.final_gap, scenario.comparisons),
        "loss at planted steps vs dynamic": ratio,
        "spikes, all seeds: planted + other": f"{arm.planted_spikes} + {arm.other_spikes}",
        "clamped elements": "-" if no_count else f"{arm.saturated:,.0f}",
        "clamped casts": "-" if is_unknown else f"{arm.clamped_casts:,.0f}",
        "re-cast": percent(arm.recasts / arm.casts) if arm.recasts else "-",
        "largest overshoot": "-" if arm.overshoot is None else times(arm.overshoot, 1),
        "underflow": "-" if no_count else percent(arm.underflow_share or 0.0),
    }
    return [cells[column] for column in _columns(scenario)]


def kind_rows(scenario: ScenarioView) -> list[list[str]]:
    """Return the losses by kind of batch as cells under `KIND_COLUMNS`; none without groups."""
    return [
        [
            arm.name,
            kind.group or "without a group",
            f"{kind.batches:,.0f}",
            loss_text(kind.loss),
            _ratio_cell(kind.log_ratio, scenario.comparisons),
        ]
        for arm in scenario.arms
        for kind in arm.kinds
    ]


def _ratio_cell(gap: PairedDifference | None, comparisons: int) -> str:
    """Return a difference of logarithms as a ratio, with its interval if it has one."""
    if gap is None or not math.isfinite(gap.mean):
        return "-" if gap is None else "not finite"
    ratio = times(math.exp(gap.mean))
    if gap.interval is None:
        return f"{ratio} ({'one seed' if gap.pairs == 1 else 'no spread'})"
    low, high = (times(math.exp(end))[:-1] for end in gap.interval)
    word = " differs" if gap.differs_among(comparisons) else " may be chance"
    return f"{ratio} ({low} to {high}){word if gap.verdict == 'differs' else ''}"


def _arm_cell(arm: ArmView) -> str:
    marks = [] if arm.precision == "FP8" else ["no FP8"]
    marks = ["no cast"] if arm.precision == "not known" else marks
    marks += [f"{arm.unfinished} unfinished"] if arm.unfinished else []
    marked = f"{arm.name} ({', '.join(marks)})" if marks else arm.name
    return f"{marked} {NOTE_MARK}" if arm.notes else marked


def arm_notes(scenario: ScenarioView) -> list[str]:
    """Return what must be known beside the table of arms: notes, and which arms have no FP8."""
    plain = [arm.name for arm in scenario.arms if arm.precision == "high precision"]
    said = [f"{NOTE_MARK} {arm.name}: {note}" for arm in scenario.arms for note in arm.notes]
    if plain:
        said.append(f"no FP8: {listed(plain)} trained in high precision, by design.")
    unknown = [arm.name for arm in scenario.arms if arm.precision == "not known"]
    if unknown:
        said.append(f"no cast: whether {listed(unknown)} trained in FP8 is not in the log.")
    return said


def difference_cell(gap: PairedDifference | None, comparisons: int = 1) -> str:
    """Return a difference with its interval, and a word where the interval shows one.

    Among so many comparisons an interval that leaves out 0 may be chance.

    Example:
        >>> from unclamp.analysis.paired import paired_difference
        >>> difference_cell(paired_difference([2.5, 2.61, 2.42], [2.4, 2.5, 2.33]))
        '+0.1 (+0.0752 to +0.125) differs'
        >>> difference_cell(paired_difference([2.5, 2.61, 2.42], [2.4, 2.5, 2.33]), 100)
        '+0.1 (+0.0752 to +0.125) may be chance'
        >>> difference_cell(paired_difference([2.5], [2.4]))
        '+0.1 (one seed)'
    """
    if gap is None:
        return "-"
    if gap.verdict in ("not finite", "equal"):
        return gap.verdict
    if gap.interval is None:
        return f"{signed(gap.mean)} ({'one seed' if gap.pairs == 1 else 'no spread'})"
    low, high = map(signed, gap.interval)
    word = ""
    if gap.verdict == "differs":
        word = " differs" if gap.differs_among(comparisons) else " may be chance"
    return f"{signed(gap.mean)} ({low} to {high}){word}"


def site_row(site: SiteRow) -> list[str]:
    """Return a site as cells under `SITE_COLUMNS`."""
    return [
        shown(site.fqn),
        site.role,
        f"{site.scaling} {site.format}",
        "-" if site.saturated is None else f"{site.saturated:,}",
        "-" if site.undecided_casts and not site.clamped_casts else f"{site.clamped_casts:,}",
        "-" if site.overshoot is None else times(site.overshoot),
        _lost(site, site.clamp_error),
        "-" if site.grad_error is None else percent(site.grad_error),
        _lost(site, site.underflow_share),
        "-" if site.worst_step is None else f"{site.worst_step:,}",
    ]


def _lost(site: SiteRow, share: float | None) -> str:
    """Return a share of what was lost; none of a site whose elements were not counted."""
    return "-" if site.saturated is None else percent(share or 0.0)


def association_row(row: Mapping[str, Any], *, is_relative: bool = True) -> list[str]:
    """Return a site's association as cells under `ASSOCIATION_COLUMNS`; "-" for what is missing.

    With `is_relative` a change of the loss is a fraction of its level, else in the loss's units.
    """
    low, high = (_change(row.get(end), is_relative) for end in ("low", "high"))
    return [
        _fqn(row),
        str(row.get("role") or "-"),
        _plain(row.get("hits")),
        _plain(row.get("expected_hits")),
        _plain(row.get("lag")),
        _plain(row.get("p")),
        _change(row.get("loss_change"), is_relative),
        "-" if "-" in (low, high) else f"{low} to {high}",
        str(row.get("by") or "-"),
    ]


def explanation_columns(verdict: Verdict | None) -> list[str]:
    """Return the headings of the shares of a replayed spike."""
    return ["site", "role", "caused", "range", *(f"only it {way}" for way in ways(verdict))]


def explanation_row(row: SiteShare) -> list[str]:
    """Return a site's share of a replayed spike as cells under `explanation_columns`."""
    shares = spike_share(row.share), interval(row), spike_share(row.only), spike_share(row.last)
    return [shown(row.fqn), row.role, *shares]


def _fqn(row: Mapping[str, Any]) -> str:
    fqn = row.get("fqn")
    return "-" if fqn is None else shown(str(fqn))


SERIES = {"loss": "loss", "grad_norm": "gradient norm"}
"""What a series is called where people read."""


def spike_text(spike: Mapping[str, Any]) -> str:
    """Return a spike as one line: its steps and its height."""
    recovery = "never" if spike["recovery"] is None else f"{spike['recovery']:,}"
    how = "" if spike["height"] is None else f", {times(spike['height'])} its level"
    how = ", not finite" if spike["kind"] == "nonfinite" else how
    among = f", among {kind_in_words(spike['group'])}" if spike.get("group") else ""
    return (
        f"onset {spike['onset']:,}, peak {spike['peak']:,}, end {spike['end']:,}, "
        f"recovery {recovery}{how}{among}"
    )


def shortened(name: str, width: int) -> str:
    """Return a name cut in its middle to at most `width` characters, the tail kept longer.

    Example:
        >>> shortened("model.layers.0.mlp.down_proj", 20)
        'model.l…lp.down_proj'
    """
    if len(name) <= width:
        return name
    tail = max(1, (width - 1) * 2 // 3)
    return f"{name[: max(0, width - 1 - tail)]}…{name[-tail:]}"


def _plain(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else "-"


def _change(value: object, is_relative: bool) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{100 * value:+.3g} %" if is_relative else f"{value:+.3g}"
