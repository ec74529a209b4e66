"""What a study's figures answer, in a few sentences that come first. Computed; torch-free.

A claim needs an interval over seeds: one seed is reported as seen, and nothing is claimed of it.
An arm is called hurt where its loss at marked steps, planted or with few labels, is above the
baseline's by more than 5 % with the whole of its interval and with all comparisons of the study
counted, and not hurt where the whole interval stays below that. "No arm" and "every arm" are said
only where each other arm was compared: one that diverged, or has no common seed yet, is none of
them. The figures behind each sentence are in `arms`.
"""

import math
from collections.abc import Iterable, Sequence

from unclamp.analysis.groups import kind_in_words
from unclamp.analysis.paired import comparisons_in_words
from unclamp.report.arms import (
    BASELINE,
    HURT,
    ArmView,
    ScenarioView,
    comparisons_of,
    marked_steps,
    others_of,
)
from unclamp.report.final_losses import final_losses
from unclamp.written import counted, listed, percent, times

MOST_NOTES = 4
_BAR = math.log(HURT)


def study_verdict(scenarios: Sequence[ScenarioView], *, is_whole: bool = True) -> list[str]:
    """Return what a study shows, the answer first, and what it cannot show.

    Args:
        scenarios: In the order in which they are to be told.
        is_whole: Whether every run of the study is finished.
    """
    if not scenarios:
        return ["Nothing can be said yet: no run has recorded anything."]
    said = [] if is_whole else ["So far, with the runs and steps that there are:"]
    made = sum(len(comparisons_of(arm)) for each in scenarios for arm in each.arms)
    for scenario in scenarios:
        said += _scenario(scenario, made)
    return said + _counted_together(scenarios, made) + _mind(scenarios)


def _scenario(scenario: ScenarioView, made: int) -> list[str]:
    where = f"scenario {scenario.name}"
    if not any(arm.name == BASELINE for arm in scenario.arms) or len(scenario.arms) == 1:
        return [_alone(scenario, where), *_diverged(scenario)]
    planted = _at_planted(scenario, where, made)
    kinds = _by_kind(scenario, where, made)
    return [*_diverged(scenario), *planted, *kinds, *final_losses(scenario, where, made)]


def _alone(scenario: ScenarioView, where: str) -> str:
    """Say what was seen of arms that nothing can be compared with."""
    if len(scenario.arms) == 1:
        why = f"There is one arm only in {where}, so it cannot be compared with another"
    else:
        why = (
            f"There is no arm {BASELINE} in {where}, with which arms are compared, so none can be "
            "called better or worse"
        )
    return f"{why}. Seen: {'; '.join(map(_seen_alone, scenario.arms))}."


def _seen_alone(arm: ArmView) -> str:
    spikes = counted(
        arm.planted_spikes + arm.other_spikes, "spike of the loss", "spikes of the loss"
    )
    clamped = f"nothing clamped{arm.extent}"
    if arm.undecided_casts:
        clamped = f"nothing that is known to have clamped{arm.extent}"
    if arm.precision != "FP8":
        clamped = "no FP8"
    elif arm.clamped_casts:
        number, what = arm.saturated, "element"
        if number is None:
            number, what = arm.clamped_casts, "cast"
        clamped = f"{counted(number, what)} clamped a run{arm.extent}"
    return f"{arm.name}: {spikes}, {clamped}"


def _diverged(scenario: ScenarioView) -> list[str]:
    return [
        f"The loss of {arm.name} is not finite with {_lost_seeds(arm)} (scenario "
        f"{scenario.name}), so of how far it differs from other arms nothing can be said."
        for arm in scenario.arms
        if arm.nonfinite_seeds
    ]


def _lost_seeds(arm: ArmView) -> str:
    if arm.seeds == 1:
        return "its only seed"
    return f"{arm.nonfinite_seeds} of {counted(arm.seeds, 'seed')}"


# At planted steps ---------------------------------------------------------------------------------
def _at_planted(scenario: ScenarioView, where: str, made: int) -> list[str]:
    if not scenario.planted:
        return []
    steps = marked_steps(scenario)
    found = [arm for arm in scenario.arms if arm.planted_log_ratio is not None]
    finite = [arm for arm in found if math.isfinite(_mean(arm))]
    if not finite:
        return [] if found else [f"No loss was recorded at the {steps} of {where}."]
    if all(_pairs(arm) == 1 for arm in finite):
        is_all = len(finite) == len(others_of(scenario))
        return [
            _one_seed(finite, steps, where, is_all=is_all),
            *_without_fp8(scenario, made),
        ]
    hurt = [arm for arm in _worst_first(finite) if arm.precision == "FP8" and _is_hurt(arm, made)]
    said = [_hurt(scenario, arm, steps, where, is_first=i == 0) for i, arm in enumerate(hurt)]
    baseline = _baseline_is_hurt(finite, made)
    below = [arm for arm in finite if arm.precision == "high precision" and _is_below(arm)]
    open_ = [arm for arm in finite if arm.precision == "FP8" and _ends(arm)[1] >= _BAR]
    return [
        *said,
        *_baseline(below, baseline, steps, where, made),
        *_unhurt(finite, True if below else baseline, steps, where, any_hurt=bool(hurt)),
        *_maybe_hurt(
            [arm for arm in open_ if _is_above(arm) and arm not in hurt], steps, where, made
        ),
        *_unclear([arm for arm in open_ if not _is_above(arm)], steps, where),
        *_without_fp8(scenario, made),
    ]


