"""Runs side by side: the arms of a scenario over their seeds, as plain data. Torch-free.

What one run shows is in `runs`; which runs a study has is for `view`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from unclamp.analysis.paired import (
    PairedDifference,
    comparisons_in_words,
    difference_in_words,
    paired_difference,
)
from unclamp.names import SiteName
from unclamp.report.recorded import HEAT_SITES, RunRecord, SiteRecord, SiteRow, by_clamp_error
from unclamp.report.thinning import kept_places
from unclamp.totals import SiteTotals

FINAL_SHARE = 0.1
"""The final loss is the mean over this last share of the steps that are not planted."""
BASELINE = "dynamic"
"""The arm that losses at planted steps are compared with."""
WORST_SITES = 12


@dataclass(frozen=True, kw_only=True)
class ArmView:
    """One arm over its seeds; counts are means a run, rates are fractions.

    Attributes:
        final_loss: Mean over seeds of the mean loss over the last tenth of the steps that
            recorded one, planted ones left out; NaN where any of it is not finite.
        final_loss_spread: Standard deviation of that over seeds; None with one seed.
        final_gap: Final loss minus that of the dynamic arm on the same seeds, which is the only
            way to compare them: the spread over seeds above is mostly common to all arms. None
            for that arm itself, and without a seed that both have finished.
        planted_ratio: Loss over that of the dynamic arm at the same planted step and seed,
            mean, smallest and largest, NaN where any is not finite; None without planted steps
            or without that arm.
        extent: Which steps the counts are of; "" where it is all.
        casts: Casts made.
        clamped_casts: Casts in which anything saturated.
        recasts: Casts repeated with the true scale, by guarded scaling.
        overshoot: Largest amax over the largest representable value.
    """

    name: str
    seeds: int
    unfinished: int
    final_loss: float | None
    final_loss_spread: float | None
    final_gap: PairedDifference | None
    planted_ratio: tuple[float, float, float] | None
    planted_spikes: int
    other_spikes: int
    extent: str
    saturated: float
    casts: float
    clamped_casts: float
    recasts: float
    underflow_share: float
    overshoot: float
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Band:
    """A loss over the seeds: at each step its mean, and the smallest and the largest one."""

    step: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True, kw_only=True)
class Heat:
    """The saturated share, sites by windows: `share[i, j]` of `sites[i]` from `steps[j]` on."""

    sites: list[str]
    steps: list[int]
    share: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ScenarioView:
    """One scenario: its arms side by side, and what the plots show."""

    name: str
    description: str
    findings: list[str]
    planted: list[int]
    arms: list[ArmView]
    curves: dict[str, Band]
    spikes: dict[str, list[int]]
    heat: dict[str, Heat]
    worst: dict[str, list[SiteRow]]
    switched: dict[str, list[str]]


def scenario_view(
    name: str,
    description: str,
    records: dict[str, dict[int, RunRecord]],
    switched: dict[str, list[str]],
) -> ScenarioView:
    """Return a scenario's view.

    Args:
        name: Of the scenario.
        description: What is in it.
        records: Of every run that there is, by arm and seed; an arm without runs is left out.
        switched: Sites that an arm made dynamic, by arm.
    """
    records = {arm: runs for arm, runs in records.items() if runs}
    baseline = records.get(BASELINE, {})
    arms = [_arm_view(arm, runs, baseline) for arm, runs in records.items()]
    planted = sorted({s for runs in records.values() for run in runs.values() for s in run.planted})
    return ScenarioView(
        name=name,
        description=description,
        findings=_findings(arms, len(planted), switched),
        planted=planted,
        arms=arms,
        curves={arm: _curve(list(runs.values())) for arm, runs in records.items()},
        spikes={
            arm: sorted({step for run in runs.values() for step in run.loss_spikes})
            for arm, runs in records.items()
        },
        heat={arm: _heat(list(runs.values())) for arm, runs in records.items()},
        worst={arm: _worst(list(runs.values())) for arm, runs in records.items()},
        switched=switched,
    )


def _arm_view(name: str, runs: dict[int, RunRecord], baseline: dict[int, RunRecord]) -> ArmView:
    """Sum an arm up; its counts are of finished runs, or of all where none is finished."""
    counted = _finished(runs) or runs
    finals = [f for f in map(final_loss, counted.values()) if f is not None]
    total = sum((s.totals for run in counted.values() for s in run.sites), SiteTotals())
    speeds = [run.tokens_per_s for run in counted.values() if run.tokens_per_s is not None]
    at_planted = [s for run in counted.values() for s in run.loss_spikes if s in run.planted]
    spikes = sum(len(run.loss_spikes) for run in counted.values())
    return ArmView(
        name=name,
        seeds=len(runs),
        unfinished=len(runs) - len(_finished(runs)),
        final_loss=_mean(finals) if finals else None,
        final_loss_spread=_spread(finals) if len(finals) > 1 else None,
        final_gap=None if name == BASELINE else _final_gap(runs, baseline),
        planted_ratio=_planted_ratio(runs, baseline),
        planted_spikes=len(at_planted),
        other_spikes=spikes - len(at_planted),
        extent=next((run.extent for run in counted.values() if run.extent), ""),
        saturated=total.saturated / len(counted),
        casts=total.casts / len(counted),
        clamped_casts=total.clamped_rows / len(counted),
        recasts=total.recasts / len(counted),
        underflow_share=total.underflow_share,
        overshoot=total.overshoot,
        tokens_per_s=float(np.mean(speeds)) if speeds else None,
    )


def _finished(runs: dict[int, RunRecord]) -> dict[int, RunRecord]:
    return {seed: run for seed, run in runs.items() if run.status == "finished"}


def final_loss(run: RunRecord) -> float | None:
    """Return the mean over the last tenth of the steps that recorded a loss, planted ones left out.

    Those are compared apart. None of a run that is not finished, whose last steps are not the
    last ones, or that recorded no loss. NaN where one of these losses is not finite.
    """
    if run.status != "finished":
        return None
    planted, recorded = set(run.planted), _by_step(run)
    ordinary = [loss for step, loss in recorded.items() if step not in planted]
    last = max(1, round(FINAL_SHARE * len(recorded)))
    return _mean(ordinary[-last:]) if ordinary else None


def _by_step(run: RunRecord) -> dict[int, float]:
    """Return the losses that were recorded, NaN and Inf among them."""
    return {s: x for s, x in zip(run.steps, run.loss, strict=True) if x is not None}


def _mean(values: list[float]) -> float:
    """Return the mean; NaN where a value is not finite, or where there is none."""
    is_known = bool(values) and all(map(math.isfinite, values))
    return float(np.mean(values)) if is_known else math.nan


def _spread(values: list[float]) -> float:
    """Return the standard deviation; NaN of a single value, or where one is not finite."""
    is_known = len(values) > 1 and all(map(math.isfinite, values))
    return float(np.std(values, ddof=1)) if is_known else math.nan


def _final_gap(
    runs: dict[int, RunRecord], baseline: dict[int, RunRecord]
) -> PairedDifference | None:
    """Compare an arm with the baseline over the seeds that both have finished."""
    both = [(final_loss(run), final_loss(baseline[s])) for s, run in runs.items() if s in baseline]
    pairs = [(own, other) for own, other in both if own is not None and other is not None]
    if not pairs:
        return None
    return paired_difference([own for own, _ in pairs], [other for _, other in pairs])


def _planted_ratio(
    runs: dict[int, RunRecord], baseline: dict[int, RunRecord]
) -> tuple[float, float, float] | None:
    ratios = []
    for seed, run in runs.items():
        if seed not in baseline:
            continue
        own, other = _by_step(run), _by_step(baseline[seed])
        # A loss of 0 has no ratio to it.
        ratios += [own[s] / other[s] for s in run.planted if s in own and other.get(s)]
    if not all(map(math.isfinite, ratios)):
        return math.nan, math.nan, math.nan
    return (_mean(ratios), min(ratios), max(ratios)) if ratios else None


def _curve(runs: list[RunRecord]) -> Band:
    """Return loss over steps: mean, smallest and largest over the seeds that got there.

    Thinned for a page, so that every peak of the largest and trough of the smallest stays. NaN at
    a step where a seed's loss is not finite; steps without a loss are left out.
    """
    by_step: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, loss in _by_step(run).items():
            by_step[step].append(loss if math.isfinite(loss) else math.nan)
    steps = sorted(by_step)
    low, high = ([float(ends(by_step[step])) for step in steps] for ends in (np.min, np.max))
    kept = kept_places(low, high)
    return Band(
        step=[float(steps[i]) for i in kept],
        mean=[_mean(by_step[steps[i]]) for i in kept],
        low=[low[i] for i in kept],
        high=[high[i] for i in kept],
    )


def _heat(runs: list[RunRecord]) -> Heat:
    """Return the saturated share, sites by windows, mean over the runs cut alike; worst sites."""
    cut = max((run.cut for run in runs), key=lambda cut: cut.count * cut.size)
    same = [run.shares for run in runs if run.cut == cut]
    nothing = np.zeros(cut.count)
    order = dict.fromkeys(site for shares in same for site in shares)
    share = {site: np.mean([s.get(site, nothing) for s in same], axis=0) for site in order}
    worst = sorted(share, key=lambda site: -float(share[site].sum()))[:HEAT_SITES]
    rows = [site for site in order if site in set(worst)]
    return Heat(
        sites=[str(site) for site in rows],
        steps=cut.steps,
        share=np.array([share[site] for site in rows]).reshape(len(rows), cut.count),
    )


def _worst(runs: list[RunRecord]) -> list[SiteRow]:
    """Return the sites with the largest clamp error over all seeds, worst first."""
    merged: dict[SiteName, SiteRecord] = {}
    for site in (site for run in runs for site in run.sites):
        known = merged.get(site.name)
        both = site if known is None else replace(known, totals=known.totals + site.totals)
        merged[site.name] = both
    clamped = [site for site in merged.values() if site.totals.saturated]
    return [_site_row(site) for site in by_clamp_error(clamped)[:WORST_SITES]]


def _site_row(site: SiteRecord) -> SiteRow:
    return SiteRow(
        fqn=site.info.fqn,
        role=site.info.role,
        format=site.info.format,
        scaling=site.info.scaling,
        saturated=site.totals.saturated,
        clamped_casts=site.totals.clamped_rows,
        overshoot=site.totals.overshoot,
        clamp_error=site.totals.clamp_error,
        underflow_share=site.totals.underflow_share,
        worst_step=site.totals.worst_step,
    )


def _findings(arms: list[ArmView], planted: int, switched: dict[str, list[str]]) -> list[str]:
    """Say in words what the figures show, and no more."""
    said, harm = [], []
    for arm in arms:
        if arm.planted_ratio is not None and arm.name != BASELINE:
            said.append(_at_planted(arm.name, planted, *arm.planted_ratio))
        elif arm.saturated and arm.final_gap is not None:
            harm.append(_harm(arm, arm.final_gap))
    said += harm
    if harm:
        # All that were made, not only those of arms that clamped: the page's JSON has them all.
        gaps = [arm.final_gap for arm in arms if arm.final_gap is not None]
        said += comparisons_in_words(gaps, BASELINE)
    said += [
        f"{arm.name}: {100 * arm.recasts / arm.casts:.2g} % of the casts were repeated with the "
        f"true scale{arm.extent}."
        for arm in arms
        if arm.recasts
    ]
    said += [
        f"{arm} is dynamic at: {', '.join(sites)}." for arm, sites in switched.items() if sites
    ]
    return said


def _at_planted(arm: str, planted: int, mean: float, low: float, high: float) -> str:
    if math.isnan(mean):
        return (
            f"{arm}: at the {planted} planted steps a loss, or its ratio to {BASELINE}, is not "
            "finite."
        )
    return (
        f"{arm}: at the {planted} planted steps the loss is {mean:.2f}x that of {BASELINE} "
        f"({low:.2f}x to {high:.2f}x over steps and seeds)."
    )


def _harm(arm: ArmView, gap: PairedDifference) -> str:
    return (
        f"{arm.name} clamped {arm.saturated:,.0f} elements in {arm.clamped_casts:,.0f} casts a "
        f"run{arm.extent}; the difference of its final loss from that of {BASELINE} on the same "
        f"seeds is {difference_in_words(gap, own=arm.name, other=BASELINE)}."
    )
