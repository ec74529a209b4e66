"""How the report's figures are written: the same in the terminal and on the page."""

import math
from collections.abc import Mapping
from typing import Any

from unclamp.analysis.counterfactual import SiteShare
from unclamp.analysis.shares import interval, spike_share
from unclamp.names import shown
from unclamp.report.arms import ArmView, ScenarioView
from unclamp.report.recorded import SiteRow

ARM_COLUMNS = (
    "arm",
    "final loss",
    "loss at planted steps vs dynamic",
    "spikes: planted + other",
    "saturated elements",
    "clamped casts",
    "re-cast",
    "largest overshoot",
    "underflow",
    "tokens/s",
)
SITE_COLUMNS = (
    "site",
    "role",
    "scaling",
    "saturated",
    "clamped casts",
    "overshoot",
    "clamp error",
    "underflow",
    "worst step",
)

TABLE_COLUMNS = (
    ("fqn", "site", "name", "dotted name of the module"),
    ("role", "role", "text", "which operand: input, weight or grad_output"),
    ("scaling", "scaling, format", "scaling", "kind of scaling and FP8 format at the beginning"),
    ("saturated", "saturated", "count", "finite elements clamped to the largest value"),
    ("clamped_casts", "clamped casts", "count", "recorded casts in which anything was clamped"),
    ("clamp_error", "clamp error", "share", "share of the tensor's squares that clamping removed, "
     "mean over the casts that clamped"),
    ("overshoot", "overshoot", "ratio", "largest amax over the largest representable value"),
    ("underflow_share", "underflow", "share", "non-zero elements that became zero"),
    ("sqnr_db_min", "SQNR dB, min", "decibel", "signal to quantisation noise, smallest of the "
     "inspected casts"),
    ("sqnr_db_mean", "SQNR dB, mean", "decibel", "mean over the inspected casts"),
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
EXPLANATION_COLUMNS = ("site", "role", "caused", "range", "only it free", "only it clamped")


def arm_columns(scenario: ScenarioView) -> list[str]:
    """Return the arm table's headings; what no arm can have is left out."""
    return [c for c in ARM_COLUMNS if scenario.planted or "planted steps" not in c]


def arm_row(arm: ArmView, scenario: ScenarioView) -> list[str]:
    """Return an arm as cells under `arm_columns`."""
    loss = "-" if arm.final_loss is None else _number(arm.final_loss, ".4f")
    if arm.final_loss_spread is not None and math.isfinite(arm.final_loss_spread):
        loss += f" ± {arm.final_loss_spread:.4f}"
    ratio = "-"
    if arm.planted_ratio is not None:
        mean, low, high = arm.planted_ratio
        ratio = _number(mean, ".2f")
        ratio += f"x ({low:.2f} to {high:.2f})" if math.isfinite(mean) else ""
    cells = {
        "arm": arm.name + (f" ({arm.unfinished} unfinished)" if arm.unfinished else ""),
        "final loss": loss,
        "loss at planted steps vs dynamic": ratio,
        "spikes: planted + other": f"{arm.planted_spikes} + {arm.other_spikes}",
        "saturated elements": f"{arm.saturated:,.0f}",
        "clamped casts": f"{arm.clamped_casts:,.0f}",
        "re-cast": percent(arm.recasts / arm.casts) if arm.recasts else "-",
        "largest overshoot": f"{arm.overshoot:.1f}x" if arm.overshoot else "-",
        "underflow": percent(arm.underflow_share) if arm.overshoot else "-",
        "tokens/s": "-" if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}",
    }
    return [cells[column] for column in arm_columns(scenario)]


def site_row(site: SiteRow) -> list[str]:
    """Return a site as cells under `SITE_COLUMNS`."""
    return [
        shown(site.fqn),
        site.role,
        f"{site.scaling} {site.format}",
        f"{site.saturated:,}",
        f"{site.clamped_casts:,}",
        "-" if site.overshoot is None else f"{site.overshoot:.2f}x",
        percent(site.clamp_error or 0.0),
        percent(site.underflow_share or 0.0),
        "-" if site.worst_step is None else f"{site.worst_step:,}",
    ]


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


def explanation_row(row: SiteShare) -> list[str]:
    """Return a site's share of a replayed spike as cells under `EXPLANATION_COLUMNS`."""
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
    how = "" if spike["height"] is None else f", {spike['height']:.2f}x its level"
    how = ", not finite" if spike["kind"] == "nonfinite" else how
    return (
        f"onset {spike['onset']:,}, peak {spike['peak']:,}, end {spike['end']:,}, "
        f"recovery {recovery}{how}"
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


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"


def _plain(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else "-"


def _change(value: object, is_relative: bool) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{100 * value:+.3g} %" if is_relative else f"{value:+.3g}"


def percent(share: float) -> str:
    """Return a fraction as percent with three figures."""
    return f"{100 * share:.3g} %"
