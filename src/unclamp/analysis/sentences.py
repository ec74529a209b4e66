"""The answer of an association in words: who is named, how strongly, and what was out of reach.

It words numbers that `association` found and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unclamp.analysis.association import SiteEvidence

MOST_NAMED = 5
"""Further named sites are counted, not worded."""
WORST = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What there is to word; as in `Association`, and what made it so."""

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
    refusal: str | None
    notes: list[str]


def describe(finding: Finding) -> list[str]:
    """Return the answer, the effect sizes, the power, and the caution, a sentence each."""
    if not finding.sites:
        return [_answer_without_sites(finding), *finding.notes]
    return [
        _answer(finding),
        *finding.notes,
        *_named(finding),
        *_harmless(finding),
        *_power(finding),
        _caution(finding),
    ]


def _answer_without_sites(finding: Finding) -> str:
    if finding.refusal is not None:
        return f"Cannot tell: {finding.refusal}"
    if finding.notes:
        return (
            f"Nothing was clamped at any of the {finding.all_sites} sites in the "
            f"{finding.steps:,} steps with a loss."
        )
    return f"Nothing was clamped at any of the {finding.all_sites} sites."


def _answer(finding: Finding) -> str:
    asked = f"{_count(finding.spikes, 'spike')} in {finding.steps:,} steps"
    clamped = f"{len(finding.sites)} of {finding.all_sites} sites clamped"
    if finding.verdict == "cannot tell":
        return f"Cannot tell: {asked}; {clamped}. {_why_not(finding)}"
    if finding.verdict == "none":
        return f"No evidence that clamping goes with spikes or a raised loss: {asked}; {clamped}."
    named = sum(site.by is not None for site in finding.sites)
    return (
        f"Evidence at {_count(named, 'site')}: {asked}; {clamped}. This is association; "
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
    return "It takes three spikes or a varying loss, and a site that clamped at three steps."


def _named(finding: Finding) -> list[str]:
    named = [site for site in finding.sites if site.by is not None]
    said = [_evidence(site, finding) for site in named[:MOST_NAMED]]
    if len(named) > MOST_NAMED:
        said.append(f"{len(named) - MOST_NAMED} more sites are named in the table.")
    return said


def _evidence(site: SiteEvidence, finding: Finding) -> str:
    """Return one named site: first what it is named by, then the rest."""
    ahead = "" if site.lag is None else f", mostly {_count(site.lag, 'step')} ahead"
    spikes = (
        f"clamped before {site.hits} of {_count(finding.spikes, 'spike')}, "
        f"{site.expected_hits:.1f} expected by chance{ahead}; of the {site.clamped_steps:,} steps "
        f"at which it clamped, {site.followed:,} were followed by a spike within {finding.max_lag}"
    )
    loss = "how the loss moves just after clamping is unknown"
    if site.loss_change is not None and site.low is not None and site.high is not None:
        interval = f"{_change(site.low, finding)} to {_change(site.high, finding)}"
        loss = (
            f"the loss just after clamping is {_change(site.loss_change, finding)} off its level "
            f"on average (95 %: {interval})"
        )
    said = [spikes, loss] if site.by == "spikes" else [loss, spikes]
    return f"{site.fqn} {site.role} (p = {site.p:.3f}): {'; '.join(said)}."


def _harmless(finding: Finding) -> list[str]:
    """Say how far clamping at the sites that are not named is shown to be harmless."""
    if finding.verdict == "cannot tell":
        return []
    rest = [site for site in finding.sites if site.by is None and site.high is not None]
    if not rest:
        return []
    often = max(rest, key=lambda site: site.clamped_steps)
    assert often.high is not None
    casts = sum(site.clamped_steps for site in rest)
    return [
        f"Harmless as far as this run can show: {casts:,} clamped casts at "
        f"{_count(len(rest), 'other site')}. Where clamping is most frequent "
        f"({often.fqn} {often.role}, {often.clamped_steps:,} steps) the loss just after it rose "
        f"by at most {_change(max(often.high, 0.0), finding)} (95 %)."
    ]


def _power(finding: Finding) -> list[str]:
    if finding.verdict == "cannot tell":
        return []
    said = []
    if finding.spikes == 0:
        said.append(
            "There were no spikes: only whether the loss is raised after clamping was asked."
        )
    elif finding.spikes_needed is None:
        said.append(
            f"Clamping before all of {_count(finding.spikes, 'spike')} would not be enough to "
            "name a site that clamps as often as is typical here."
        )
    else:
        said.append(
            f"A site that clamps as often as is typical here would be named if it clamped before "
            f"{finding.spikes_needed} of the {_count(finding.spikes, 'spike')}."
        )
    if finding.loss_needed is not None:
        said.append(
            f"A rise of the loss by about {_change(finding.loss_needed, finding)} on average just "
            "after clamping at such a site would have shown."
        )
    return said


def _caution(finding: Finding) -> str:
    worst = sorted(finding.sites, key=lambda site: -site.clamp_error)[:WORST]
    listed = ", ".join(f"{s.fqn} {s.role} ({100 * s.clamp_error:.2g} %)" for s in worst)
    noisy = sorted(
        (s for s in finding.sites if s.sqnr_db is not None), key=lambda s: s.sqnr_db or 0.0
    )
    least = ""
    if noisy:
        least = "; by sqnr_db " + ", ".join(
            f"{s.fqn} {s.role} ({s.sqnr_db:.1f} dB)" for s in noisy[:WORST]
        )
    return (
        "Clamping can also do harm that the training loss does not show (arXiv 2605.26189): look "
        "at the columns saturated_error and sqnr_db of `casts`; worst by mean clamp error: "
        f"{listed}{least}."
    )


def _change(value: float, finding: Finding) -> str:
    return f"{100 * value:+.2g} %" if finding.is_relative else f"{value:+.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
