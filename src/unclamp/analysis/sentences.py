"""The answer of an association in words: who is named, how strongly, and what was out of reach.

It words numbers that `association` found and decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unclamp.analysis.ranking import SiteEvidence
from unclamp.analysis.schedules import LEAST_PLACES, PLACE_STEPS
from unclamp.written import counted

MOST_NAMED = 5
"""Further named sites are counted, not worded."""
WORST = 3
MOST_PERCENT = 1000
"""From here on a change is worded as a multiple."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What there is to word; as in `Association`, and what made it so.

    Attributes:
        enough: Whether enough shifts differ, of a record that can tell, to name anybody.
    """

    verdict: str
    sites: list[SiteEvidence]
    all_sites: int
    spikes: int
    steps: int
    max_lag: int
    distinct_shifts: int
    shifts_needed: int
    spikes_needed: int | None
    loss_needed: float | None
    period: int | None
    is_relative: bool
    is_observed: bool
    enough: bool
    refusal: str | None
    notes: list[str]


def describe(finding: Finding) -> list[str]:
    """Return the answer, the effect sizes, the power, and the caution, a sentence each."""
    if not finding.sites:
        return [*_observed(finding), _answer_without_sites(finding), *finding.notes]
    return [
        *_observed(finding),
        _answer(finding),
        *finding.notes,
        *_named(finding),
        *_doubted(finding),
        *_cleared(finding),
        *_uncleared(finding),
        *_power(finding),
        _caution(finding),
    ]


def without_casts(*, is_over: bool, is_plain: bool) -> str:
    """Return what there is to say of a run that recorded no cast; `is_plain`, as was meant."""
    if is_over and not is_plain:
        return (
            "Cannot tell: no cast was recorded, and whether the run trained in FP8 is not in its "
            "log."
        )
    if is_over:
        return "Nothing was cast in this run: it trained without FP8, so nothing was clamped."
    return (
        "Cannot tell: no cast was recorded yet; the run trains without FP8, or it stopped before "
        "its first casts were written."
    )


def change_in_words(value: float, *, is_relative: bool) -> str:
    """Return a change of the loss: "+12.3 %", from ten-fold on "12.3 times"; or in its own unit.

    Three significant figures without an exponent, four decimals at most.
    """
    if not is_relative:
        return f"{value:+.3g}"
    if value >= MOST_PERCENT / 100:
        times = 1 + value
        return f"{times:.3g} times" if times < 1000 or times >= 1e6 else f"{times:,.0f} times"
    percent = 100 * value
    digits = 4 if percent == 0 else 2 - math.floor(math.log10(abs(percent)))
    rounded = f"{percent:+.{min(max(digits, 0), 4)}f}"
    return f"{rounded if float(rounded) else '0'} %"


def _observed(finding: Finding) -> list[str]:
    if not finding.is_observed:
        return []
    follows = "; what follows is where FP8 would have clamped near spikes" if finding.sites else ""
    return [
        "Nothing was cast in this training: FP8 was only observed, so its clamping cannot have "
        f"moved this loss{follows}."
    ]


def _clamped(finding: Finding) -> str:
    return "would have clamped" if finding.is_observed else "clamped"


def _answer_without_sites(finding: Finding) -> str:
    if finding.refusal is not None:
        return f"Cannot tell: {finding.refusal}"
    nothing = "FP8 would have clamped nothing" if finding.is_observed else "Nothing was clamped"
    said = f"{nothing} at any of the {counted(finding.all_sites, 'site')}"
    return (
        f"{said} in the {counted(finding.steps, 'step')} with a loss."
        if finding.notes
        else f"{said}."
    )


def _answer(finding: Finding) -> str:
    asked = f"{counted(finding.spikes, 'spike')} of the loss in {counted(finding.steps, 'step')}"
    clamped = f"{len(finding.sites)} of {counted(finding.all_sites, 'site')} {_clamped(finding)}"
    if finding.verdict == "cannot tell":
        return f"Cannot tell: {asked}; {clamped}. {_why_not(finding)}"
    if finding.verdict == "none":
        return f"No evidence that clamping goes with spikes or a raised loss: {asked}; {clamped}."
    named = counted(sum(site.by is not None for site in finding.sites), "site")
    if finding.is_observed:
        return (
            f"At {named} FP8 would have clamped before spikes, or before a raised loss, more often "
            f"than by chance: {asked}; {clamped}. What raised the loss may also be what FP8 would "
            "have clamped."
        )
    return (
        f"Evidence at {named}: {asked}; {clamped}. This is association; "
        "a replay with those casts un-clamped would show cause."
    )


def _why_not(finding: Finding) -> str:
    if finding.refusal is not None:
        return finding.refusal
    if finding.distinct_shifts < finding.shifts_needed:
        rhythm = ""
        if finding.period is not None:
            rhythm = f"the spikes come at multiples of {finding.period} steps, so that "
        return (
            f"Too few distinct shifts to name anybody: {rhythm}only {finding.distinct_shifts} "
            f"differ, and it takes {finding.shifts_needed}; a longer run or spikes at irregular "
            "steps would do."
        )
    if any(site.doubt for site in finding.sites):
        return "Only a shared schedule or place links them."
    if finding.spikes and any(site.loss_change is not None for site in finding.sites):
        left = sum(not site.cleared for site in finding.sites)
        return (
            f"Clamping before {_every(finding.spikes)} would not be enough to name a typical site, "
            f"and the loss after clamping does not clear {counted(left, 'site')}."
        )
    return (
        "It takes three spikes and a site that clamped at three steps, or a varying loss and sites "
        f"that clamped in {LEAST_PLACES} stretches of {PLACE_STEPS} steps."
    )


def _named(finding: Finding) -> list[str]:
    named = [site for site in finding.sites if site.by is not None]
    said = [_evidence(site, finding) for site in named[:MOST_NAMED]]
    if len(named) > MOST_NAMED:
        more = counted(len(named) - MOST_NAMED, "more site is", "more sites are")
        said.append(f"{more} named in the table.")
    return said


def _evidence(site: SiteEvidence, finding: Finding) -> str:
    """Return one named site: first what it is named by, then the rest."""
    ahead = "" if site.lag is None else f", mostly {counted(site.lag, 'step')} ahead"
    spikes = (
        f"{_clamped(finding)} before {site.hits} of {counted(finding.spikes, 'spike')}, "
        f"{site.expected_hits:.1f} expected by chance{ahead}; of the "
        f"{counted(site.clamped_steps, 'step')} at which it {_clamped(finding)}, "
        f"{counted(site.followed, 'was', 'were')} followed by a spike within "
        f"{finding.max_lag}"
    )
    loss = "how the loss moves just after them is unknown"
    if site.loss_change is not None and site.low is not None and site.high is not None:
        interval = f"{_change(site.low, finding)} to {_change(site.high, finding)}"
        loss = (
            f"the loss just after{' those steps' if finding.is_observed else ' clamping'}, against "
            f"its level and on average: "
            f"{_change(site.loss_change, finding)} (95 %: {interval})"
        )
    said = [spikes, loss] if site.by == "spikes" else [loss, spikes]
    return f"{site.fqn} {site.role} (p = {site.p:.3f}): {'; '.join(said)}."


def _doubted(finding: Finding) -> list[str]:
    """Say of which sites a schedule may be the link, one sentence for each schedule."""
    said = []
    doubted = [site for site in finding.sites if site.doubt]
    for doubt, period in dict.fromkeys((site.doubt, site.period) for site in doubted):
        like = [site for site in doubted if (site.doubt, site.period) == (doubt, period)]
        where = ", ".join(f"{site.fqn} {site.role}" for site in like[:WORST])
        more = f" and {len(like) - WORST} more" if len(like) > WORST else ""
        clamping = f"clamping at {where}{more}"
        if doubt == "period":
            said.append(
                f"Loss and {clamping} both repeat every {period} steps: whether one follows the "
                "other cannot be told from this run."
            )
        elif doubt == "learning rate":
            said.append(
                f"Loss and {clamping} change together only where the learning rate jumps: whether "
                "one follows the other cannot be told from this run."
            )
        else:
            said.append(
                f"Loss and {clamping} rise together in too few places of the run: one change of "
                "the data or of the learning rate at each would do that too."
            )
    return said


def _cleared(finding: Finding) -> list[str]:
    """Say which clamping is shown to be harmless, by the worst that it may have done."""
    rest = [site for site in finding.sites if site.cleared]
    if not rest or finding.is_observed:
        return []
    worst = max(rest, key=_highest)
    casts = sum(site.clamped_steps for site in rest)
    other = " other" if finding.verdict == "named" else ""
    return [
        f"Harmless as far as this run can show: {casts:,} clamped casts at "
        f"{len(rest):,}{other} site{'' if len(rest) == 1 else 's'}. The loss just after them rose "
        f"by at most {_change(max(_highest(worst), 0.0), finding)}, at {worst.fqn} {worst.role}; "
        "such bounds hold for all cleared sites at once in 95 % of runs."
    ]


def _uncleared(finding: Finding) -> list[str]:
    """Say how many sites this run neither names nor clears, and the one nearest to a name."""
    if not finding.enough or finding.is_observed:
        return []
    rest = [s for s in finding.sites if s.by is None and not s.cleared and not s.doubt]
    if not rest:
        return []
    worst = rest[0]  # sites come strongest evidence first
    change = "loss after it unknown"
    if worst.loss_change is not None and worst.high is not None:
        change = (
            f"{_change(worst.loss_change, finding)}, at most {_change(worst.high, finding)} (95 %)"
        )
    before = ""
    if finding.spikes:
        before = f", before {worst.hits} of {counted(finding.spikes, 'spike')}"
    are = "site is" if len(rest) == 1 else "sites are"
    return [
        f"{len(rest):,} {are} neither named nor cleared; strongest: {worst.fqn} {worst.role}, "
        f"{change}{before}, p = {worst.p:.3f}."
    ]


def _highest(site: SiteEvidence) -> float:
    return math.inf if site.bound is None else site.bound


def _power(finding: Finding) -> list[str]:
    if finding.verdict == "cannot tell":
        return []
    said = []
    if finding.spikes == 0:
        said.append(
            "There were no spikes of the loss: only whether it is raised after clamping was asked."
        )
    elif finding.spikes_needed is None:
        said.append(
            f"Clamping before {_every(finding.spikes)} would not be enough to name a typical "
            "site, one that clamps as often as the median site here."
        )
    else:
        said.append(
            f"A typical site, one that clamps as often as the median site here, would be named if "
            f"it clamped before {finding.spikes_needed} of the {counted(finding.spikes, 'spike')}."
        )
    if finding.loss_needed is not None and not finding.is_observed:
        said.append(_loss_power(finding, finding.loss_needed))
    return said


def _loss_power(finding: Finding, needed: float) -> str:
    said = (
        f"At a typical site a rise of the loss by about {_change(needed, finding)} on average just "
        "after clamping would have shown"
    )
    above = sum(
        site.by is None and site.loss_change is not None and site.loss_change >= needed
        for site in finding.sites
    )
    if not above:
        return f"{said}."
    rose = "site that is not named rose" if above == 1 else "sites that are not named rose"
    return f"{said}. {above:,} {rose} by more: the p of each says how often chance does that."


def _caution(finding: Finding) -> str:
    if any(site.clamp_error is None for site in finding.sites):
        return (
            "Clamping can also do harm that the training loss does not show (arXiv 2605.26189): "
            "look at the overshoot (amax * scale over format_max in `casts`); how much clamping "
            "removed is not in this log, since elements were not counted."
        )
    worst = sorted(finding.sites, key=lambda site: -(site.clamp_error or 0.0))[:WORST]
    listed = ", ".join(f"{s.fqn} {s.role} ({100 * (s.clamp_error or 0.0):.2g} %)" for s in worst)
    noisy = sorted(
        (s for s in finding.sites if s.sqnr_db is not None), key=lambda s: s.sqnr_db or 0.0
    )
    least = ""
    if noisy:
        least = "; by SQNR " + ", ".join(
            f"{s.fqn} {s.role} ({s.sqnr_db:.1f} dB)" for s in noisy[:WORST]
        )
    if finding.is_observed:
        return f"Worst by the mean clamp error that FP8 would have made: {listed}{least}."
    return (
        "Clamping can also do harm that the training loss does not show (arXiv 2605.26189): look "
        "at clamp error and SQNR (columns saturated_error and sqnr_db of `casts`); worst by mean "
        f"clamp error: {listed}{least}."
    )


def _change(value: float, finding: Finding) -> str:
    return change_in_words(value, is_relative=finding.is_relative)


def _every(spikes: int) -> str:
    return "the one spike" if spikes == 1 else f"all of {spikes:,} spikes"
