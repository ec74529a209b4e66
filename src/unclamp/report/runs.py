"""One run's page as plain data: curves, spikes, events, all sites, panels, evidence. Torch-free.

Several runs side by side, the arms of a study, are for `arms`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.report.arms import final_loss
from unclamp.report.evidence import (
    MIXED_ASSOCIATION,
    ExplanationView,
    named_sites,
    read_association,
    read_explanations,
)
from unclamp.report.figures import RunFigures, by_clamp_error, site_name
from unclamp.report.panels import choose_sites, read_panels, rounded
from unclamp.report.thinning import kept_places
from unclamp.runlog import RunLog

EVENTS_A_KIND = 200
SITES_IN_TEXT = 3
_EVENTS = f"""
SELECT step, kind, data, count(*) OVER (PARTITION BY kind) AS of_kind
FROM (SELECT DISTINCT step, kind, data FROM events)
QUALIFY (row_number() OVER (PARTITION BY kind ORDER BY step, data) - 1)
    % ceil(count(*) OVER (PARTITION BY kind) / {EVENTS_A_KIND})::BIGINT = 0
ORDER BY step, kind
"""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run.

    Attributes:
        name: Of its folder.
        sentences: What the figures say.
        curves: By series, `step` and `value`, thinned so that every peak stays.
        spikes: As `Spike.to_dict`, by onset.
        events: `step`, `kind` and `text`; of a kind with very many, evenly some.
        events_left_out: How many events are not in `events`, by kind.
        window_steps: First step of each window of the heat map and the panels.
        window_size: Steps a window.
        sites: All sites, largest total clamp error first: what a row of the table says.
        heat: Saturated share a window, by `site_name`; the worst sites.
        panels: By site id; `panels` of `unclamp.report.panels`.
        association: As `Association.to_dict`, None where nobody looked.
        explanations: Replays of this run's spikes.
    """

    name: str
    sentences: list[str]
    curves: dict[str, dict[str, list[Any]]]
    spikes: list[dict[str, Any]]
    events: list[dict[str, Any]]
    events_left_out: dict[str, int]
    window_steps: list[int]
    window_size: int
    sites: list[dict[str, Any]]
    heat: dict[str, list[float]]
    panels: dict[int, Any]
    association: dict[str, Any] | None
    explanations: list[ExplanationView]


def read_run_view(log: RunLog, figures: RunFigures, *, globs: Sequence[str] = ()) -> RunView:
    """Return the view of a run whose figures have been read from the same log.

    Args:
        log: The run.
        figures: What `read_run` returned for it.
        globs: Sites whose panels are wanted in any case.

    Raises:
        RunLogError: As `RunLog.sql`.
        UnclampError: A glob matches no site.
    """
    association = MIXED_ASSOCIATION if figures.mixed else read_association(log)
    named = named_sites(association)
    chosen = [] if figures.mixed else choose_sites(figures, globs=globs, named=named)
    shown = [] if figures.mixed else by_clamp_error(figures.sites)
    switched = _switched(log)
    events = log.sql(_EVENTS).to_pylist()
    return RunView(
        name=log.path.resolve().name,
        sentences=run_sentences(figures, switched),
        curves=_curves(figures),
        spikes=[spike.to_dict() for spike in figures.spikes],
        events=[
            {"step": e["step"], "kind": e["kind"], "text": event_text(e["kind"], e["data"])}
            for e in events
        ],
        events_left_out=_left_out(events),
        window_steps=figures.windows.steps,
        window_size=figures.windows.size,
        sites=[_site(site, switched) for site in shown],
        heat={site_name(f, r): shares.tolist() for (f, r), shares in figures.shares.items()},
        panels=read_panels(log, figures, chosen),
        association=association,
        explanations=read_explanations(log.path),
    )


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


def run_sentences(figures: RunFigures, switched: Mapping[tuple[str, str], list[int]]) -> list[str]:
    """Say in words what a run's figures show, and no more."""
    return [
        *_final_sentence(figures),
        *_spike_sentences(figures),
        *_clamp_sentences(figures),
        *_switch_sentences(switched),
    ]


def _final_sentence(figures: RunFigures) -> list[str]:
    final = final_loss(figures)
    if final is None:
        return []
    but = ", planted ones left out" if figures.planted else ""
    if not math.isfinite(final):
        return [f"The final loss is not finite: it is not in the last tenth of the steps{but}."]
    return [f"The final loss is {final:.4f}: mean over the last tenth of the steps{but}."]


def _spike_sentences(figures: RunFigures) -> list[str]:
    said = []
    for series, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        given = figures.loss if series == "loss" else figures.grad_norm
        values = [value for value in given if value is not None]
        if not values:
            said += [f"The {name} was not recorded."] if series == "loss" else []
            continue
        spikes = [spike for spike in figures.spikes if spike.series == series]
        if not spikes:
            said.append(f"No spike of the {name} in {len(values):,} steps.")
            continue
        worst = max(spikes, key=lambda spike: spike.height if spike.height == spike.height else 0)
        count = "1 spike" if len(spikes) == 1 else f"{len(spikes)} spikes"
        how = "not finite" if worst.kind == "nonfinite" else f"{worst.height:.2f}x its level"
        said.append(
            f"{count} of the {name} in {len(values):,} steps; the highest, at step "
            f"{worst.peak:,}, is {how}."
        )
    return said


