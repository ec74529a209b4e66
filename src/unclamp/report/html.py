"""The report as one self-contained page: no network, no server."""

import math
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from unclamp.report.view import ScenarioView, View
from unclamp.report.words import SITE_COLUMNS, arm_columns, arm_row, site_row

COLOURS = ("#4b5563", "#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2", "#be185d")
FONT = "system-ui, sans-serif"


def write_page(view: View, path: Path) -> Path:
    """Write a report's page and return its path; replaces an older one at once."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unclamp.report"), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html.j2").render(
        view=view,
        scenarios=[_scenario(scenario) for scenario in view.scenarios],
        site_columns=SITE_COLUMNS,
        plotly_js=get_plotlyjs(),
    )
    part = path.with_name(f".{path.name}.part")
    part.write_text(page, encoding="utf-8")
    return part.replace(path)


def _scenario(scenario: ScenarioView) -> dict[str, Any]:
    colours = {arm.name: COLOURS[i % len(COLOURS)] for i, arm in enumerate(scenario.arms)}
    clamped = [arm for arm, heat in scenario.heat.items() if heat["share"].any()]
    return {
        "name": scenario.name,
        "description": scenario.description,
        "findings": scenario.findings,
        "arm_columns": arm_columns(scenario),
        "arm_rows": [arm_row(arm, scenario) for arm in scenario.arms],
        "colours": list(colours.values()),
        "loss": _embed(_loss_figure(scenario, colours), f"loss-{scenario.name}"),
        "heats": [
            (arm, _embed(_heat_figure(scenario.heat[arm]), f"heat-{scenario.name}-{arm}"))
            for arm in clamped
        ],
        "calm": [arm.name for arm in scenario.arms if arm.name not in clamped],
        "worst": [
            (arm, [site_row(site) for site in sites])
            for arm, sites in scenario.worst.items()
            if sites
        ],
    }


def _loss_figure(scenario: ScenarioView, colours: dict[str, str]) -> go.Figure:
    figure = go.Figure()
    for arm, curve in scenario.curves.items():
        colour, steps = colours[arm], curve["step"]
        band = {"mode": "lines", "legendgroup": arm, "showlegend": False, "hoverinfo": "skip"}
        edge = {"width": 0, "color": colour}
        figure.add_scatter(x=steps, y=curve["high"], line=edge, **band)
        figure.add_scatter(
            x=steps, y=curve["low"], line=edge, fill="tonexty", opacity=0.15, **band,
            fillcolor=f"rgba{(*_rgb(colour), 0.12)}",
        )  # fmt: skip
        figure.add_scatter(
            x=steps, y=curve["mean"], name=arm, legendgroup=arm, mode="lines",
            line={"color": colour, "width": 2},
        )  # fmt: skip
        spikes = [(s, m) for s, m in zip(steps, curve["high"], strict=True)
                  if s in scenario.spikes[arm]]  # fmt: skip
        if spikes:
            figure.add_scatter(
                x=[s for s, _ in spikes], y=[m for _, m in spikes], mode="markers",
                name=f"{arm}: detected spike", legendgroup=arm, showlegend=False,
                marker={"symbol": "triangle-down", "size": 10, "color": colour},
            )  # fmt: skip
    for step in scenario.planted:
        figure.add_vline(x=step, line={"color": "#9ca3af", "width": 1, "dash": "dot"})
    if scenario.planted:
        figure.add_annotation(
            x=scenario.planted[0], y=1, yref="paper", text="planted", showarrow=False,
            xanchor="left", font={"size": 11, "color": "#6b7280"},
        )  # fmt: skip
    figure.update_layout(
        height=380, xaxis_title="step", yaxis_title="loss (mean, band: lowest to highest seed)"
    )
    return figure


def _heat_figure(heat: dict[str, Any]) -> go.Figure:
    share = heat["share"]
    sites = [site.removeprefix("model.") for site in heat["sites"]]
    rows = [i for i in range(len(sites)) if share[i].any()]
    smallest = share[share > 0].min()
    figure = go.Figure(
        go.Heatmap(
            x=heat["steps"],
            y=[sites[i] for i in rows],
            z=[[_log10(value) for value in share[i]] for i in rows],
            customdata=share[rows],
            colorscale="YlOrRd",
            zmin=_log10(smallest),
            zmax=max(_log10(share.max()), _log10(smallest) + 1),
            hovertemplate="%{y}<br>step %{x}<br>%{customdata:.2e} saturated<extra></extra>",
            colorbar={"title": {"text": "log10 of<br>saturated<br>share"}},
        )
    )
    figure.update_layout(height=150 + 18 * len(rows), xaxis_title="step")
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11}, dtick=1, automargin=True)
    return figure


def _log10(share: float) -> float:
    """Return the colour of a share; NaN, an empty cell, where nothing saturated."""
    return math.log10(share) if share > 0 else math.nan


def _embed(figure: go.Figure, name: str) -> str:
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 12},
        margin={"l": 60, "r": 20, "t": 20, "b": 45},
        hovermode="closest",
        legend={"orientation": "h", "y": 1.12},
    )
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
