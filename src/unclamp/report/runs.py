"""One run's page as plain data: curves, spikes, events, all sites, panels, evidence. Torch-free.

Several runs side by side, the arms of a study, are for `arms`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unclamp.analysis import find_divergences
from unclamp.names import SiteName, shown
from unclamp.report.bands import by_step
from unclamp.report.coverage import CoverageView, read_coverage
from unclamp.report.evidence import (
    NOTHING_TO_ASK,
    ExplanationView,
    named_sites,
    read_association,
    read_explanations,
)
from unclamp.report.experts import ExpertsRow, read_experts
from unclamp.report.frontier import FrontierView, read_frontiers
from unclamp.report.kinds import kind_steps, kinds_data
from unclamp.report.panels import Panel, choose_sites, read_panels, rounded
from unclamp.report.ranks import RanksView, read_ranks
from unclamp.report.recorded import (
    RunRecord,
    SiteRecord,
    SiteRow,
    by_clamp_error,
    shown_overshoot,
)
from unclamp.report.steered import decisions_text, read_steering
from unclamp.report.telling import run_sentences
from unclamp.report.thinning import kept_places
from unclamp.runlog import AUTOPILOT_EVENT, COVERAGE_EVENT, RunLog, Windows
from unclamp.study.marks import PLANTED
from unclamp.written import counted

EVENTS_A_KIND = 200
SITES_IN_TEXT = 3
DRAWN_KINDS = 7
NO_GROUP, OTHER_KINDS = "without a group", "other kinds"
_EVENTS = f"""
SELECT step, kind, data, count(*) OVER (PARTITION BY kind) AS of_kind
FROM (SELECT DISTINCT step, kind, data FROM events WHERE kind <> '{COVERAGE_EVENT}')
QUALIFY (row_number() OVER (PARTITION BY kind ORDER BY step, data) - 1)
    % ceil(count(*) OVER (PARTITION BY kind) / {EVENTS_A_KIND})::BIGINT = 0
