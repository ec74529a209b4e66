"""A comparison of runs as one self-contained page: no network, no server."""

from pathlib import Path

from markupsafe import Markup

from unclamp.names import shown
from unclamp.report.charts import embed
from unclamp.report.glossary import GLOSSARY
from unclamp.report.rendering import render_page
from unclamp.report.side_by_side.chart import colours_of, losses_figure
from unclamp.report.side_by_side.comparison import Comparison
from unclamp.report.side_by_side.words import (
    DIFFERENCE_COLUMNS,
    KIND_COLUMNS,
    RUN_COLUMNS,
    SITE_FIGURES,
    difference_row,
    kind_row,
    run_row,
    site_figures,
)

MOST_SITES = 100
TERMS = ("site", "cast", "clamped", "clamp error", "overshoot", "underflow")
"""Words of the report's glossary that the page uses; what is its own is in the template."""


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write a comparison's page and return its path; replaces an older one at once.

    Raises:
        OSError: The disk refuses.
    """
    telling = [row for row in comparison.sites if row.is_clamped]
    has_losses = any(curve.step for curve in comparison.curves.values())
    return render_page(
        "sides.html.j2",
        path,
        comparison=comparison,
        arms=list(comparison.arms),
        chart=Markup(embed(losses_figure(comparison), "losses")) if has_losses else "",
        colours=colours_of(comparison),
        difference_columns=DIFFERENCE_COLUMNS,
        difference_rows=[difference_row(found) for found in comparison.differences],
        kind_columns=KIND_COLUMNS,
        kind_rows=[kind_row(found) for found in comparison.kinds],
        run_columns=RUN_COLUMNS,
        run_rows=[(run, run_row(run)) for run in comparison.runs],
        site_columns=SITE_FIGURES,
        sites=[
            (
                shown(row.fqn),
                row.role,
                [(arm, site_figures(loss)) for arm, loss in row.arms.items()],
            )
            for row in telling[:MOST_SITES]
        ],
        more_sites=max(0, len(telling) - MOST_SITES),
        terms=[term for term in GLOSSARY if term.word in TERMS],
    )
