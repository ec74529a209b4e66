"""Runs side by side: the arms of a scenario over their seeds, as plain data. Torch-free.

What one run shows is in `runs`; which runs a study has is for `view`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from unclamp.analysis import ClampedGradients
from unclamp.analysis.paired import (
    PairedDifference,
    comparisons_in_words,
    difference_in_words,
    paired_difference,
)
from unclamp.names import SiteName
from unclamp.report.bands import (
    Band,
    Heat,
    by_step,
    difference_band,
    final_loss,
    heat,
    loss_band,
    mean,
)
from unclamp.report.kinds import KindLoss, kind_losses, log_ratio, pairs_at
from unclamp.report.recorded import (
    RunRecord,
    SiteRecord,
    SiteRow,
    by_clamp_error,
    shown_overshoot,
)
from unclamp.study.marks import PLANTED
from unclamp.totals import SiteTotals
from unclamp.written import counted, percent, times

BASELINE = "dynamic"
"""The arm that the others are compared with."""
HURT = 1.05
"""Loss at planted steps over the baseline's, from which on an arm may be called hurt."""
WORST_SITES = 12
TAKEN = 0.05
"""Gradient error of an arm from which on it is told in a sentence."""
NOTHING_CAST = (
    "Not one cast was made although the arm has a recipe: its figures are those of a training "
    "without FP8."
)

Precision = Literal["FP8", "high precision", "nothing cast", "not known"]


@dataclass(frozen=True, kw_only=True)
class ArmView:
    """One arm over its seeds; spikes are of all seeds, other counts means a run, rates fractions.

    Attributes:
        final_loss: Mean over seeds of the mean loss over the last tenth of the steps that
            recorded one, planted ones left out; NaN where any of it is not finite.
        final_gap: Final loss minus that of the dynamic arm on the same seeds, which is the only
            way to compare them: the spread over seeds is mostly common to all arms. None
            for that arm itself, and without a seed that both have finished.
        planted_ratio: Loss over that of the dynamic arm at the same planted step and seed,
            geometric mean, smallest and largest, NaN where any is not finite; None without
            planted steps or without that arm.
        planted_log_ratio: Logarithm of that ratio, a mean a seed, as a paired difference over
            seeds; None for the dynamic arm itself, and where there is no ratio.
        extent: Which steps the counts are of; "" where it is all.
        saturated: Finite elements clamped; None where a run did not count elements, as is
            `underflow_share`.
        casts: Casts made.
        clamped_casts: Casts in which anything was clamped.
        undecided_casts: Casts of which nobody knows it.
        recasts: Casts repeated with the true scale, by guarded scaling.
        overshoot: Largest amax over the largest representable value; None where nothing was
            clamped.
        nonfinite_seeds: Seeds with a recorded loss that is not finite.
        precision: "FP8" where anything was cast; "high precision" where nothing was, by
            design; "nothing cast" where a recipe asks for it; "not known" where neither is said.
        notes: What a reader must know beside the figures, distinct over seeds.
        kinds: The loss by kind of batch, most batches first; empty without groups.
        grad_error: How much clamping changed the weights' gradients, a fraction of their norm
            without clamping, over the casts that clamped; None where it was not measured.
        gradients: What it did to them, in sentences, where that is much.
    """

    name: str
    seeds: int
    unfinished: int
    final_loss: float | None
    final_gap: PairedDifference | None
    planted_ratio: tuple[float, float, float] | None
    planted_log_ratio: PairedDifference | None = None
    planted_spikes: int
    other_spikes: int
    extent: str
    saturated: float | None
    casts: float
    clamped_casts: float
    recasts: float
    underflow_share: float | None
    overshoot: float | None
    undecided_casts: float = 0.0
    nonfinite_seeds: int = 0
    precision: Precision = "FP8"
    notes: list[str] = field(default_factory=list)
    kinds: list[KindLoss] = field(default_factory=list)
    grad_error: float | None = None
    gradients: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ScenarioView:
    """One scenario: its arms side by side, and what the plots show.

    Attributes:
        planted: Marked steps: those whose batch the study made different from the others.
        mark: What they are called, as in "planted step".
        comparisons: Intervals that were looked at in the whole study, of which any could stand
            out by chance, count: what is called a difference remains one with all of them.
    """

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
    differences: dict[str, Band] = field(default_factory=dict)
    comparisons: int = 0
    mark: str = PLANTED.word


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
    every = [run for runs in records.values() for run in runs.values()]
    planted = sorted({step for run in every for step in run.planted})
    mark = next((run.mark for run in every if run.planted), PLANTED.word)
    made = sum(map(_intervals, arms))
    return ScenarioView(
        name=name,
        description=description,
        findings=_findings(arms, planted_steps(len(planted), mark), switched, made),
        planted=planted,
        mark=mark,
        arms=arms,
        curves={arm: loss_band(runs.values()) for arm, runs in records.items()},
        spikes={
            arm: sorted({step for run in runs.values() for step in run.loss_spikes})
            for arm, runs in records.items()
        },
        heat={arm: heat(list(runs.values())) for arm, runs in records.items()},
        worst={arm: _worst(list(runs.values())) for arm, runs in records.items()},
        switched=switched,
        differences={
            arm: difference_band(runs, baseline)
            for arm, runs in records.items()
            if arm != BASELINE and runs.keys() & baseline.keys()
        },
        comparisons=made,
    )


