"""The heat map of a page that shows which rank overshot when."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from unclamp.report.charts import DARK_HEAT, LIGHT_HEAT, heat_scale
from unclamp.written import times


def ranks_figure(
    ranks: Sequence[int],
    steps: Sequence[int],
    overshoot: Sequence[Sequence[float | None]],
    *,
    window: int = 1,
) -> go.Figure:
    """Draw the largest overshoot, ranks by windows of steps; empty where it is 1 or less.

    Args:
        ranks: Of the rows.
        steps: First steps of the columns.
        overshoot: A row a rank, None in a window without casts.
        window: Steps a column stands for.
    """
    begins = "step %{x}" if window == 1 else f"{window} steps from %{{customdata[1]}}"
    most = max((v for row in overshoot for v in row if v is not None), default=1.0)
    top = max(math.log10(max(most, 1.0)), 0.3)
    tops = [1.0, 1.5, 2.0, 3.0, 5.0, *(m * 10.0**e for e in range(1, 40) for m in (1, 3))]
    ticks = [value for value in tops if math.log10(value) <= top]
    figure = go.Figure(
        go.Heatmap(
            x=[step + (window - 1) / 2 for step in steps] if window > 1 else list(steps),
            y=[f"rank {rank}" for rank in ranks],
            z=[
                [math.log10(v) if v is not None and v > 1 else None for v in row]
                for row in overshoot
            ],
            customdata=[
                [
                    ["no cast" if v is None else times(v), step]
                    for v, step in zip(row, steps, strict=True)
                ]
                for row in overshoot
            ],
            colorscale=heat_scale(*LIGHT_HEAT),
            zmin=0,
            zmax=top,
            hovertemplate=f"%{{y}}<br>{begins}<br>overshoot: %{{customdata[0]}}<extra></extra>",
            colorbar={
                "title": {"text": "overshoot"},
                "thickness": 14,
                "tickvals": [math.log10(tick) for tick in ticks],
                "ticktext": [f"{tick:g}" for tick in ticks],
            },
        )
    )
    meta = {
        "light": heat_scale(*LIGHT_HEAT),
        "dark": heat_scale(*DARK_HEAT),
        "title": "overshoot",
    }
    figure.update_layout(height=170 + 18 * len(ranks), xaxis_title="step", meta={"heat": meta})
    if len(steps):
        figure.update_xaxes(range=[steps[0] - 0.5, steps[-1] + window - 0.5])
    return figure.update_yaxes(
        autorange="reversed", tickfont={"size": 11}, dtick=1, automargin=True, showgrid=False
    )
