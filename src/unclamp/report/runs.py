"""One run's page as plain data: curves, spikes, events, all sites, panels, evidence. Torch-free.

Several runs side by side, the arms of a study, are for `arms`.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unclamp.analysis import Divergence, find_divergences, unjudged_in_words
from unclamp.analysis.divergences import divergence_in_words
from unclamp.analysis.groups import kind_in_words
from unclamp.names import SiteName, shown
from unclamp.report.bands import final_loss
from unclamp.report.evidence import (
    NOTHING_TO_ASK,
    ExplanationView,
    named_sites,
    read_association,
    read_explanations,
)
from unclamp.report.kinds import kind_sentences, kind_steps, kinds_data
from unclamp.report.panels import Panel, choose_sites, read_panels, rounded
from unclamp.report.recorded import (
    RunRecord,
    SiteRecord,
    SiteRow,
    by_clamp_error,
    shown_overshoot,
)
from unclamp.report.thinning import kept_places
from unclamp.runlog import RunLog, Windows
from unclamp.study.marks import PLANTED
from unclamp.totals import SiteTotals
from unclamp.written import counted, loss_text, percent, times

EVENTS_A_KIND = 200
SITES_IN_TEXT = 3
DRAWN_KINDS = 7
NO_GROUP, OTHER_KINDS = "without a group", "other kinds"
_EVENTS = f"""
SELECT step, kind, data, count(*) OVER (PARTITION BY kind) AS of_kind
FROM (SELECT DISTINCT step, kind, data FROM events)
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
        rows: Steps with recorded casts, counted on each rank.
        clamp_error_max: Largest clamp error, a fraction.
        sqnr_db_min: Least signal-to-noise ratio, decibel.
        sqnr_db_mean: Mean of the finite ones, decibel.
        sqnr_row_db_min: Least median over rows, decibel.
        recasts: Casts that guarded scaling repeated.
        nonfinite: Inf and NaN elements.
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
    nonfinite: int


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
        sites: All sites, largest total clamp error first: what a row of the table says.
        heat: Clamped share a window, by the site's name as text; the worst sites.
        panels: By site id.
        association: As `Association.to_dict`, None where nobody looked.
        explanations: Replays of this run's spikes.
        notes: Sentences of its header that must stand beside the figures.
        planted: Marked steps: those whose batch the study made different from the others.
        mark: What they are called, as in "planted step".
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
    association = read_association(log) if record.sites else NOTHING_TO_ASK
    chosen = choose_sites(record, globs=globs, named=named_sites(association))
    switched = _switched(log)
    events, left_out = _read_events(log)
    drifts = find_divergences(record.loss, steps=record.steps, groups=record.groups)
    return RunView(
        name=log.path.resolve().name,
        sentences=run_sentences(record, switched, drifts),
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
    said = (f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
            for key, value in found.items())  # fmt: skip
    return ", ".join(said)[:200]


def run_sentences(
    record: RunRecord,
    switched: Mapping[SiteName, list[int]],
    drifts: Sequence[Divergence] = (),
) -> list[str]:
    """Say in words what a run recorded, and no more; what matters most comes first.

    That is a loss that is lost, then its slow divergences and its spikes, then what was clamped.
    """
    final = final_loss(record)
    risen = [divergence_in_words(drift, name="The loss") for drift in drifts]
    finals = [*_final_sentence(record, final), *kind_sentences(record)]
    spikes = _spike_sentences(record)
    clamps = _clamp_sentences(record)
    if final is not None and not math.isfinite(final):
        said = [*finals, *risen, *spikes, *clamps]
    elif record.loss_spikes or risen:
        said = [*risen, *spikes, *clamps, *finals]
    else:
        said = [*clamps, *spikes, *finals]
    return said + _switch_sentences(switched)


def _final_sentence(record: RunRecord, final: float | None) -> list[str]:
    if final is None:
        return []
    but = f", {record.mark} ones left out" if record.planted else ""
    if not math.isfinite(final):
        return [f"The final loss is not finite: it is not in the last tenth of the steps{but}."]
    return [f"The final loss is {loss_text(final)}: mean over the last tenth of the steps{but}."]


def _spike_sentences(record: RunRecord) -> list[str]:
    said = []
    for series, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        given = record.loss if series == "loss" else record.grad_norm
        values = [value for value in given if value is not None]
        if not values:
            said += [f"The {name} was not recorded."] if series == "loss" else []
            continue
        steps = counted(len(values), "step")
        spikes = [spike for spike in record.spikes if spike.series == series]
        few = unjudged_in_words(given, record.groups)
        but = f" ({'; '.join(few)})" if few else ""
        if not spikes:
            said.append(f"No spike of the {name} in {steps}{but}.")
            continue
        worst = max(spikes, key=lambda spike: spike.height if spike.height == spike.height else 0)
        how = "not finite" if worst.kind == "nonfinite" else f"{times(worst.height)} its level"
        among = f" among {kind_in_words(worst.group)}" if record.groups else ""
        said.append(
            f"{counted(len(spikes), 'spike')} of the {name} in {steps}{but}; the highest, at step "
            f"{worst.peak:,}{among}, is {how}."
        )
    return said


def _clamp_sentences(record: RunRecord) -> list[str]:
    sites, extent = record.sites, record.extent
    if not sites:
        return [_nothing_cast(record)]
    total = sum((site.totals for site in sites), SiteTotals())
    clamped = by_clamp_error([site for site in sites if site.totals.saturated])
    said = [f"Nothing was clamped at any of {counted(len(sites), 'site')}{extent}."]
    if clamped:
        elements = counted(total.saturated, "element was", "elements were")
        said = [
            f"{elements} clamped, in {total.clamped_rows:,} of "
            f"{counted(total.rows, 'recorded cast')}, at {len(clamped):,} of "
            f"{counted(len(sites), 'site')}{extent}.",
            *_worst_sentence(clamped[0]),
            *_gradient_sentences(record),
        ]
    if total.recasts:
        share = percent(total.recasts / total.casts)
        said.append(f"{share} of the casts were repeated with the true scale{extent}.")
    if total.nonfinite:
        broken = sum(site.totals.nonfinite > 0 for site in sites)
        elements = counted(total.nonfinite, "element was", "elements were")
        said.append(f"{elements} Inf or NaN, at {counted(broken, 'site')}{extent}.")
    return said


def _nothing_cast(record: RunRecord) -> str:
    said = "No cast was recorded."
    if record.has_recipe:
        return f"{said} The run has a recipe, but nothing of it was in FP8."
    if record.is_plain:
        return f"{said} It is a training without FP8, by design."
    return f"{said} Whether it was in FP8 is not in the log." if record.steps else said


def _worst_sentence(site: SiteRecord) -> list[str]:
    """Say where clamping removed most; nothing where it removed too little to be counted."""
    totals = site.totals
    if totals.worst_step is None:
        return []
    return [
        f"Most clamp error: {site.name}, worst at step {totals.worst_step:,}, where clamping "
        f"removed {percent(totals.clamp_error_max)} of the tensor's squares."
    ]


def _gradient_sentences(record: RunRecord) -> list[str]:
    """Say what clamping gradients took of the weights', and where most; nothing where unknown."""
    found = record.gradients
    return [found.words(), *found.worst_words()] if found.casts else []


def _switch_sentences(switched: Mapping[SiteName, list[int]]) -> list[str]:
    steps = sorted({step for each in switched.values() for step in each})
    if not steps:
        return []
    first = ", ".join(f"{step:,}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    return [f"{counted(len(switched), 'site')} switched scaling, at step {first}."]


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
        pairs = [(s, v) for s, v in zip(record.steps, given, strict=False) if v is not None]
        if pairs:
            curves[name] = _curve(pairs)
    return curves


def _kind_curves(record: RunRecord) -> dict[str, Curve]:
    """Return the loss of each kind, thinned; of very many kinds the most frequent, and the rest."""
    losses = dict(zip(record.steps, record.loss, strict=True))
    kinds = {group or NO_GROUP: steps for group, steps in kind_steps(record).items()}
    names = list(kinds)
    if len(names) > DRAWN_KINDS:
        rest = [step for name in names[DRAWN_KINDS - 1 :] for step in kinds[name]]
        kinds = {name: kinds[name] for name in names[: DRAWN_KINDS - 1]}
        kinds[OTHER_KINDS] = sorted(rest)
    return {
        name: _curve([(s, v) for s in steps if (v := losses[s]) is not None])
        for name, steps in kinds.items()
    }


def _curve(pairs: Sequence[tuple[int, float]]) -> Curve:
    steps, values = zip(*pairs, strict=True)
    kept = kept_places(values)
    return Curve(step=[steps[i] for i in kept], value=[rounded(values[i]) for i in kept])


def _sites(record: RunRecord, switched: Mapping[SiteName, list[int]]) -> list[RunSiteRow]:
    gradients = {name: site.change.error for name, site in record.gradients.by_name.items()}
    return [
        _site(site, switched.get(site.name, []), gradients.get(site.name))
        for site in by_clamp_error(record.sites)
    ]


def _site(site: SiteRecord, switched: list[int], grad_error: float | None) -> RunSiteRow:
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
        saturated=totals.saturated,
        clamped_casts=totals.clamped_rows,
        rows=totals.rows,
        clamp_error=rounded(totals.clamp_error) if totals.clamped_rows else None,
        clamp_error_max=rounded(totals.clamp_error_max),
        overshoot=rounded(shown_overshoot(totals)),
        underflow_share=rounded(totals.underflow_share),
        sqnr_db_min=rounded(totals.sqnr_db_min),
        sqnr_db_mean=rounded(totals.sqnr_db_mean),
        sqnr_row_db_min=rounded(site.sqnr_row_db_min),
        recasts=totals.recasts,
        nonfinite=totals.nonfinite,
        worst_step=totals.worst_step,
        grad_error=rounded(grad_error),
    )
