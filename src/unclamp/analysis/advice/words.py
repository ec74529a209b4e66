"""An advice in sentences."""

from unclamp.analysis.advice.advise import Advice, GroupAdvice
from unclamp.analysis.advice.harm import tolerated_overshoot
from unclamp.analysis.advice.tails import MOST_OCTAVES
from unclamp.analysis.whatif import policy_text
from unclamp.written import counted, listed, percent, times

MOST_GROUPS = 6


def verdict_sentence(advice: Advice) -> str:
    """Return the answer in one sentence."""
    hardest = max(advice.groups, key=lambda g: g.overshoot)
    if advice.verdict == "too short":
        return (
            f"This log is too short to say: it has {counted(advice.steps, 'step')}, of which a "
            "history of 16 needs the first 16 to fill. Record at least 48, better some thousands."
        )
    if advice.verdict == "does not matter":
        most = (
            "no amax outran a history of 16"
            if hardest.overshoot <= 1
            else f"amaxes outran a history of 16 by {times(hardest.overshoot)} at most"
        )
        return (
            f"It does not matter here: in {counted(advice.steps, 'step')} {most}, and what is "
            f"tolerated is {times(tolerated_overshoot(advice.harm.value))}, of gradients "
            f"{times(tolerated_overshoot(advice.harm.gradient))}. Delayed scaling is the cheapest."
        )
    needy = [g for g in advice.groups if g.is_needy]
    return (
        f"It matters: delayed scaling would have clamped too much at {_places(needy)}; amaxes "
        f"outran a history of 16 by up to {times(hardest.overshoot)} (at "
        f"{hardest.hardest or '(the model itself)'}, {hardest.group.role}). "
        f"The recipe below costs {advice.reads:.3f} reads an element, where "
        "delayed scaling costs 1 and dynamic scaling 2."
    )


def _places(groups: list[GroupAdvice]) -> str:
    return listed([_name(g) for g in groups], most=MOST_GROUPS)


def _name(group: GroupAdvice) -> str:
    place = group.group.match.removeprefix("*.").removeprefix("^") or "(the model itself)"
    return f"{place} {group.group.role}"


def reasons(advice: Advice) -> list[str]:
    """Return what the advice is based on, what the log cannot know, and what would change it."""
    said = [verdict_sentence(advice)]
    needy = [g for g in advice.groups if g.is_needy]
    said += [_group_sentence(g) for g in needy[:MOST_GROUPS]]
    if len(needy) > MOST_GROUPS:
        rest = (
            f"{_name(g)} (up to {times(g.overshoot)}): {policy_text(g.scaling)}"
            for g in needy[MOST_GROUPS:]
        )
        said.append(f"Likewise, in short: {'; '.join(rest)}.")
    mild = [g for g in advice.groups if g.outrun and not g.is_needy]
    if mild:
        casts, outrun = sum(g.casts for g in mild), sum(g.outrun for g in mild)
        which = f"{len(mild):,} of {counted(len(advice.groups), 'group')}"
        if any(g.hard for g in advice.groups):
            which = counted(len(mild), "other group")
        said.append(
            f"At {which} amaxes outran a history of 16 in {percent(outrun / casts)} of their "
            f"casts, by {times(max(g.overshoot for g in mild))} at most: tolerated."
        )
    said.append(_trend_sentence(advice))
    if advice.horizon is not None:
        said.append(_horizon_sentence(advice))
    if advice.budget is not None and advice.reads > advice.budget:
        said.append(f"The budget of {advice.budget:g} reads an element cannot be kept.")
    elif advice.budget is not None and any(g.is_needy and not _is_safe(g) for g in advice.groups):
        said.append(
            "To keep the budget, groups that would clamp hard have delayed scaling all the same: "
            "guarded scaling of them costs more."
        )
    said += advice.limits
    said.append(
        "The advice would change with the data (another mixture, longer sequences), the learning "
        "rate, or a resume without the histories: record again, or train with guarded scaling, "
        "which clamps nothing whatever comes."
    )
    return said


def _is_safe(group: GroupAdvice) -> bool:
    return group.scaling.guards or group.scaling.takes_own


def _group_sentence(g: GroupAdvice) -> str:
    how = f"{policy_text(g.scaling)}"
    again = f", which repeats {percent(g.recast)} of its casts" if g.scaling.guards else ""
    hard = (
        f", of which {counted(g.hard, 'cast')} may have lost more than is tolerated (up to "
        f"{times(g.overshoot)}, first at step {g.first_hard:,})"
        if g.hard
        else f" (up to {times(g.overshoot)})"
    )
    beside = (
        f"; {counted(g.beside, 'is', 'are')} of steps in which values outran theirs harder "
        "elsewhere, one outlier on its way"
        if g.beside
        else ""
    )
    price = (
        f"; its clamping cost up to {percent(g.price)} of a step's loss in this run, to first order"
        if g.price is not None and g.price > 0
        else ""
    )
    return (
        f"{_name(g)}: amax outran a history of 16 in {counted(g.outrun, 'cast')} of "
        f"{g.casts:,}{hard}{beside}{price}: {how}{again}."
    )


def _trend_sentence(advice: Advice) -> str:
    rising = [g for g in advice.groups if g.rises]
    if rising:
        return (
            f"Amaxes outrun their histories more and more often at {_places(rising)} (Kendall's "
            f"tau, p = {min(g.trend_p for g in rising):.2g} with all groups counted): what was "
            "enough so far may not be."
        )
    if not any(g.trend.rates for g in advice.groups):
        return "The log is too short to test whether amaxes outrun their histories more often."
    return (
        "No trend shows in how often amaxes outrun their histories (Kendall's tau over windows, "
        "all groups counted)."
    )


def _factor(value: float) -> str:
    """Return how many times as long: three figures, and whole numbers from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _horizon_sentence(advice: Advice) -> str:
    assert advice.horizon is not None
    if advice.horizon <= advice.steps:
        return f"The log covers the {advice.horizon:,} steps that were asked about."
    longer = advice.horizon / advice.steps
    asked = f"{counted(advice.horizon, 'step')} are {_factor(longer)} times as long as the log"
    if advice.tail is None:
        seen = advice.clamped_share * advice.steps
        if seen == 0:
            return (
                f"{asked}: no amax outran its history in {advice.steps:,} steps, so the share of "
                f"steps in which one does is below {percent(3 / advice.steps)} (95 %), and more is "
                "not known."
            )
        return f"{asked}, in which too few amaxes outran their histories for a forecast."
    tail = advice.tail
    until = "until then" if tail.reaches else f"in the next {counted(tail.steps, 'step')}"
    high = "no bound" if tail.high >= 2**MOST_OCTAVES else times(tail.high)
    said = (
        f"{asked}. The largest overshoot {until}, by a fitted tail: {times(tail.value)}, 95 % "
        f"between {times(tail.low)} and {high}, if the training goes on as it did."
    )
    if tail.reaches:
        return said
    return (
        f"{said} What lies beyond is extrapolation, {_factor(tail.asked / tail.steps)} times as "
        "far: the log does not say how large amaxes become there, and only a scaling that cannot "
        "clamp is safe whatever comes."
    )