ORDER BY step, kind
"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A series to draw: `value` at each `step`, None where it is not finite."""

    step: list[int]
    value: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event to show: its data as one line."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunSiteRow(SiteRow):
    """A site's row on the page of its run.

    Attributes:
        site: Its id, the lowest of several ranks; the key of its panel.
        granularity: Which elements share a scale.
        switched: Steps at which it got another scaling.
        rows: Steps with recorded casts, counted on each rank that a lower one does not repeat.
        clamp_error_max: Largest clamp error, a fraction.
        sqnr_db_min: Least signal-to-noise ratio, decibel.
        sqnr_db_mean: Mean of the finite ones, decibel.
        sqnr_row_db_min: Least median over rows, decibel.
        recasts: Casts that guarded scaling repeated.
        nonfinite: Inf and NaN elements; None where they were not counted.
        price: Largest price of clamping of a step, in units of the loss; None where there is none.
    """

    site: int
    granularity: str | None
    switched: list[int]
    rows: int
    clamp_error_max: float | None
    sqnr_db_min: float | None
    sqnr_db_mean: float | None
    sqnr_row_db_min: float | None
    recasts: int
    nonfinite: int | None
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run.

    Attributes:
        name: Of its folder.
        sentences: What the figures say.
        curves: By series, thinned so that every peak stays.
        spikes: As `Spike.to_dict`, by onset.
        kind_curves: The loss of each kind of batches, by its name; empty without groups.
        kinds: As `kinds_data`, most batches first.
        divergences: Slow rises of the loss, which no spike tells, as `Divergence.to_dict`.
        events: Of a kind with very many, evenly some.
        events_left_out: How many events are not in `events`, by kind.
        window_steps: First step of each window of the heat map and the panels.
        window_size: Steps a window.
        sites: All sites, largest total clamp error first, those that are only counted last: what
            a row of the table says.
        heat: Clamped share a window, by the site's name as text; the worst sites.
        panels: By site id.
        association: As `Association.to_dict`, None where nobody looked.
        explanations: Replays of this run's spikes.
        notes: Sentences of its header that must stand beside the figures.
        planted: Marked steps: those whose batch the study made different from the others.
        mark: What they are called, as in "planted step".
        ranks: The ranks apart, where they differ.
        coverage: What FP8 covers of a step; None where the run did not record it.
        experts: Products of experts, by their tokens.
        is_counted: Whether elements were counted; else `heat` is of casts.
        frontiers: What other scalings would have done, of all sites and of those asked for.
    """

    name: str
    sentences: list[str]
    curves: dict[str, Curve]
    spikes: list[dict[str, Any]]
    events: list[Event]
    events_left_out: dict[str, int]
    window_steps: list[int]
    window_size: int
    sites: list[RunSiteRow]
    heat: dict[str, list[float]]
    panels: dict[int, Panel]
    association: dict[str, Any] | None
    explanations: list[ExplanationView]
    notes: list[str] = field(default_factory=list)
    planted: list[int] = field(default_factory=list)
    mark: str = PLANTED.word
    divergences: list[dict[str, Any]] = field(default_factory=list)
    kind_curves: dict[str, Curve] = field(default_factory=dict)
    kinds: list[dict[str, Any]] = field(default_factory=list)
    ranks: RanksView = field(default_factory=RanksView)
    coverage: CoverageView | None = None
    experts: list[ExpertsRow] = field(default_factory=list)
    is_counted: bool = True
    frontiers: list[FrontierView] = field(default_factory=list)


def read_run_view(
    log: RunLog, record: RunRecord, windows: Windows, *, globs: Sequence[str] = ()
) -> RunView:
    """Return the view of a run.

    Args:
        log: The run.
        record: What `read_run` returned for it.
        windows: Likewise.
        globs: Sites whose panels are wanted in any case.

    Raises:
        RunLogError: As `RunLog.sql`.
        UnclampError: A glob matches no site.
    """
    clamped = sum(site.totals.clamped_rows for site in record.sites)
    spikes = [spike for spike in record.spikes if spike.series == "loss"]
    association = (
        read_association(log, spikes=spikes, clamped=clamped) if record.sites else NOTHING_TO_ASK
    )
    chosen = choose_sites(record, globs=globs, named=named_sites(association))
    switched = _switched(log)
    events, left_out = _read_events(log)
    drifts = find_divergences(record.loss, steps=record.steps, groups=record.groups)
    ranks = read_ranks(log, record.cut)
    return RunView(
        name=log.path.resolve().name,
        sentences=run_sentences(record, switched, drifts) + ranks.sentences + read_steering(log),
        curves=_curves(record),
        spikes=[spike.to_dict() for spike in record.spikes],
        events=events,
        events_left_out=left_out,
        window_steps=record.cut.steps,
        window_size=record.cut.size,
        sites=_sites(record, switched),
        heat={str(name): shares.tolist() for name, shares in record.shares.items()},
        panels=read_panels(log, windows, chosen),
        association=association,
        explanations=read_explanations(log.path),
        notes=record.notes,
        planted=record.planted,
        mark=record.mark,
        divergences=[drift.to_dict() for drift in drifts],
        kind_curves=_kind_curves(record),
        kinds=kinds_data(record),
        ranks=ranks,
        coverage=read_coverage(log),
        experts=read_experts(log) if record.sites else [],
        is_counted=record.is_counted,
        frontiers=read_frontiers(log, globs=globs) if record.sites else [],
    )


def _read_events(log: RunLog) -> tuple[list[Event], dict[str, int]]:
    """Return the events to show, and how many of each kind are not among them."""
    rows = log.sql(_EVENTS)
    step, kind, data, of_kind = (column.to_pylist() for column in rows.columns)
    events = [
        Event(step=s, kind=k, text=event_text(k, d))
        for s, k, d in zip(step, kind, data, strict=True)
    ]
    kept, total = Counter(kind), dict(zip(kind, of_kind, strict=True))
    return events, {k: total[k] - kept[k] for k in kept if total[k] > kept[k]}


def event_text(kind: str, data: str) -> str:
    """Return an event's data as one line; data of an unknown shape as it is."""
    try:
        found = json.loads(data)
    except ValueError:
        return data[:200]
    if not isinstance(found, dict):
        return data[:200]
    if kind == "switch" and isinstance(found.get("sites"), list):
        return _switch_text([s for s in found["sites"] if isinstance(s, dict)])
    if kind == AUTOPILOT_EVENT and isinstance(found.get("decisions"), list):
        return decisions_text(found["decisions"])
    said = (f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
            for key, value in found.items())  # fmt: skip
    return ", ".join(said)[:200]


