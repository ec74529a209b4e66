"""What a comparison of runs says, in sentences that claim no more than the figures. Torch-free."""

import math
from collections.abc import Sequence

from unclamp.analysis.paired import difference_in_words
from unclamp.analysis.unpaired import unpaired_in_words
from unclamp.names import SiteName
from unclamp.report.side_by_side.groups import Arm
from unclamp.report.side_by_side.losses import LossDifference, Parting, comparisons_of
from unclamp.report.side_by_side.settings import Setting, changed_settings
from unclamp.report.side_by_side.sites import SiteRowOfArms
from unclamp.totals import SiteTotals
from unclamp.written import counted, listed, percent, signed

MOST_CHANGES = 4
MOST_STEPS = 5


def verdict_in_words(
    arms: Sequence[Arm],
    differences: Sequence[LossDifference],
    settings: Sequence[Setting],
    sites: Sequence[SiteRowOfArms],
) -> list[str]:
    """Return the verdict: what differs, whether the losses do, and what was clamped."""
    base = arms[0]
    if not differences:
        return [_one_arm(base), *_nonfinite(arms), *_clamped(arms, sites)]
    made = comparisons_of(differences)
    said = [_headline(differences, made)]
    for found in differences:
        said += [_changes(found, settings), *_loss(found, made), *_partings(found)]
    return [*said, *_nonfinite(arms), *_clamped(arms, sites)]


def _one_arm(arm: Arm) -> str:
    seeds = ", ".join(str(run.seed) for run in arm.runs)
    return (
        f"All {len(arm.runs)} runs are seeds of one arm ({seeds}): recipe and metadata are the "
        "same, so there is nothing to compare but the spread between seeds."
    )


def _headline(differences: Sequence[LossDifference], made: int) -> str:
    """Say of all arms in one sentence whether their losses differ at the end.

    Each has its own interval, so of several arms one is called higher or lower only if it remains
    so with all of them counted.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for found in differences:
        groups.setdefault(_outcome(found, made), []).append(found.arm)
    parts = [
        f"{how} for {listed(names)}" + (f" ({why})" if why else "")
        for (how, why), names in groups.items()
    ]
    base = differences[0].baseline
    said = f"Against {base}, the loss at the end is {'; '.join(parts)}."
    alone = {found.arm: sum(len(p.own_spikes) for p in found.partings) for found in differences}
    spiky = [f"{arm} ({number})" for arm, number in alone.items() if number]
    if spiky:
        said += (
            f" Spikes of the loss that {base} does not have at the same steps: {', '.join(spiky)}."
        )
    return said


def _outcome(found: LossDifference, made: int) -> tuple[str, str]:
    """Return how an arm's loss is, as an adjective, and why nothing more can be said."""
    if is_equal(found):
        return "equal in every digit", "at every common step"
    shown = found.paired or found.unpaired
    if shown is None:
        return "unknown", "no common step"
    is_chance = not shown.differs_among(made)
    chance = f"which among {made} comparisons may be chance" if is_chance else ""
    return {
        "differs": ("higher" if shown.mean > 0 else "lower", chance),
        "not distinguishable": ("not distinguishable", ""),
        "not finite": ("unknown", "a loss is not finite"),
        "equal": ("equal in every digit", ""),
        "constant": ("not to be judged", "its seeds do not vary"),
        "one pair": ("not to be judged", "one pair of runs"),
        "single run": ("not to be judged", "single runs"),
    }[shown.verdict]


def is_equal(found: LossDifference) -> bool:
    """Return whether the losses of all pairs are equal in every digit at all common steps."""
    return bool(found.partings) and all(parting.is_equal for parting in found.partings)


def _changes(found: LossDifference, settings: Sequence[Setting]) -> str:
    """Say in what an arm differs from the baseline; names and cadences only if nothing else."""
    own, other = found.arm, found.baseline
    differ = changed_settings(settings, own, other)
    telling = [s for s in differ if s.is_of_training] or differ
    if not telling:
        return f"{own} and {other} differ in nothing that their headers know."
    rest = len(telling) - MOST_CHANGES
    more = f"; and {counted(rest, 'more setting')}" if rest > 0 else ""
    changes = "; ".join(setting.change(own, other) for setting in telling[:MOST_CHANGES])
    return f"{own} against {other}: {changes}{more}."


def _loss(found: LossDifference, made: int) -> list[str]:
    own, other = found.arm, found.baseline
    if found.end_first is None or found.last is None:
        return [f"{own} and {other} recorded no loss at any common step: losses are not compared."]
    if is_equal(found):
        where = "the only" if found.steps == 1 else f"all {found.steps:,}"
        are = f"The losses of {own} and {other} are equal in every digit"
        return [f"{are} at {where} common step{'' if found.steps == 1 else 's'}."]
    where = f"step {found.end_first:,}" if found.end_first == found.last else (
        f"steps {found.end_first:,} to {found.last:,}"
    )  # fmt: skip
    words = ""
    if found.paired is not None:
        words = difference_in_words(found.paired, own=own, other=other, comparisons=made)
        if found.paired.verdict == "one pair":
            words = (
                f"{signed(found.paired.mean)} (one pair of runs: no interval, so whether that is "
                "chance cannot be told)"
            )
    elif found.unpaired is not None:
        words = unpaired_in_words(found.unpaired, own=own, other=other, comparisons=made)
    return [f"Loss of {own} minus that of {other}, mean over {where}: {words}."]


