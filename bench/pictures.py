"""Pictures for the documentation: small SVG files that are light or dark as their reader is.

matplotlib draws in the light colours of our pages. Each is then replaced by a variable of CSS,
which the picture itself sets by `prefers-color-scheme`. It has a ground of its own, to be readable
on a page that does not say which it is. Text stays text, in the reader's own font.
"""

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches, which is 672 pixels."""
INK, SOFT, GRID, EDGE, PAGE, RAISED = (
    "#111827", "#596273", "#e8ebf0", "#c3c9d2", "#ffffff", "#f9fafb",
)  # fmt: skip
DARK = {
    INK: "#e5e7eb", SOFT: "#a3acba", GRID: "#232b38", EDGE: "#475263", PAGE: "#10151d",
    RAISED: "#19202b",
}  # fmt: skip
"""Both are those of the report's pages."""
BLUE, AMBER, GREY, PURPLE = "#3b82f6", "#d97706", "#6b7280", "#a855f7"
"""Contrast 3 to 1 or more with either ground, and told apart by colour-blind readers."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unclamp",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": SOFT,
    "axes.facecolor": PAGE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
    "figure.facecolor": PAGE,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def panels(height: float, columns: int = 1, **settings: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of `WIDTH` by `height` inches and its axes, side by side."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(1, columns, squeeze=False, **settings)
    return figure, list(axes[0])


def canvas(height: float) -> tuple[Figure, Axes]:
    """Return a figure and axes to draw on in points from the top left: 504 wide, `height` high."""
    figure, (ax,) = panels(height / 72)
    figure.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, 72 * WIDTH), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def save(figure: Figure, path: Path, title: str) -> Path:
    """Write a figure as an SVG that follows its reader's theme."""
    raw = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None, "Format": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_themed(raw.getvalue(), title), encoding="utf-8")
    return path


def _shorter(attribute: re.Match[str]) -> str:
    """Return an attribute with hundredths of a point, which are enough."""
    return re.sub(r"(\d\.\d{2})\d+", r"\1", attribute[0])


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', _shorter, svg)
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for number, colour in enumerate(DARK):
        svg = svg.replace(colour, f"var(--c{number})")
    head, body = svg.split(">", 1)
    light, dark = (
        "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))
        for colours in (DARK, DARK.values())
    )
    style = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    svg = f'{head} role="img"><title>{escape(title)}</title><style>{style}</style>{body}'
    return re.sub(r"\n\s*", "\n", svg)
