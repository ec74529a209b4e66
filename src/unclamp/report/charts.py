"""The plots of a page, as plotly figures of a view's data; those of a panel are in sites.js."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from unclamp.report.arms import ScenarioView
from unclamp.report.runs import Event, RunView
from unclamp.report.words import spike_text

COLOURS = ("#4b5563", "#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2", "#be185d")
FONT = "system-ui, sans-serif"
SPIKE, RECOVERY = "rgba(220,38,38,0.22)", "rgba(220,38,38,0.07)"
EVENT_COLOURS = {"planted": "#9ca3af", "switch": "#059669", "snapshot": "#93c5fd",
                 "explain": "#9333ea", "rewind": "#d97706", "nonfinite": "#dc2626"}  # fmt: skip
MOST_BANDS = 200
"""Spikes with a band; of more, those that stand out most."""
MOST_LINES = 60
"""Events of a kind that are drawn as lines; of more, only their marks."""
_SERIES = {"loss": ("loss", "y", "#1d4ed8"), "grad_norm": ("gradient norm", "y2", "#4b5563")}


def run_figure(run: RunView) -> go.Figure:
    """Draw the loss, the gradient norm below it, and a lane of events above, over one axis."""
    figure = go.Figure()
    for name, curve in run.curves.items():
        title, axis, colour = _SERIES[name]
        figure.add_scatter(
            x=curve.step, y=curve.value, name=title, yaxis=axis, mode="lines",
            line={"color": colour, "width": 1.5}, showlegend=False,
            hovertemplate="step %{x}<br>%{y:.4g}<extra>" + title + "</extra>",
        )  # fmt: skip
    shapes = [shape for name in run.curves for shape in _add_spikes(figure, run.spikes, name)]
    shapes += _add_events(figure, run.events)
    both = "grad_norm" in run.curves and "loss" in run.curves
    lane = {"domain": [0.93, 1.0], "visible": False, "fixedrange": True, "range": [-0.5, 1.5]}
    below = {"domain": [0.0, 0.27] if both else [0.0, 0.91], "title": "gradient norm"}
    figure.update_layout(
        height=480 if both else 380,
        shapes=shapes,
        xaxis={"title": "step", "anchor": "y2" if "grad_norm" in run.curves else "y"},
        yaxis={"domain": [0.35 if both else 0.0, 0.91], "title": "loss"},
        yaxis3={**lane, "anchor": "x"},
    )
    if "grad_norm" in run.curves:
        figure.update_layout(yaxis2={**below, "anchor": "x"})
    return figure


def _add_spikes(
    figure: go.Figure, spikes: Sequence[Mapping[str, Any]], series: str
) -> list[dict[str, Any]]:
    """Mark the peaks of a series' spikes and return their bands."""
    title, axis, _ = _SERIES[series]
    spikes = [spike for spike in spikes if spike["series"] == series]
    if not spikes:
        return []
    spikes = sorted(spikes, key=lambda s: -(s["sigmas"] or math.inf))[:MOST_BANDS]
    shapes = []
    for spike in spikes:
        where = {"type": "rect", "yref": f"{axis} domain", "y0": 0, "y1": 1, "layer": "below"}
        begin, end = spike["onset"] - 0.5, spike["end"] + 0.5
        edge = {"width": 1, "color": SPIKE}  # one step of 100,000 is less than a pixel
        shapes.append({**where, "x0": begin, "x1": end, "fillcolor": SPIKE, "line": edge})
        if spike["recovery"] is not None:
            calm = {"fillcolor": RECOVERY, "line": {"width": 0}}
            shapes.append({**where, "x0": end, "x1": max(end, spike["recovery"]), **calm})
    figure.add_scatter(
        x=[spike["peak"] for spike in spikes], y=[_peak(spike) for spike in spikes], yaxis=axis,
        mode="markers", name=f"spike of the {title}", hoverinfo="text",
        hovertext=[f"spike of the {title}<br>{spike_text(spike)}" for spike in spikes],
        marker={"symbol": "triangle-down", "size": 9, "color": "#dc2626"}, showlegend=False,
    )  # fmt: skip
    return shapes


def _peak(spike: Mapping[str, Any]) -> float | None:
    """Return where to mark a spike: its peak, or its level where that is not finite."""
    if spike["level"] is None or spike["height"] is None:
        return spike["level"]
    return spike["level"] * spike["height"]


