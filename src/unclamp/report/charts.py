"""The plots of a page, as plotly figures of a view's data; those of a panel are in sites.js."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from unclamp.report.arms import ScenarioView
from unclamp.report.bands import Band
from unclamp.report.runs import Event, RunView
from unclamp.report.words import spike_text
from unclamp.written import percent

COLOURS = ("#6b7280", "#3b82f6", "#ef4444", "#059669", "#a855f7", "#d97706", "#0891b2", "#db2777")
"""Of arms: each has a contrast of 3 to 1 or more with white and with a dark page."""
KIND_COLOURS = ("#3b82f6", "#d97706", "#059669", "#a855f7", "#0891b2", "#db2777", "#6b7280")
"""Of kinds of batches; red is for spikes."""
CLEAR = "rgba(0,0,0,0)"
PLANTED, SPIKE_LINE = "#9ca3af", "#ef4444"
HEAT = "Plasma"
"""Even to the eye. A light page begins with its light end, a dark one with its dark end, each
cut where it would fade into the page."""
LIGHT_HEAT, DARK_HEAT = (0.82, 0.0), (0.32, 1.0)
FONT = "system-ui, sans-serif"
SPIKE, RECOVERY = "rgba(220,38,38,0.22)", "rgba(220,38,38,0.07)"
DRIFT, DRIFT_HEIGHT = "rgba(217,119,6,0.6)", 0.025
EVENT_COLOURS = {"planted": PLANTED, "few-label": PLANTED, "switch": "#059669",
                 "autopilot": "#0d9488",
                 "snapshot": "#93c5fd", "explain": "#9333ea", "rewind": "#d97706",
                 "nonfinite": "#dc2626"}  # fmt: skip
USUAL = 1.6
"""Differences are shown up to so many times those that 95 % of the steps stay within."""
MOST_BANDS = 200
"""Spikes with a band; of more, those that stand out most."""
MOST_LINES = 60
"""Events of a kind that are drawn as lines; of more, only their marks."""
_SERIES = {"loss": ("loss", "y", "#3b82f6"), "grad_norm": ("gradient norm", "y2", "#6b7280")}


def run_figure(run: RunView) -> go.Figure:
    """Draw the loss, the gradient norm below it, and a lane of events above, over one axis."""
    figure = go.Figure()
    for i, (kind, curve) in enumerate(run.kind_curves.items()):
        figure.add_scatter(
            x=curve.step, y=curve.value, name=escaped(kind), mode="lines",
            line={"color": KIND_COLOURS[i % len(KIND_COLOURS)], "width": 1.5},
            hovertemplate="step %{x}<br>%{y:.4g}<extra>" + escaped(kind) + "</extra>",
        )  # fmt: skip
    for name, curve in run.curves.items():
        if name == "loss" and run.kind_curves:
            continue
        title, axis, colour = _SERIES[name]
        figure.add_scatter(
            x=curve.step, y=curve.value, name=title, yaxis=axis, mode="lines",
            line={"color": colour, "width": 1.5}, showlegend=False,
            hovertemplate="step %{x}<br>%{y:.4g}<extra>" + title + "</extra>",
        )  # fmt: skip
    shapes = [shape for name in run.curves for shape in _add_spikes(figure, run.spikes, name)]
    shapes += [_drift_band(drift) for drift in run.divergences]
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
        marker={"symbol": "triangle-down", "size": 9, "color": SPIKE_LINE}, showlegend=False,
    )  # fmt: skip
    return shapes


def _drift_band(drift: Mapping[str, Any]) -> dict[str, Any]:
    """Return a band at the foot of the loss, as long as its slow divergence."""
    return {"type": "rect", "yref": "y domain", "y0": 0, "y1": DRIFT_HEIGHT, "layer": "below",
            "x0": drift["onset"] - 0.5, "x1": drift["end"] + 0.5, "fillcolor": DRIFT,
            "line": {"width": 0}, "name": "slow divergence"}  # fmt: skip


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
    return "<br>".join(escaped(line.strip()) for line in lines)


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
    """Draw the loss of each arm: mean, and a band from the lowest to the highest seed.

    Below, over the same steps, its difference from the dynamic arm on the same seed, where there
    is one: curves of arms lie so close that the losses alone show only spikes.
    """
    figure = go.Figure()
    for arm, curve in scenario.curves.items():
        add_band(figure, arm, curve, colours[arm])
        found = set(scenario.spikes[arm])
        spikes = [(s, m) for s, m in zip(curve.step, curve.high, strict=True) if s in found]
        if spikes:
            figure.add_scatter(
                x=[s for s, _ in spikes], y=[m for _, m in spikes], mode="markers",
                name=f"{arm}: detected spike", legendgroup=arm, showlegend=False,
                marker={"symbol": "triangle-down", "size": 10, "color": colours[arm]},
            )  # fmt: skip
    for arm, curve in scenario.differences.items():
        add_band(figure, arm, curve, colours[arm], axis="y2", what=" minus dynamic")
    both = bool(scenario.differences)
    figure.update_layout(
        height=540 if both else 380,
        shapes=_lines(scenario.planted, PLANTED),
        xaxis={"title": "step", "anchor": "y2" if both else "y"},
        yaxis={"title": "loss", "domain": [0.4 if both else 0.0, 1.0]},
    )
    if both:
        below = {"domain": [0.0, 0.33], "anchor": "x", "zeroline": True, "zerolinewidth": 2}
        figure.update_layout(yaxis2={**below, "title": "minus dynamic"})
        figure.update_layout(yaxis2_range=difference_range(scenario))
    if scenario.planted:
        figure.add_annotation(
            x=scenario.planted[0], y=1, yref="paper", text=scenario.mark, showarrow=False,
            xanchor="left", yanchor="top", font={"size": 11},
        )  # fmt: skip
    return figure


def difference_range(scenario: ScenarioView) -> list[float] | None:
    """Return the range of differences to show; None for all of them.

    A planted step moves an arm a hundred times as far as all else, and a chart with room for it
    would show a line at 0. What is cut off stands in the chart of losses.
    """
    planted = set(scenario.planted)
    ends = [
        max(abs(low), abs(high))
        for band in scenario.differences.values()
        for step, low, high in zip(band.step, band.low, band.high, strict=True)
        if math.isfinite(low) and math.isfinite(high) and step not in planted
    ]
    usual = USUAL * float(np.quantile(ends, 0.95)) if ends else 0.0
    if usual == 0 or (max(ends) <= usual and not planted):
        return None
    return [-usual, usual]


def add_band(
    figure: go.Figure, name: str, curve: Band, colour: str, *, axis: str = "y", what: str = ""
) -> None:
    """Draw a mean, and a band around it where the lowest and the highest differ.

    Args:
        figure: To draw into.
        name: Of the curve, as others chose it; only those of the upper axis stand in the legend.
        curve: The values.
        colour: As #rrggbb.
        axis: "y", or "y2" for the lower one.
        what: Follows the name where the pointer is.
    """
    is_upper, shown_name = axis == "y", escaped(name)
    same = {"legendgroup": name, "yaxis": axis, "mode": "lines", "x": curve.step}
    if curve.low != curve.high:
        edge = {"width": 0, "color": colour}
        hidden = {"showlegend": False, "hoverinfo": "skip", "line": edge}
        figure.add_scatter(y=curve.high, **same, **hidden)
        fill = f"rgba{(*_rgb(colour), 0.13)}"
        figure.add_scatter(y=curve.low, fill="tonexty", fillcolor=fill, **same, **hidden)
    figure.add_scatter(
        y=curve.mean, name=shown_name, showlegend=is_upper,
        line={"color": colour, "width": 1.8 if is_upper else 1.5},
        hovertemplate="step %{x}<br>%{y:.4~g}<extra>" + shown_name + what + "</extra>", **same,
    )  # fmt: skip


def escaped(text: str) -> str:
    """Return text that a chart shows as it is: plotly reads some of HTML in names."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _lines(steps: Sequence[int], colour: str, *, layer: str = "below") -> list[dict[str, Any]]:
    """Return a thin line over the whole height at each step; of very many, the first."""
    style = {"line": {"color": colour, "width": 1, "dash": "dot"}, "layer": layer}
    return [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": step, "x1": step, **style}
        for step in steps[:MOST_BANDS]
    ]