def _clamp_sentences(figures: RunFigures) -> list[str]:
    sites, extent = figures.sites, figures.extent
    if not sites:
        return ["No cast was recorded."]
    clamped = by_clamp_error([site for site in sites if site["saturated"]])
    said = [f"Nothing was clamped at any of {len(sites):,} sites{extent}."]
    if clamped:
        total, casts = (sum(s[name] for s in clamped) for name in ("saturated", "clamped_casts"))
        rows = sum(site["rows"] for site in sites)
        said = [
            f"{total:,} elements were clamped, in {casts:,} of {rows:,} recorded casts, at "
            f"{len(clamped):,} of {len(sites):,} sites{extent}.",
            *([] if figures.mixed else _worst_sentence(clamped[0])),
        ]
    casts, recasts = (sum(site[name] for site in sites) for name in ("casts", "recasts"))
    if recasts:
        share = f"{100 * recasts / casts:.2g} %"
        said.append(f"{share} of the casts were repeated with the true scale{extent}.")
    broken = [site for site in sites if site["nonfinite"]]
    if broken:
        total = sum(site["nonfinite"] for site in broken)
        said.append(f"{total:,} elements were Inf or NaN, at {len(broken):,} sites{extent}.")
    return said


def _worst_sentence(site: dict[str, Any]) -> list[str]:
    """Say where clamping removed most; nothing where it removed too little to be counted."""
    if site["worst_step"] is None:
        return []
    return [
        f"Most clamp error: {site_name(site['fqn'], site['role'])}, worst at step "
        f"{site['worst_step']:,}, where clamping removed "
        f"{100 * site['clamp_error_max']:.3g} % of the tensor's squares."
    ]


def _switch_sentences(switched: Mapping[tuple[str, str], list[int]]) -> list[str]:
    steps = sorted({step for each in switched.values() for step in each})
    if not steps:
        return []
    shown = ", ".join(f"{step:,}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    who = "1 site" if len(switched) == 1 else f"{len(switched):,} sites"
    return [f"{who} switched scaling, at step {shown}."]


def _switched(log: RunLog) -> dict[tuple[str, str], list[int]]:
    rows = log.sql("SELECT DISTINCT fqn, role, step FROM switches ORDER BY step").to_pylist()
    switched: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        switched.setdefault((row["fqn"], row["role"]), []).append(row["step"])
    return switched


def _switch_text(sites: list[dict[str, Any]]) -> str:
    named = [
        f"{site_name(str(site.get('fqn')), str(site.get('role')))} {_kind(site.get('before'))} → "
        f"{_kind(site.get('after'))}"
        for site in sites[:SITES_IN_TEXT]
    ]
    rest = f" and {len(sites) - SITES_IN_TEXT} more sites" if len(sites) > SITES_IN_TEXT else ""
    return ", ".join(named) + rest


def _kind(scaling: object) -> str:
    """Return a scaling's kind; other data as JSON text."""
    if isinstance(scaling, dict) and isinstance(scaling.get("scaling"), str):
        return scaling["scaling"]
    return json.dumps(scaling)


def _left_out(events: list[dict[str, Any]]) -> dict[str, int]:
    kept: dict[str, int] = {}
    total: dict[str, int] = {}
    for event in events:
        kept[event["kind"]] = kept.get(event["kind"], 0) + 1
        total[event["kind"]] = event["of_kind"]
    return {kind: total[kind] - kept[kind] for kind in kept if total[kind] > kept[kind]}


def _curves(figures: RunFigures) -> dict[str, dict[str, list[Any]]]:
    """Return what was recorded; a value that is not finite is None and a gap in the line.

    Steps without one are left out: a loss of every tenth step is a line and no dots.
    """
    curves = {}
    for name, given in (("loss", figures.loss), ("grad_norm", figures.grad_norm)):
        pairs = [(s, v) for s, v in zip(figures.steps, given, strict=False) if v is not None]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            kept = kept_places(values)
            curves[name] = {
                "step": [steps[i] for i in kept],
                "value": [rounded(values[i]) for i in kept],
            }
    return curves


def _site(site: dict[str, Any], switched: Mapping[tuple[str, str], list[int]]) -> dict[str, Any]:
    """Return a site's row; means and shares that nothing was counted for are None."""
    clamped = site["clamped_casts"]
    return {
        **{name: site[name] for name in ("site", "fqn", "role", "scaling", "format")},
        "granularity": site["granularity"],
        "switched": switched.get((site["fqn"], site["role"]), []),
        "saturated": site["saturated"],
        "clamped_casts": clamped,
        "rows": site["rows"],
        "clamp_error": rounded(site["clamp_error"] / clamped) if clamped else None,
        "clamp_error_max": rounded(site["clamp_error_max"]),
        "overshoot": rounded(site["overshoot"]),
        "underflow_share": rounded(site["underflowed"] / max(site["elements"], 1)),
        "sqnr_db_min": rounded(site["sqnr_db_min"]),
        "sqnr_db_mean": rounded(site["sqnr_db_mean"]),
        "recasts": site["recasts"],
        "nonfinite": site["nonfinite"],
        "worst_step": site["worst_step"],
    }
