"""How the report's figures are written: the same in the terminal and on the page."""

from typing import Any

from unclamp.report.view import ArmView, ScenarioView

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


def arm_columns(scenario: ScenarioView) -> list[str]:
    """Return the arm table's headings; what no arm can have is left out."""
    return [c for c in ARM_COLUMNS if scenario.planted or "planted steps" not in c]


def arm_row(arm: ArmView, scenario: ScenarioView) -> list[str]:
    """Return an arm as cells under `arm_columns`."""
    loss = "-" if arm.final_loss is None else f"{arm.final_loss:.4f}"
    if arm.final_loss_spread is not None:
        loss += f" ± {arm.final_loss_spread:.4f}"
    ratio = "-"
    if arm.planted_ratio is not None:
        mean, low, high = arm.planted_ratio
        ratio = f"{mean:.2f}x ({low:.2f} to {high:.2f})"
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


def site_row(site: dict[str, Any]) -> list[str]:
    """Return a site as cells under `SITE_COLUMNS`."""
    return [
        site["fqn"],
        site["role"],
        f"{site['scaling']} {site['format']}",
        f"{site['saturated']:,}",
        f"{site['clamped_casts']:,}",
        f"{site['overshoot']:.2f}x",
        percent(site["clamp_error"]),
        percent(site["underflow_share"]),
        str(site["worst_step"]),
    ]


def percent(share: float) -> str:
    """Return a fraction as percent with three figures."""
    return f"{100 * share:.3g} %"
