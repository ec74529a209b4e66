"""What a run recorded, said in sentences; what matters most comes first. Torch-free."""

import math
from collections.abc import Mapping, Sequence

from unclamp.analysis import Divergence, unjudged_in_words
from unclamp.analysis.divergences import divergence_in_words
from unclamp.analysis.groups import kind_in_words
from unclamp.names import SiteName
from unclamp.report.bands import final_loss
from unclamp.report.kinds import kind_sentences
from unclamp.report.recorded import RunRecord, SiteRecord, by_clamp_error, shown_overshoot
from unclamp.totals import SiteTotals
from unclamp.written import counted, loss_text, percent, times

DEAR = 0.01
"""Share of a step's loss: clamping that cost less, by its price, is not told in words."""


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
    clamps = [*_clamp_sentences(record), *_counted_sentence(record)]
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
    clamped = by_clamp_error([site for site in sites if site.totals.clamped_rows])
    nothing = "Nothing would have been" if record.is_observed else "Nothing was"
    said = [f"{nothing} clamped at any of {counted(len(sites), 'site')}{extent}."]
    if total.undecided and not clamped:
        said = [_undecided_sentence(total, len(sites), extent)]
    elif clamped and not total.is_counted:
        said = [_casts_sentence(clamped, total, len(sites), extent)]
    elif clamped:
        elements = counted(total.saturated, "element was", "elements were")
        if record.is_observed:
            elements = f"{counted(total.saturated, 'element')} would have been"
        said = [
            f"{elements} clamped, in {total.clamped_rows:,} of "
            f"{counted(total.rows, 'recorded cast')}, at {len(clamped):,} of "
            f"{counted(len(sites), 'site')}{extent}.",
            *_worst_sentence(clamped[0], "would have " if record.is_observed else ""),
            *_gradient_sentences(record),
            *_price_sentences(record),
        ]
    if total.recasts:
        share = percent(total.recasts / total.casts)
        said.append(f"{share} of the casts were repeated with the true scale{extent}.")
    if total.nonfinite:
        broken = sum(site.totals.nonfinite > 0 for site in sites)
        elements = counted(total.nonfinite, "element was", "elements were")
        said.append(f"{elements} Inf or NaN, at {counted(broken, 'site')}{extent}.")
    return said


def _casts_sentence(
    clamped: Sequence[SiteRecord], total: SiteTotals, sites: int, extent: str
) -> str:
    """Say which casts clamped where nobody counted elements."""
    worst = max(clamped, key=lambda site: site.totals.overshoot)
    unknown = f" (of {total.undecided:,} more that is not known)" if total.undecided else ""
    return (
        f"{total.clamped_rows:,} of {counted(total.decided_rows, 'recorded cast')}{unknown} "
        "clamped, at "
        f"{len(clamped):,} of {counted(sites, 'site')}{extent}; the largest overshoot is "
        f"{times(worst.totals.overshoot)}, at {worst.name}. Most often: "
        f"{clamped[0].name}, in {clamped[0].totals.clamped_rows:,} of "
        f"{clamped[0].totals.decided_rows:,}. "
        "How many elements, and how much that removed, is not known."
    )


def _undecided_sentence(total: SiteTotals, sites: int, extent: str) -> str:
    """Say that nothing is known to have clamped, where of some casts nobody knows."""
    casts = counted(total.rows, "recorded cast")
    return (
        f"Of {total.undecided:,} of {casts} at {counted(sites, 'site')} it is not known whether "
        f"they clamped{extent}; none of the others did."
    )


def _counted_sentence(record: RunRecord) -> list[str]:
    """Say what would have been clamped where nothing is computed from the casts."""
    sites = record.counted_sites
    if not sites:
        return []
    total = sum((site.totals for site in sites), SiteTotals())
    largest = shown_overshoot(total)
    by = "" if largest is None else f", largest overshoot {times(largest)}"
    return [
        f"Attention, only counted: {counted(len(sites), 'site')}, "
        f"{counted(total.saturated, 'element')} would have been clamped{by}; nothing is computed "
        "from these casts, and they are in no other figure."
    ]


def _nothing_cast(record: RunRecord) -> str:
    said = "No cast was recorded."
    if record.has_recipe:
        return f"{said} The run has a recipe, but nothing of it was in FP8."
    if record.is_plain:
        return f"{said} It is a training without FP8, by design."
    return f"{said} Whether it was in FP8 is not in the log." if record.steps else said


def _worst_sentence(site: SiteRecord, would: str = "") -> list[str]:
    """Say where clamping removed most; nothing where it removed too little to be counted."""
    totals = site.totals
    if totals.worst_step is None:
        return []
    return [
        f"Most clamp error: {site.name}, worst at step {totals.worst_step:,}, where clamping "
        f"{would}removed {percent(totals.clamp_error_max)} of the tensor's squares."
    ]


def _gradient_sentences(record: RunRecord) -> list[str]:
    """Say what clamping gradients took of the weights', and where most, or that nobody knows."""
    found = record.gradients
    return [found.words(), *found.worst_words()] if found.has_clamped else []


def _price_sentences(record: RunRecord) -> list[str]:
    """Say which casts' clamping cost most, where that was a part of the loss worth telling."""
    worst = next(iter(record.prices.sites), None)
    losses = dict(zip(record.steps, record.loss, strict=True))
    loss = None if worst is None else losses.get(worst.worst_step or 0)
    if worst is None or worst.worst is None or not loss or worst.worst < DEAR * abs(loss):
        return []
    return record.prices.words()


def _switch_sentences(switched: Mapping[SiteName, list[int]]) -> list[str]:
    steps = sorted({step for each in switched.values() for step in each})
    if not steps:
        return []
    first = ", ".join(f"{step:,}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    return [f"{counted(len(switched), 'site')} switched scaling, at step {first}."]