def _switched(log: RunLog) -> dict[SiteName, list[int]]:
    rows = log.sql("SELECT DISTINCT fqn, role, step FROM switches ORDER BY step")
    switched: dict[SiteName, list[int]] = {}
    for fqn, role, step in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        switched.setdefault(SiteName(fqn, role), []).append(step)
    return switched


def _switch_text(sites: list[dict[str, Any]]) -> str:
    named = [
        f"{shown(str(site.get('fqn')))} {site.get('role')} {_kind(site.get('before'))} → "
        f"{_kind(site.get('after'))}"
        for site in sites[:SITES_IN_TEXT]
    ]
    more = len(sites) - SITES_IN_TEXT
    rest = f" and {counted(more, 'more site')}" if more > 0 else ""
    return ", ".join(named) + rest


def _kind(scaling: object) -> str:
    """Return a scaling's kind; other data as JSON text."""
    if isinstance(scaling, dict) and isinstance(scaling.get("scaling"), str):
        return scaling["scaling"]
    return json.dumps(scaling)


def _curves(record: RunRecord) -> dict[str, Curve]:
    """Return what was recorded; a value that is not finite is None and a gap in the line.

    Steps without one are left out: a loss of every tenth step is a line and no dots.
    """
    curves = {}
    for name, given in (("loss", record.loss), ("grad_norm", record.grad_norm)):
        there = [i for i, value in enumerate(given) if value is not None]
        if there:
            values = np.array([value for value in given if value is not None])
            curves[name] = _curve(np.asarray(record.steps)[there], values)
    return curves


def _kind_curves(record: RunRecord) -> dict[str, Curve]:
    """Return the loss of each kind, thinned; of very many kinds the most frequent, and the rest."""
    losses = by_step(record)
    kinds = {group or NO_GROUP: steps for group, steps in kind_steps(record).items()}
    names = list(kinds)
    if len(names) > DRAWN_KINDS:
        rest = [step for name in names[DRAWN_KINDS - 1 :] for step in kinds[name]]
        kinds = {name: kinds[name] for name in names[: DRAWN_KINDS - 1]}
        kinds[OTHER_KINDS] = sorted(rest)
    return {
        name: _curve(np.asarray(steps), np.array([losses[step] for step in steps]))
        for name, steps in kinds.items()
    }


def _curve(steps: np.ndarray, values: np.ndarray) -> Curve:
    kept = kept_places(values)
    drawn = [rounded(value) for value in values[kept].tolist()]
    return Curve(step=steps[kept].tolist(), value=drawn)


def _sites(record: RunRecord, switched: Mapping[SiteName, list[int]]) -> list[RunSiteRow]:
    gradients = {name: site.change.error for name, site in record.gradients.by_name.items()}
    prices = {name: site.worst for name, site in record.prices.by_name.items()}
    return [
        _site(
            site,
            switched.get(site.name, []),
            None if site.info.only_counted else gradients.get(site.name),
            None if site.info.only_counted else prices.get(site.name),
        )
        for site in by_clamp_error(record.sites) + by_clamp_error(record.counted_sites)
    ]


def _site(
    site: SiteRecord, switched: list[int], grad_error: float | None, price: float | None
) -> RunSiteRow:
    """Return a site's row; means and shares that nothing was counted for are None."""
    info, totals = site.info, site.totals
    return RunSiteRow(
        site=info.site,
        fqn=info.fqn,
        role=info.role,
        scaling=info.scaling,
        format=info.format,
        granularity=info.granularity,
        switched=switched,
        saturated=totals.saturated if totals.is_counted else None,
        clamped_casts=totals.clamped_rows,
        rows=totals.rows,
        clamp_error=rounded(totals.clamp_error) if totals.clamped_rows else None,
        clamp_error_max=rounded(totals.clamp_error_max) if totals.is_counted else None,
        overshoot=rounded(shown_overshoot(totals)),
        underflow_share=rounded(totals.underflow_share),
        sqnr_db_min=rounded(totals.sqnr_db_min),
        sqnr_db_mean=rounded(totals.sqnr_db_mean),
        sqnr_row_db_min=rounded(site.sqnr_row_db_min),
        recasts=totals.recasts,
        nonfinite=totals.nonfinite if totals.is_counted else None,
        worst_step=totals.worst_step,
        grad_error=rounded(grad_error),
        price=rounded(price),
        only_counted=info.only_counted,
        undecided_casts=totals.undecided,
    )