def _one_seed(arms: Sequence[ArmView], steps: str, where: str, *, is_all: bool) -> str:
    worst = _worst_first(arms)
    high = [arm for arm in worst if _mean(arm) >= _BAR]
    rest = [arm for arm in worst if arm not in high]
    seen = [f"{arm.name} had {_ratio(arm)} the loss of {BASELINE}" for arm in high]
    if rest:
        low, top = (_exp(end(map(_mean, rest))) for end in (min, max))
        who = listed([arm.name for arm in rest])
        if is_all and len(rest) > 1:
            who = "every other arm" if high else "every arm"
        seen.append(
            f"{who} {_range(low, top)}"
            if high
            else f"{who} had {_range(low, top)} the loss of {BASELINE}"
        )
    return (
        f"At the {steps} ({where}) {', '.join(seen)}; seen with one seed, from which no claim "
        "can be made."
    )


def _hurt(scenario: ScenarioView, arm: ArmView, steps: str, where: str, *, is_first: bool) -> str:
    low, high = (_exp(end) for end in _ends(arm))
    if not arm.clamped_casts:
        how = f"although it clamped nothing{arm.extent}"
    elif _is_delayed(scenario, arm):
        how = "where an amax outruns its history"
    else:
        how = "where elements do not fit its scale"
    where = f"at the {steps} ({where})" if is_first else "at the same steps"
    too = "" if is_first else " too"
    return (
        f"{arm.name} is hurt{too} {how}: {_ratio(arm)} the loss of {BASELINE} {where}; 95 %: "
        f"{_range(low, high)} over {counted(_pairs(arm), 'seed')}."
    )


def _is_hurt(arm: ArmView, made: int) -> bool:
    return _is_above(arm) and _holds(arm, made)


def _is_above(arm: ArmView) -> bool:
    """Return whether the whole of its own interval is above the bar."""
    return _ends(arm)[0] >= _BAR


def _holds(arm: ArmView, made: int) -> bool:
    found = arm.planted_log_ratio
    return found is not None and found.differs_among(made)


def _is_delayed(scenario: ScenarioView, arm: ArmView) -> bool:
    """Return whether the site that lost most had its scale from a history."""
    worst = scenario.worst.get(arm.name, [])
    return bool(worst) and worst[0].scaling == "delayed"


def _baseline_is_hurt(arms: Sequence[ArmView], made: int) -> bool | None:
    """Return whether the baseline is worse than training without FP8; None where nobody knows."""
    plain = [arm for arm in arms if arm.precision == "high precision"]
    if any(_is_below(arm) and _holds(arm, made) for arm in plain):
        return True
    return False if any(_ends(arm)[0] > -_BAR for arm in plain) else None


def _is_below(arm: ArmView) -> bool:
    return _ends(arm)[1] <= -_BAR


def _baseline(
    below: Sequence[ArmView], is_hurt: bool | None, steps: str, where: str, made: int
) -> list[str]:
    if not is_hurt:
        return [
            f"{arm.name} ({_with_interval(arm)}), which has no FP8, stands below {BASELINE} at the "
            f"{steps} ({where}), which among {made} comparisons may be chance: whether {BASELINE} "
            "itself is hurt there cannot be told."
            for arm in below
        ]
    return [
        f"{BASELINE} itself is hurt at the {steps} ({where}): without FP8 the loss is clearly "
        "lower there, so an arm that is like it is hurt as well."
    ]


def _unhurt(
    arms: Sequence[ArmView],
    is_baseline_hurt: bool | None,
    steps: str,
    where: str,
    *,
    any_hurt: bool,
) -> list[str]:
    fine = [arm for arm in arms if _ends(arm)[1] < _BAR and arm.precision == "FP8"]
    names = [arm.name for arm in fine]
    if is_baseline_hurt is False:
        names = [BASELINE, *names]
    if not names:
        return []
    are = "is" if len(names) == 1 else "are"
    most = _exp(max((_ends(arm)[1] for arm in fine), default=0.0))
    bound = f" (at most {times(most)} the loss of {BASELINE}, 95 %)" if fine else ""
    if is_baseline_hurt:
        said = f"{listed(names)} {are} no worse than {BASELINE}{bound}"
    elif any_hurt:
        said = f"{listed(names)} {are} not{bound}"
    else:
        said = f"At the {steps} ({where}) {listed(names)} {are} not hurt{bound}"
    repeats = [
        f"{arm.name} repeats {percent(arm.recasts / arm.casts)} of its casts"
        for arm in fine
        if arm.recasts and not arm.clamped_casts
    ]
    return [f"{'; '.join([said, *repeats])}."]


