"""What other scalings would have done to a run's casts, as the page shows it: reads against clamps.

Only of logs that are read in a moment; `unclamp whatif` asks of any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from unclamp.analysis.whatif import Outcome, WhatIf, evaluate, parse_policy
from unclamp.errors import AnalysisError
from unclamp.runlog import RunLog, has_more_casts
from unclamp.written import counted, percent

POLICIES = tuple(
    parse_policy(text)
    for text in (
        "delayed(1)", "delayed(4)", "delayed(16)", "delayed(64)", "delayed(256)", "delayed(1024)",
        "delayed(16, margin=1)", "delayed(16, margin=2)", "guarded(2)", "guarded(16)",
        "guarded(16, margin=0)", "dynamic",
    )
)  # fmt: skip
MOST_CASTS = 500_000
"""Rows of `casts` beyond which the page does without: a second's work on a slow core."""
FRONTIER_COLUMNS = ("policy", "clamped casts", "re-cast", "reads", "underflow", "")
NEAREST = 1e-4
"""Extra reads that are drawn as none."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy.

    Attributes:
        policy: As it is written; of the run's own, its kinds of scaling.
        reads: Reads an element cast.
        clamped: Clamped casts.
        recast: Share of casts repeated.
        underflow: Mean share of elements that become zero, of inspected casts; None: unknown.
        is_best: Whether none beats it.
        is_own: Whether it is what the run did.
    """

    policy: str
    reads: float
    clamped: int
    recast: float
    underflow: float | None
    is_best: bool = False
    is_own: bool = False


@dataclass(frozen=True, kw_only=True)
class FrontierView:
    """Policies of some sites.

    Attributes:
        sites: The glob that was asked for; "" for all.
        casts: How many casts there are.
        points: What the run did, then the policies by reads.
        limits: What the log cannot know.
    """

    sites: str
    casts: int
    points: list[Point]
    limits: list[str]


def read_frontiers(log: RunLog, *, globs: Sequence[str] = ()) -> list[FrontierView]:
    """Return the frontier of all sites and of each glob; none where the log is long or empty."""
    if has_more_casts(log.sql, MOST_CASTS) or not has_more_casts(log.sql, 0):
        return []
    views = []
    for glob in (None, *globs):
        try:
            found = evaluate(log, POLICIES, site=glob)
        except AnalysisError:  # only counted sites, or a glob of panels alone
            continue
        views.append(_view(found, glob or ""))
    return views


def _view(found: WhatIf, glob: str) -> FrontierView:
    best = {id(outcome) for outcome in found.frontier}
    own = found.recorded
    points = [
        Point(
            policy=f"this run: {', '.join(own.scalings)}",
            reads=own.reads,
            clamped=own.clamped,
            recast=own.recast / max(own.casts, 1),
            underflow=None,
            is_own=True,
        )
    ]
    ordered = sorted(found.outcomes, key=lambda o: (o.reads, o.clamped))
    points += [_point(outcome, is_best=id(outcome) in best) for outcome in ordered]
    return FrontierView(
        sites=glob, casts=found.outcomes[0].casts, points=points, limits=list(found.limits)
    )


def _point(outcome: Outcome, *, is_best: bool) -> Point:
    lost = outcome.lost
    return Point(
        policy=outcome.text,
        reads=outcome.reads,
        clamped=outcome.clamped,
        recast=outcome.recast / max(outcome.casts, 1),
        underflow=None if lost is None else lost.underflow.value,
        is_best=is_best,
    )


def frontier_row(point: Point) -> list[str]:
    """Return a point as cells of the table."""
    return [
        point.policy,
        f"{point.clamped:,}",
        percent(point.recast) if point.recast else "-",
        f"{point.reads:.3f}",
        "-" if point.underflow is None else percent(point.underflow),
        "as recorded" if point.is_own else "none beats it" if point.is_best else "",
    ]


def frontier_figure(view: FrontierView) -> go.Figure:
    """Draw reads beyond the first against clamped casts, both on logarithmic axes with a zero."""
    figure = go.Figure()
    kinds = [
        ("beaten by another", "#9ca3af", "circle-open", lambda p: not (p.is_best or p.is_own)),
        ("none beats it", "#3b82f6", "circle", lambda p: p.is_best),
        ("this run", "#d97706", "diamond", lambda p: p.is_own),
    ]
    for name, colour, symbol, belongs in kinds:
        points = [point for point in view.points if belongs(point)]
        figure.add_scatter(
            x=[_extra(p.reads) for p in points],
            y=[math.log10(1 + p.clamped) for p in points],
            name=name,
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}},
            text=[_hover(p) for p in points],
            hovertemplate="%{text}<extra></extra>",
        )
    most = max(point.clamped for point in view.points)
    counts = [0] + [10**n for n in range(int(math.log10(most + 1)) + 2)]
    shares = (0, 0.001, 0.01, 0.1, 1)
    return figure.update_layout(
        height=340,
        xaxis={
            "title": {"text": "reads an element"},
            "tickvals": [_extra(1 + s) for s in shares],
            "ticktext": [f"{1 + s:g}" for s in shares],
            "range": [-0.2, _extra(2) + 0.2],
        },
        yaxis={
            "title": {"text": f"clamped of {counted(view.casts, 'cast')}"},
            "tickvals": [math.log10(1 + n) for n in counts],
            "ticktext": [f"{n:,}" for n in counts],
            "range": [-0.15, math.log10(1 + most) + 0.3],
        },
        legend={"orientation": "h", "y": 1.12},
    )


def _extra(reads: float) -> float:
    return math.log10(1 + max(reads - 1, 0) / NEAREST)


def _hover(point: Point) -> str:
    lost = "" if point.underflow is None else f", underflow {percent(point.underflow)}"
    clamped = counted(point.clamped, "clamped cast")
    return f"{point.policy}<br>{point.reads:.4f} reads, {clamped}{lost}"
