"""The chart of a comparison: the losses, and below them their difference from the baseline."""

from bisect import bisect_right
from collections.abc import Sequence

import plotly.graph_objects as go

from unclamp.report.bands import Band
from unclamp.report.charts import COLOURS, add_band, escaped
from unclamp.report.side_by_side.comparison import Comparison

MOST_MARKS = 300


def colours_of(comparison: Comparison) -> dict[str, str]:
    """Return a colour for each curve, the same in chart and table."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(comparison.curves)}


def losses_figure(comparison: Comparison) -> go.Figure:
    """Draw each arm's loss, and below it the differences at common steps over the same axis.

    The values are as recorded, without smoothing. A band is from the lowest to the highest run,
    a triangle a spike, a cross a step whose loss is NaN or Inf, at the last finite loss before it.
    """
    figure = go.Figure()
    colours = colours_of(comparison)
    for name, curve in comparison.curves.items():
        add_band(figure, name, curve, colours[name])
        _add_marks(figure, name, curve, comparison.spikes[name], colours[name], "spike")
        _add_marks(figure, name, curve, comparison.nonfinite[name], colours[name], "NaN or Inf")
    drawn = [found for found in comparison.differences if found.curve.step]
    for found in drawn:
        add_band(figure, found.arm, found.curve, colours[found.arm], axis="y2", what=": difference")
    upper = [0.42, 1.0] if drawn else [0.0, 1.0]
    figure.update_layout(
        height=560 if drawn else 380,
        xaxis={"title": "step", "anchor": "y2" if drawn else "y"},
        yaxis={"domain": upper, "title": "loss"},
    )
    if drawn:
        title = f"loss minus that<br>of {escaped(comparison.baseline)}"
        figure.update_layout(
            yaxis2={"domain": [0.0, 0.34], "title": title, "anchor": "x", "zeroline": True,
                    "zerolinecolor": "#9ca3af"}
        )  # fmt: skip
    return figure


def _add_marks(
    figure: go.Figure, name: str, curve: Band, steps: Sequence[int], colour: str, what: str
) -> None:
    """Mark steps on a curve; where it has no value, at the last one before."""
    if not steps or not curve.step:
        return
    values = dict(zip(curve.step, curve.high, strict=True))
    known = [step for step in curve.step if values[step] == values[step]]
    if not known:
        return
    marks = list(steps)[:MOST_MARKS]
    places = [max(0, bisect_right(known, step) - 1) for step in marks]
    heights = [values[known[place]] for place in places]
    symbol = "triangle-down" if what == "spike" else "x"
    figure.add_scatter(
        x=marks, y=heights, mode="markers", legendgroup=name, showlegend=False, hoverinfo="text",
        hovertext=[f"{escaped(name)}<br>{what} at step {step:,}" for step in marks],
        marker={"symbol": symbol, "size": 9, "color": colour},
    )  # fmt: skip