def _maybe_hurt(arms: Sequence[ArmView], steps: str, where: str, made: int) -> list[str]:
    if not arms:
        return []
    stands = "stands" if len(arms) == 1 else "stand"
    return [
        f"{listed([f'{arm.name} ({_with_interval(arm)})' for arm in arms])} {stands} above "
        f"{BASELINE} at the {steps} ({where}), which among {made} comparisons may be chance."
    ]


def _unclear(arms: Sequence[ArmView], steps: str, where: str) -> list[str]:
    """Say of whom nobody knows; arms with fewer seeds apart from those with more."""
    said = []
    for seeds in sorted({_pairs(arm) for arm in arms}, reverse=True):
        unclear = [f"{arm.name} ({_with_interval(arm)})" for arm in arms if _pairs(arm) == seeds]
        are = "is" if len(unclear) == 1 else "are"
        said.append(
            f"Whether {listed(unclear)} {are} hurt at the {steps} ({where}) cannot be told with "
            f"{counted(seeds, 'seed')}."
        )
    return said


def _without_fp8(scenario: ScenarioView, made: int) -> list[str]:
    """Say what the training without FP8 shows too, which therefore is no doing of FP8."""
    plain = [arm for arm in scenario.arms if arm.precision == "high precision"]
    said = [
        f"{arm.name}, which has no FP8, has {counted(arm.planted_spikes, 'spike')} at "
        f"{scenario.mark} steps too: a spike there is not by itself the doing of FP8."
        for arm in plain
        if arm.planted_spikes
    ]
    return said + [
        f"{arm.name}, which has no FP8, has {_ratio(arm)} the loss of {BASELINE} at "
        f"{scenario.mark} steps."
        for arm in plain
        if _is_hurt(arm, made)
    ]


def _by_kind(scenario: ScenarioView, where: str, made: int) -> list[str]:
    """Say among which kinds of batches an arm's loss differs from the baseline's."""
    said = []
    for arm in scenario.arms:
        for kind in arm.kinds:
            gap = kind.log_ratio
            if gap is None or gap.interval is None or gap.verdict != "differs":
                continue
            low, high = map(_exp, gap.interval)
            chance = f", which among {made} comparisons may be chance"
            said.append(
                f"Among {kind_in_words(kind.group)} ({where}) {arm.name} has "
                f"{times(_exp(gap.mean))} the loss of {BASELINE}; 95 %: {_range(low, high)} over "
                f"{counted(gap.pairs, 'seed')}{'' if gap.differs_among(made) else chance}."
            )
    return said


# What to mind -------------------------------------------------------------------------------------
def _counted_together(scenarios: Sequence[ScenarioView], made: int) -> list[str]:
    """Say how many intervals were looked at, where any of them is called a difference."""
    gaps = [gap for scenario in scenarios for arm in scenario.arms for gap in comparisons_of(arm)]
    if not any(gap.differs_among(made) for gap in gaps):
        return []
    return comparisons_in_words(made, BASELINE)


def _mind(scenarios: Sequence[ScenarioView]) -> list[str]:
    said = list(
        dict.fromkeys(
            f"Mind {arm.name}: {note}"
            for scenario in scenarios
            for arm in scenario.arms
            for note in arm.notes
        )
    )
    more = len(said) - MOST_NOTES
    rest = [f"And {counted(more, 'more note')}, below the tables."] if more > 0 else []
    return said[:MOST_NOTES] + rest


# Figures of an arm --------------------------------------------------------------------------------
def _mean(arm: ArmView) -> float:
    return math.nan if arm.planted_log_ratio is None else arm.planted_log_ratio.mean


def _pairs(arm: ArmView) -> int:
    return 0 if arm.planted_log_ratio is None else arm.planted_log_ratio.pairs


def _ends(arm: ArmView) -> tuple[float, float]:
    """Return the ends of an arm's interval, as logarithms.

    Without an interval: equal values are told; of one seed, or of seeds without spread, anything
    may be true.
    """
    found = arm.planted_log_ratio
    if found is not None and found.interval is not None:
        return found.interval
    if found is not None and found.verdict == "equal":
        return 0.0, 0.0
    return -math.inf, math.inf


def _worst_first(arms: Iterable[ArmView]) -> list[ArmView]:
    return sorted(arms, key=lambda arm: -_mean(arm))


def _ratio(arm: ArmView) -> str:
    return times(_exp(_mean(arm)))


def _with_interval(arm: ArmView) -> str:
    low, high = _ends(arm)
    if math.isinf(low):
        return f"{_ratio(arm)}, no interval"
    return f"{_ratio(arm)}, 95 %: {_range(_exp(low), _exp(high))}"


def _exp(logarithm: float) -> float:
    """Return the ratio; Inf beyond the range of floats."""
    return math.exp(logarithm) if logarithm < 700 else math.inf


def _range(low: float, high: float) -> str:
    return times(low) if times(low) == times(high) else f"{times(low)} to {times(high)}"