def counted_together(scenarios: Sequence[ScenarioView]) -> list[ScenarioView]:
    """Return the scenarios of one study, with the comparisons of all of them counted in each."""
    made = sum(_intervals(arm) for scenario in scenarios for arm in scenario.arms)
    return [
        replace(
            scenario,
            comparisons=made,
            findings=_findings(scenario.arms, marked_steps(scenario), scenario.switched, made),
        )
        for scenario in scenarios
    ]


def others_of(scenario: ScenarioView) -> list[ArmView]:
    """Return the arms that are compared with the baseline."""
    return [arm for arm in scenario.arms if arm.name != BASELINE]


def comparisons_of(arm: ArmView) -> list[PairedDifference]:
    """Return the differences of an arm from the baseline that have an interval."""
    every = arm.planted_log_ratio, arm.final_gap, *(kind.log_ratio for kind in arm.kinds)
    return [gap for gap in every if gap is not None and gap.interval is not None]


def _intervals(arm: ArmView) -> int:
    return len(comparisons_of(arm))


def _arm_view(name: str, runs: dict[int, RunRecord], baseline: dict[int, RunRecord]) -> ArmView:
    """Sum an arm up; its counts are of finished runs, or of all where none is finished."""
    whole = _finished(runs) or runs
    finals = [f for f in map(final_loss, whole.values()) if f is not None]
    total = sum((s.totals for run in whole.values() for s in run.sites), SiteTotals())
    at_planted = [s for run in whole.values() for s in run.loss_spikes if s in run.planted]
    spikes = sum(len(run.loss_spikes) for run in whole.values())
    precision = _precision(runs, total.casts)
    gradients = _gradients(list(whole.values()))
    return ArmView(
        name=name,
        seeds=len(runs),
        unfinished=len(runs) - len(_finished(runs)),
        final_loss=mean(finals) if finals else None,
        final_gap=None if name == BASELINE else _final_gap(runs, baseline),
        planted_ratio=_planted_ratio(runs, baseline),
        planted_log_ratio=None
        if name == BASELINE
        else log_ratio(runs, baseline, lambda run: run.planted),
        planted_spikes=len(at_planted),
        other_spikes=spikes - len(at_planted),
        extent=next((run.extent for run in whole.values() if run.extent), ""),
        saturated=total.saturated / len(whole) if total.is_counted else None,
        casts=total.casts / len(whole),
        clamped_casts=total.clamped_rows / len(whole),
        undecided_casts=total.undecided / len(whole),
        recasts=total.recasts / len(whole),
        underflow_share=total.underflow_share,
        overshoot=shown_overshoot(total),
        nonfinite_seeds=sum(
            not all(map(math.isfinite, by_step(run).values())) for run in runs.values()
        ),
        precision=precision,
        notes=_notes(runs) + ([NOTHING_CAST] if precision == "nothing cast" else []),
        # Marked steps are a kind that is compared already: a second time would count it twice.
        kinds=kind_losses(
            runs,
            None if name == BASELINE or any(run.planted for run in runs.values()) else baseline,
        ),
        grad_error=gradients.change.error if gradients.casts else None,
        gradients=_taken(gradients),
    )


def _gradients(runs: list[RunRecord]) -> ClampedGradients:
    return sum((run.gradients for run in runs), ClampedGradients())


def _taken(gradients: ClampedGradients) -> list[str]:
    """Say what clamping took of the weights' gradients, where it is much or not all is known."""
    if not (gradients.unmeasured or (gradients.casts and gradients.change.error >= TAKEN)):
        return []
    said = [gradients.words("step of all seeds", "steps of all seeds"), *gradients.worst_words()]
    return [sentence[0].lower() + sentence[1:] for sentence in said]


def _precision(runs: dict[int, RunRecord], casts: int) -> Precision:
    if casts:
        return "FP8"
    if any(run.has_recipe for run in runs.values()):
        return "nothing cast"
    return "high precision" if all(run.is_plain for run in runs.values()) else "not known"


