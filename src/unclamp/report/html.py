"""The report as one self-contained page: no network, no server."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from unclamp.files import to_json
from unclamp.report.arms import ScenarioView
from unclamp.report.charts import (
    COLOURS,
    arms_figure,
    difference_range,
    embed,
    heat_figure,
    replay_figure,
    run_figure,
)
from unclamp.report.coverage import COVERAGE_COLUMNS
from unclamp.report.evidence import CAUTION, PAPER, caution_of
from unclamp.report.experts import EXPERT_COLUMNS, LISTED_BANKS, experts_row
from unclamp.report.frontier import FRONTIER_COLUMNS, frontier_figure, frontier_row
from unclamp.report.glossary import GLOSSARY, term_of
from unclamp.report.ranks import RANK_COLUMNS, rank_row
from unclamp.report.ranks_chart import ranks_figure
from unclamp.report.rendering import asset, render_page
from unclamp.report.runs import RunView
from unclamp.report.view import View
from unclamp.report.words import (
    ASSOCIATION_COLUMNS,
    KIND_COLUMNS,
    SERIES,
    SITE_COLUMNS,
    TABLE_COLUMNS,
    arm_columns,
    arm_notes,
    arm_row,
    association_row,
    explanation_columns,
    explanation_row,
    kind_rows,
    site_row,
    spike_text,
)

LISTED_SPIKES = 100
LISTED_SITES = 12
"""Rows of the tables of association and of a replay; the strongest come first."""


def write_page(view: View, path: Path) -> Path:
    """Write a report's page and return its path; replaces an older one at once."""
    return render_page(
        "page.html.j2",
        path,
        view=view,
        scenarios=[]
        if view.run
        else [_scenario(scenario, view, place=i) for i, scenario in enumerate(view.scenarios)],
        run=None if view.run is None else _run(view.run, view.path),
        site_columns=SITE_COLUMNS,
        kind_columns=KIND_COLUMNS,
        association_columns=ASSOCIATION_COLUMNS,
        rank_columns=RANK_COLUMNS,
        coverage_columns=COVERAGE_COLUMNS,
        expert_columns=EXPERT_COLUMNS,
        frontier_columns=FRONTIER_COLUMNS,
        glossary_terms=[term for term in GLOSSARY if term.is_on("run" if view.run else "study")],
        term_of=term_of,
        caution=CAUTION if any(a.clamped_casts for s in view.scenarios for a in s.arms) else None,
        script=asset("sites.js"),
    )


def _json(data: object) -> Markup:
    """Return data as JSON that no script element ends at."""
    text = to_json(data, indent=None)
    return Markup(text.replace("<", "\\u003c"))


def _scenario(scenario: ScenarioView, view: View, *, place: int) -> dict[str, Any]:
    """Return what the template shows of a scenario; `place` keeps its plots' ids apart."""
    colours = {arm.name: COLOURS[i % len(COLOURS)] for i, arm in enumerate(scenario.arms)}
    clamped = [arm for arm, heat in scenario.heat.items() if heat.share.any()]
    return {
        "name": scenario.name,
        "description": scenario.description,
        "findings": scenario.findings,
        "arm_columns": arm_columns(scenario),
        "notes": arm_notes(scenario),
        "planted": scenario.planted,
        "mark": scenario.mark,
        "has_differences": bool(scenario.differences),
        "is_cut": difference_range(scenario) is not None,
        "arm_rows": [arm_row(arm, scenario) for arm in scenario.arms],
        "kind_rows": kind_rows(scenario),
        "colours": list(colours.values()),
        "loss": Markup(embed(arms_figure(scenario, colours), f"loss-{place}")),
        "heats": [
            (arm, Markup(embed(_heat(scenario, arm), f"heat-{place}-{i}")))
            for i, arm in enumerate(clamped)
        ],
        "calm": [
            arm.name + arm.extent
            for arm in scenario.arms
            if not arm.clamped_casts and not arm.undecided_casts
        ],
        "worst": [
            (arm, [site_row(site) for site in sites])
            for arm, sites in scenario.worst.items()
            if sites
        ],
        "runs": view.runs.get(scenario.name, {}),
    }


def _heat(scenario: ScenarioView, arm: str) -> go.Figure:
    heat = scenario.heat[arm]
    return heat_figure(
        heat.sites,
        heat.steps,
        heat.share,
        window=heat.window,
        planted=scenario.planted,
        spikes=scenario.spikes[arm],
    )


def _ranks_heat(run: RunView) -> str:
    """Return the overshoot of ranks as a heat map; nothing where none is above 1."""
    drawn = run.ranks.drawn
    if not any((value or 0) > 1 for row in drawn for value in row.cells):
        return ""
    figure = ranks_figure(
        [row.rank for row in drawn],
        run.window_steps,
        [row.cells for row in drawn],
        window=run.window_size,
    )
    return Markup(embed(figure, "heat-ranks"))


def _run(run: RunView, path: str) -> dict[str, Any]:
    share = np.array(list(run.heat.values())).reshape(len(run.heat), len(run.window_steps))
    table = {
        "columns": TABLE_COLUMNS,
        "sites": [asdict(site) for site in run.sites],
        "panels": {site: asdict(panel) for site, panel in run.panels.items()},
        "steps": run.window_steps,
        "window": run.window_size,
        "path": path,
    }
    heat = ""
    if share.any():
        figure = heat_figure(
            list(run.heat),
            run.window_steps,
            share,
            window=run.window_size,
            planted=run.planted,
            spikes=[spike["onset"] for spike in run.spikes if spike["series"] == "loss"],
        )
        heat = Markup(embed(figure, "heat-run"))
    association = run.association or {}
    said = association.get("sentences", [])
    return {
        "view": run,
        "loss": Markup(embed(run_figure(run), "loss-run")) if run.curves else "",
        "spikes": [(SERIES[s["series"]], spike_text(s)) for s in run.spikes],
        "listed_spikes": LISTED_SPIKES,
        "heat": heat,
        "ranks": [rank_row(row) for row in run.ranks.listed],
        "ranks_heat": _ranks_heat(run),
        "frontiers": [
            {
                "view": view,
                "rows": [frontier_row(point) for point in view.points],
                "plot": Markup(embed(frontier_figure(view), f"frontier-{i}")),
            }
            for i, view in enumerate(run.frontiers)
        ],
        "experts": [experts_row(row) for row in run.experts[:LISTED_BANKS]],
        "association": [sentence for sentence in said if PAPER not in sentence],
        "association_rows": [
            association_row(row, is_relative=association.get("is_relative") is not False)
            for row in association.get("sites", [])[:LISTED_SITES]
        ],
        "caution": caution_of(
            association,
            clamped=any(site.clamped_casts and not site.only_counted for site in run.sites),
        ),
        "explanations": [
            {
                "name": found.name,
                "sentences": found.sentences,
                "reproduced": found.reproduced,
                "verdict": found.stated,
                "clamping_share": found.clamping_share,
                "sites": found.sites,
                "override": found.override,
                "columns": explanation_columns(found.verdict),
                "rows": [explanation_row(site) for site in found.sites[:LISTED_SITES]],
                "plot": Markup(embed(replay_figure(found.losses), f"replay-{i}"))
                if found.losses
                else "",
            }
            for i, found in enumerate(run.explanations)
        ],
        "data": _json(table),
    }