def _add_events(figure: go.Figure, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Mark events in the lane above the curves and return their lines."""
    lines: list[dict[str, Any]] = []
    for i, kind in enumerate(dict.fromkeys(event.kind for event in events)):
        colour = EVENT_COLOURS.get(kind, COLOURS[(i + 4) % len(COLOURS)])
        found = [event for event in events if event.kind == kind]
        figure.add_scatter(
            x=[event.step for event in found], y=[i % 2] * len(found), yaxis="y3",
            mode="markers", name=kind, hoverinfo="text",
            hovertext=[f"{kind} at step {e.step:,}<br>{_wrapped(e.text)}" for e in found],
            marker={"symbol": "diamond", "size": 8, "color": colour},
        )  # fmt: skip
        style = {"line": {"color": colour, "width": 1, "dash": "dot"}, "layer": "below"}
        lines += [
            {"type": "line", "yref": "paper", "y0": 0, "y1": 0.93, "x0": e.step, "x1": e.step,
             **style}
            for e in (found if len(found) <= MOST_LINES else [])
        ]  # fmt: skip
    return lines


def _wrapped(text: str, width: int = 70) -> str:
    """Break a line of hover text where it may be, with the page's characters escaped."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}"
    escaped = (line.strip().replace("&", "&amp;").replace("<", "&lt;") for line in lines)
    return "<br>".join(escaped)


def replay_figure(losses: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Draw the loss under each counterfactual of a replay; earlier ones are drawn wider.

    Many coincide, and the wider one shows on both sides of the one drawn over it.
    """
    figure = go.Figure()
    for i, (name, curve) in enumerate(losses.items()):
        figure.add_scatter(
            x=curve["step"], y=curve["loss"], name=name, mode="lines+markers",
            line={"color": COLOURS[i % len(COLOURS)], "width": 2 + 5 * (1 - (i + 1) / len(losses))},
            marker={"size": 4},
        )  # fmt: skip
    return figure.update_layout(
        height=320 + 10 * len(losses), xaxis_title="step", yaxis_title="loss"
    )


def arms_figure(scenario: ScenarioView, colours: Mapping[str, str]) -> go.Figure:
    """Draw the loss of each arm: mean, and a band from the lowest to the highest seed."""
    figure = go.Figure()
    for arm, curve in scenario.curves.items():
        colour, steps = colours[arm], curve.step
        band = {"mode": "lines", "legendgroup": arm, "showlegend": False, "hoverinfo": "skip"}
        edge = {"width": 0, "color": colour}
        figure.add_scatter(x=steps, y=curve.high, line=edge, **band)
        figure.add_scatter(
            x=steps, y=curve.low, line=edge, fill="tonexty", opacity=0.15, **band,
            fillcolor=f"rgba{(*_rgb(colour), 0.12)}",
        )  # fmt: skip
        figure.add_scatter(
            x=steps, y=curve.mean, name=arm, legendgroup=arm, mode="lines",
            line={"color": colour, "width": 2},
        )  # fmt: skip
        found = set(scenario.spikes[arm])
        spikes = [(s, m) for s, m in zip(steps, curve.high, strict=True) if s in found]
        if spikes:
            figure.add_scatter(
                x=[s for s, _ in spikes], y=[m for _, m in spikes], mode="markers",
                name=f"{arm}: detected spike", legendgroup=arm, showlegend=False,
                marker={"symbol": "triangle-down", "size": 10, "color": colour},
            )  # fmt: skip
    for step in scenario.planted[:MOST_BANDS]:
        figure.add_vline(x=step, line={"color": "#9ca3af", "width": 1, "dash": "dot"})
    if scenario.planted:
        figure.add_annotation(
            x=scenario.planted[0], y=1, yref="paper", text="planted", showarrow=False,
            xanchor="left", font={"size": 11, "color": "#6b7280"},
        )  # fmt: skip
    return figure.update_layout(
        height=380, xaxis_title="step", yaxis_title="loss (mean, band: lowest to highest seed)"
    )


def heat_figure(
    sites: Sequence[str], steps: Sequence[int], share: np.ndarray, *, window: int = 1
) -> go.Figure:
    """Draw the saturated share, sites by windows of steps; sites that never clamped are left out.

    Args:
        sites: Names of the rows of `share`.
        steps: First steps of its columns.
        share: Fractions, not all of them 0.
        window: Steps a column stands for.
    """
    names = [site.removeprefix("model.") for site in sites]
    rows = [i for i in range(len(names)) if share[i].any()]
    smallest = share[share > 0].min()
    step = "step %{x}" if window == 1 else f"{window} steps from %{{x}}"
    figure = go.Figure(
        go.Heatmap(
            x=steps,
            y=[names[i] for i in rows],
            z=[[_log10(value) for value in share[i]] for i in rows],
            customdata=[[float(f"{value:.3g}") for value in share[i]] for i in rows],
            colorscale="YlOrRd",
            zmin=_log10(smallest),
            zmax=max(_log10(share.max()), _log10(smallest) + 1),
            hovertemplate=f"%{{y}}<br>{step}<br>%{{customdata:.2e}} saturated<extra></extra>",
            colorbar={"title": {"text": "log10 of<br>saturated<br>share"}, "thickness": 14},
        )
    )
    figure.update_layout(height=150 + 18 * len(rows), xaxis_title="step")
    return figure.update_yaxes(
        autorange="reversed", tickfont={"size": 11}, dtick=1, automargin=True
    )


def embed(figure: go.Figure, name: str) -> str:
    """Return a figure as HTML for a page that has plotly, in an element of this name.

    plotly writes the name into HTML and script as it is: it must not hold what others chose.
    """
    if not name.replace("-", "").isalnum():
        raise ValueError(f"expected letters, digits and '-' as an element's name, got {name!r}")
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 12},
        margin={"l": 60, "r": 20, "t": 20, "b": 45},
        hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def _log10(share: float) -> float:
    """Return the colour of a share; NaN, an empty cell, where nothing saturated."""
    return round(math.log10(share), 3) if share > 0 else math.nan


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