def _notes(runs: dict[int, RunRecord]) -> list[str]:
    return list(dict.fromkeys(note for run in runs.values() for note in run.notes))


def _finished(runs: dict[int, RunRecord]) -> dict[int, RunRecord]:
    return {seed: run for seed, run in runs.items() if run.status == "finished"}


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
    pairs = [
        p for seed, run in runs.items() for p in pairs_at(run, baseline.get(seed), run.planted)
    ]
    ratios = [own / other for own, other in pairs]
    if not all(map(math.isfinite, ratios)):
        return math.nan, math.nan, math.nan
    if not ratios:
        return None
    is_positive = min(ratios) > 0
    average = math.exp(mean([math.log(r) for r in ratios])) if is_positive else mean(ratios)
    return average, min(ratios), max(ratios)


def _worst(runs: list[RunRecord]) -> list[SiteRow]:
    """Return the sites with the largest clamp error over all seeds, worst first."""
    merged: dict[SiteName, SiteRecord] = {}
    for site in (site for run in runs for site in run.sites):
        known = merged.get(site.name)
        both = site if known is None else replace(known, totals=known.totals + site.totals)
        merged[site.name] = both
    clamped = [site for site in merged.values() if site.totals.clamped_rows]
    taken = {name: site.change.error for name, site in _gradients(runs).by_name.items()}
    ranked = by_clamp_error(clamped)[:WORST_SITES]
    return [_site_row(site, taken.get(site.name)) for site in ranked]


def _site_row(site: SiteRecord, grad_error: float | None) -> SiteRow:
    return SiteRow(
        fqn=site.info.fqn,
        role=site.info.role,
        format=site.info.format,
        scaling=site.info.scaling,
        saturated=site.totals.saturated if site.totals.is_counted else None,
        clamped_casts=site.totals.clamped_rows,
        overshoot=shown_overshoot(site.totals),
        clamp_error=site.totals.clamp_error,
        underflow_share=site.totals.underflow_share,
        worst_step=site.totals.worst_step,
        grad_error=grad_error,
        undecided_casts=site.totals.undecided,
    )


def _findings(
    arms: list[ArmView], steps: str, switched: dict[str, list[str]], made: int
) -> list[str]:
    """Say in words what the figures show, and no more."""
    said, harm, taken = [], [], []
    for arm in arms:
        if arm.planted_ratio is not None and not 1 / HURT < arm.planted_ratio[0] < HURT:
            said.append(_at_planted(arm.name, steps, *arm.planted_ratio))
        if arm.clamped_casts and arm.final_gap is not None:
            harm.append(_harm(arm, arm.final_gap, made))
        taken += [f"{arm.name}: {sentence}" for sentence in arm.gradients]
    said += taken + harm
    if harm:
        # All that were made, not only those of arms that clamped: the page's JSON has them all.
        said += comparisons_in_words(made, BASELINE)
    said += [
        f"{arm.name}: {percent(arm.recasts / arm.casts)} of the casts were repeated with the "
        f"true scale{arm.extent}."
        for arm in arms
        if arm.recasts
    ]
    said += [
        f"{arm} is dynamic at: {', '.join(sites)}." for arm, sites in switched.items() if sites
    ]
    return said


def planted_steps(number: int, mark: str = PLANTED.word) -> str:
    """Return how many steps were marked, to follow "the": "planted step", "2 planted steps"."""
    return f"{mark} step" if number == 1 else counted(number, f"{mark} step")


def marked_steps(scenario: ScenarioView) -> str:
    """Return how many marked steps a scenario has, in its own word, to follow "the"."""
    return planted_steps(len(scenario.planted), scenario.mark)


def _at_planted(arm: str, steps: str, average: float, low: float, high: float) -> str:
    if math.isnan(average):
        return f"{arm}: at the {steps} a loss, or its ratio to {BASELINE}, is not finite."
    return (
        f"{arm}: at the {steps} the loss is {times(average)} that of {BASELINE} "
        f"({times(low)} to {times(high)} over steps and seeds)."
    )


def _harm(arm: ArmView, gap: PairedDifference, made: int) -> str:
    elements = "" if arm.saturated is None else f"{counted(arm.saturated, 'element')} in "
    return (
        f"{arm.name} clamped {elements}"
        f"{counted(arm.clamped_casts, 'cast')} a run{arm.extent}; the difference of its final "
        f"loss from that of {BASELINE} on the same seeds is "
        f"{difference_in_words(gap, own=arm.name, other=BASELINE, comparisons=made)}."
    )
