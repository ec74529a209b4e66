"""What a study's final losses answer, a part of its verdict. Computed; torch-free."""

import math
from collections.abc import Iterable

from unclamp.analysis.paired import PairedDifference
from unclamp.report.arms import BASELINE, ScenarioView, others_of
from unclamp.written import counted, listed, signed


def final_losses(scenario: ScenarioView, where: str, made: int) -> list[str]:
    """Say whose final loss differs from the baseline's, who cannot be told, and who is waiting.

    Args:
        scenario: Whose arms are compared.
        where: Its name as a phrase.
        made: Comparisons of the whole study, count.
    """
    gaps = {arm.name: arm.final_gap for arm in scenario.arms if arm.final_gap is not None}
    gaps = {name: gap for name, gap in gaps.items() if gap.verdict != "not finite"}
    but = f", {scenario.mark} steps left out" if scenario.planted else ""
    what = f"In the final loss{but} ({where})"
    if not gaps:
        return [f"{what} nothing can be compared yet."] if _is_waiting(scenario) else []
    is_all = len(gaps) == len(others_of(scenario))
    if all(gap.verdict == "equal" for gap in gaps.values()):
        return [f"{what} {_all_equal(list(gaps), is_all=is_all)}."]
    if all(gap.pairs == 1 for gap in gaps.values()):
        low, high = (signed(end(gap.mean for gap in gaps.values())) for end in (min, max))
        span = low if low == high else f"{low} to {high}"
        who = "" if is_all else f" of {listed(list(gaps))}"
        return [
            f"{what} the difference{who} from {BASELINE} is {span}: seen with one seed, so whether "
            "that is chance cannot be told."
        ]
    apart = {name: gap for name, gap in gaps.items() if gap.verdict == "differs"}
    single = {name: gap for name, gap in gaps.items() if gap.pairs == 1}
    rest = {name: gap for name, gap in gaps.items() if name not in (*apart, *single)}
    told = [_told(name, gap) for name, gap in apart.items() if gap.differs_among(made)]
    maybe = [
        f"{name} ({signed(gap.mean)})" for name, gap in apart.items() if not gap.differs_among(made)
    ]
    who = _who(list(rest), is_all=is_all and not single, any_apart=bool(apart))
    parts = [
        *told,
        *_maybe_apart(maybe, made),
        *_not_told(rest, who, _clamping(scenario, rest)),
        *_one_pair(single),
    ]
    return [f"{what} {'; '.join(parts)}."]


def _all_equal(names: list[str], *, is_all: bool) -> str:
    if is_all:
        return f"every arm equals {BASELINE} in each digit"
    return f"{listed(names)} {'equals' if len(names) == 1 else 'equal'} {BASELINE} in each digit"


def _maybe_apart(named: list[str], made: int) -> list[str]:
    if not named:
        return []
    stands = "stands" if len(named) == 1 else "stand"
    return [
        f"{listed(named)} {stands} apart from {BASELINE}, which among {made} comparisons may be "
        "chance"
    ]


def _one_pair(single: dict[str, PairedDifference]) -> list[str]:
    if not single:
        return []
    named = listed([f"{name} ({signed(gap.mean)})" for name, gap in single.items()])
    return [f"of {named} one seed was seen, so whether that is chance cannot be told"]


def _told(name: str, gap: PairedDifference) -> str:
    low, high = map(signed, gap.interval or (math.nan, math.nan))
    side = "above" if gap.mean > 0 else "below"
    size = signed(abs(gap.mean)).removeprefix("+")
    return f"{name} is {side} {BASELINE} by {size} (95 %: {low} to {high})"


def _is_waiting(scenario: ScenarioView) -> bool:
    return any(arm.unfinished for arm in scenario.arms)


def _who(names: list[str], *, is_all: bool, any_apart: bool) -> str:
    """Return who cannot be told; "no arm" only where that is true of every other arm."""
    if len(names) == 1 or not is_all:
        return f"{listed(names)} cannot"
    return "no other arm can" if any_apart else "no arm can"


def _not_told(rest: dict[str, PairedDifference], who: str, clamped: str) -> list[str]:
    """Say which arms look like the baseline, and how small a difference would have been seen."""
    if not rest:
        return []
    known = [gap.resolution for gap in rest.values() if gap.interval is not None]
    size = ""
    if known:
        size = f" (a difference over {signed(max(known)).removeprefix('+')} would show)"
    return [f"{who} be told from {BASELINE} with {_seeds(rest.values())}{size}{clamped}"]


def _seeds(gaps: Iterable[PairedDifference]) -> str:
    """Return over how many seeds differences are; of unequal ones the range."""
    pairs = [gap.pairs for gap in gaps]
    few, many = min(pairs), max(pairs)
    return counted(few, "seed") if few == many else f"{few} to {many} seeds"


def _clamping(scenario: ScenarioView, gaps: dict[str, PairedDifference]) -> str:
    """Name the arms that clamped without a difference that shows."""
    names = [
        arm.name
        for arm in scenario.arms
        if arm.clamped_casts and arm.name in gaps and gaps[arm.name].verdict != "differs"
    ]
    return f", although {listed(names)} clamped elements" if names else ""