def _partings(found: LossDifference) -> list[str]:
    """Say where pairs come apart: steps for a single pair, spikes for all."""
    apart = [parting for parting in found.partings if not parting.is_equal]
    said = [_apart(apart[0], found)] if len(found.partings) == len(apart) == 1 else []
    return said + _spikes(apart, found)


def _apart(parting: Parting, found: LossDifference) -> str:
    both = f"{parting.own} and {parting.other}"
    if parting.usual_change is None:
        return f"{both} have {counted(found.steps, 'common step')}, too few to say where they part."
    usual = (
        f"the loss of {parting.other} usually changes from one common step to the next "
        f"({parting.usual_change:.2g})"
    )
    if not parting.beyond or parting.first_beyond is None:
        return f"At no common step are {both} further apart than {usual}."
    said = (
        f"At {parting.beyond:,} of {counted(found.steps, 'common step')} {both} are further apart "
        f"than {usual}, first at step {parting.first_beyond:,}"
    )
    if parting.furthest is None or parting.furthest_by is None:
        return f"{said}."
    return f"{said}; furthest at step {parting.furthest:,}, by {signed(parting.furthest_by)}."


def _spikes(partings: Sequence[Parting], found: LossDifference) -> list[str]:
    """Say which spikes only one run of a pair has, of several pairs with how many there are."""
    pairs = len(partings)
    groups = (
        (f"in {found.arm} alone", [p.own_spikes for p in partings]),
        (f"in {found.baseline} alone", [p.other_spikes for p in partings]),
        ("in both", [p.shared_spikes for p in partings]),
    )
    said = []
    for who, onsets in groups:
        every = [step for each in onsets for step in each]
        where = steps(sorted(set(every)))
        if every:
            said.append(f"{who} at {where}" if pairs == 1 else f"{len(every)} {who}, at {where}")
    over = "" if pairs == 1 else f" over {pairs} pairs"
    return (
        [f"Spikes of the losses of {found.arm} and {found.baseline}{over}: {'; '.join(said)}."]
        if said
        else []
    )


def _nonfinite(arms: Sequence[Arm]) -> list[str]:
    said = []
    for run in (run for arm in arms for run in arm.runs):
        lost = [step for step, loss in run.losses.items() if not math.isfinite(loss)]
        if lost:
            count = "1 step" if len(lost) == 1 else f"{len(lost):,} steps, first at {lost[0]:,}"
            where = f"step {lost[0]:,}" if len(lost) == 1 else count
            said.append(f"The loss of {run.name} is NaN or Inf at {where}.")
    return said


def _clamped(arms: Sequence[Arm], sites: Sequence[SiteRowOfArms]) -> list[str]:
    totals = {arm.name: sum(arm.sites.values(), SiteTotals()) for arm in arms}
    cast = [arm for arm in arms if totals[arm.name].rows]
    if not cast:
        return ["No cast was recorded in any of these runs."]
    if not any(total.clamped_rows for total in totals.values()):
        none = ", ".join(arm.name for arm in arms if arm not in cast)
        is_sparse = any(run.record.recorded is not None for arm in cast for run in arm.runs)
        where = "in the recorded casts of any run" if is_sparse else "in any run"
        unknown = sum(total.undecided for total in totals.values())
        but = f" (of {counted(unknown, 'cast')} it is not known)" if unknown else ""
        no_cast = f" ({none}: no cast)" if none else ""
        return (
            [f"Nothing is known to have clamped {where}{but}{no_cast}."]
            if unknown
            else [f"Nothing was clamped {where}{no_cast}."]
        )
    parts = []
    for arm in arms:
        total = totals[arm.name]
        if not total.rows:
            parts.append(f"{arm.name} no cast")
        elif not total.clamped_rows:
            is_known = not total.undecided
            parts.append(f"{arm.name} nothing" + ("" if is_known else " that is known"))
        elif not total.is_counted:
            cut = percent(total.clamped_rows / total.decided_rows)
            unknown = f" ({total.undecided:,} more not known)" if total.undecided else ""
            parts.append(
                f"{arm.name} in {cut} of its recorded casts{unknown}, elements not counted"
            )
        else:
            mean = count(total.saturated / len(arm.runs))
            word = "element" if mean == "1" else "elements"
            cut = percent(total.clamped_rows / total.rows)
            parts.append(f"{arm.name} {mean} {word}, in {cut} of its recorded casts")
    each = " (mean a run)" if any(len(arm.runs) > 1 for arm in arms) else ""
    said = [f"Clamped{each}: {'; '.join(parts)}."]
    if len(cast) > 1 and sites[0].difference > 0:
        said.append(_worst(sites[0]))
    return said


def _worst(row: SiteRowOfArms) -> str:
    there = {arm: loss for arm, loss in row.arms.items() if loss is not None}
    figures = ", ".join(
        f"{arm} {percent(loss.clamp_error) if loss.clamp_error is not None else '0'} in "
        f"{count(loss.clamped_casts)} of {count(loss.casts)} "
        f"{'cast' if loss.casts == 1 else 'casts'}"
        for arm, loss in there.items()
    )
    name = SiteName(row.fqn, row.role)  # type: ignore[arg-type]  # a log may hold another role
    return f"The clamp error differs most at {name}: {figures}."


def steps(numbers: Sequence[int]) -> str:
    """Return the first few of some steps as text."""
    rest = f" and {len(numbers) - MOST_STEPS} more" if len(numbers) > MOST_STEPS else ""
    word = "step" if len(numbers) == 1 else "steps"
    return f"{word} {', '.join(f'{n:,}' for n in numbers[:MOST_STEPS])}{rest}"


def count(number: float) -> str:
    """Return a count, or a mean of counts: whole from 10 on, with two figures below."""
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"