def heat_figure(
    sites: Sequence[str],
    steps: Sequence[int],
    share: np.ndarray,
    *,
    window: int = 1,
    planted: Sequence[int] = (),
    spikes: Sequence[int] = (),
) -> go.Figure:
    """Draw the clamped share, sites by windows of steps; sites that never clamped are left out.

    Args:
        sites: Names of the rows of `share`.
        steps: First steps of its columns.
        share: Fractions, not all of them 0.
        window: Steps a column stands for.
        planted: Steps to mark with a grey line.
        spikes: Steps at which a spike of the loss begins, to mark with a red line.
    """
    names = [site.removeprefix("model.") for site in sites]
    rows = [i for i in range(len(names)) if share[i].any()]
    smallest = share[share > 0].min()
    centre = (window - 1) / 2  # plotly centres a column on its x
    begins = "step %{x}" if window == 1 else f"{window} steps from %{{customdata[1]}}"
    figure = go.Figure(
        go.Heatmap(
            x=[step + centre for step in steps] if window > 1 else list(steps),
            y=[names[i] for i in rows],
            z=[[_log10(value) for value in share[i]] for i in rows],
            customdata=[
                [[_rounded(value), step] for value, step in zip(share[i], steps, strict=True)]
                for i in rows
            ],
            colorscale=heat_scale(*LIGHT_HEAT),
            zmin=_log10(smallest),
            zmax=max(_log10(share.max()), _log10(smallest) + 1),
            hovertemplate=f"%{{y}}<br>{begins}<br>share clamped: %{{customdata[0]}}<extra></extra>",
            colorbar={
                "title": {"text": "clamped<br>share"},
                "thickness": 14,
                **_decades(_log10(smallest), _log10(share.max())),
            },
        )
    )
    # What the page's script takes on a dark page, and the names that it may shorten.
    meta = {
        "light": heat_scale(*LIGHT_HEAT),
        "dark": heat_scale(*DARK_HEAT),
        "title": "clamped<br>share",
    }
    lines = _lines(planted, PLANTED, layer="above") + _lines(spikes, SPIKE_LINE, layer="above")
    figure.update_layout(
        height=150 + 18 * len(rows), xaxis_title="step", meta={"heat": meta}, shapes=lines
    )
    if len(steps):  # a line at a step without clamping does not widen the axis
        figure.update_xaxes(range=[steps[0] - 0.5, steps[-1] + window - 0.5])
    return figure.update_yaxes(
        autorange="reversed", tickfont={"size": 11}, dtick=1, automargin=True, showgrid=False
    )


def heat_scale(begin: float, end: float) -> list[list[Any]]:
    """Return the colours of a heat map, of `HEAT` from one place to another."""
    at = np.linspace(0, 1, 9)
    colours = sample_colorscale(HEAT, list(begin + (end - begin) * at))
    return [[float(x), colour] for x, colour in zip(at, colours, strict=True)]


def _decades(low: float, high: float) -> dict[str, Any]:
    """Return ticks of a colour bar of logarithms: powers of ten, written as shares."""
    first, last = math.floor(low), math.ceil(high)
    ticks = [tick for tick in range(first, last + 1) if low - 0.05 <= tick <= max(high, low + 1)]
    names = [percent(10.0**tick) for tick in ticks]
    return {"tickvals": ticks, "ticktext": names}


def embed(figure: go.Figure, name: str) -> str:
    """Return a figure as HTML for a page that has plotly, in an element of this name.

    plotly writes the name into HTML and script as it is: it must not hold what others chose. The
    page's script gives it the colours and the layout of the reader's screen.
    """
    if not name.replace("-", "").isalnum():
        raise ValueError(f"expected letters, digits and '-' as an element's name, got {name!r}")
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 12},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        margin={"l": 60, "r": 20, "t": 20, "b": 45},
        hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def _log10(share: float) -> float:
    """Return the colour of a share; NaN, an empty cell, where nothing was clamped."""
    return round(math.log10(share), 3) if share > 0 else math.nan


def _rounded(share: float) -> str:
    """Return a share for hover text; nothing where there is none, which is most of a map."""
    return percent(share) if share > 0 else ""


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
