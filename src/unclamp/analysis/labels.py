"""What to call the replays of an explanation that are worth a look, and columns of its sites."""

from unclamp.analysis.counterfactual import Counterfactual, Question
from unclamp.analysis.explanation import Explanation, Verdict

LEADING_SITES = 4
"""Leading sites whose own counterfactual, only this one un-clamped, has a name."""


def named_counterfactuals(found: Explanation) -> list[tuple[str, Counterfactual]]:
    """Return the counterfactuals that are worth a look, with what was changed in words.

    Of up to a hundred: the plain replay, nothing clamped, the recommended sets, other questions,
    and only one of the leading sites un-clamped, in this order.
    """
    asked = [each.question for each in found.counterfactuals]
    freed = [c.question for c in found.counterfactuals if c.question.kind == "unclamped"]
    free = max(freed, key=lambda question: len(question.sites), default=None)
    override = found.override
    mended = None if override is None else Question(kind=override.scaling, sites=override.sites)
    leading = {frozenset(row.members): i for i, row in reversed([*enumerate(found.sites)])}
    told: list[tuple[int, str, Counterfactual]] = []
    for each in found.counterfactuals:
        question = each.question
        place = leading.get(frozenset(question.sites), LEADING_SITES)
        if question == free:
            told.append((1, "nothing clamped", each))
        elif question.kind == "unclamped" and place < LEADING_SITES:
            who = _one_or(question, found.sites[place].name)
            told.append((5 + place, f"un-clamped only: {who}", each))
        elif question.kind in ("dynamic", "guarded", "short history") or question == mended:
            who = _one_or(question, f"{len(question.sites)} sites")
            told.append((2, f"{question.kind}: {who}", each))
        elif question.kind in _WHOLE and not any(_is_beyond(question, other) for other in asked):
            whole = _WHOLE[question.kind]
            told.append((*whole, each))
    return [(label, each) for _, label, each in sorted(told, key=lambda one: one[0])]


def ways(verdict: Verdict | None) -> tuple[str, str]:
    """Return what a site is where it is mended and where it is not, after "only it"."""
    is_mended_by_blocks = verdict in ("underflow", "clamping and underflow")
    return ("in blocks", "as it was") if is_mended_by_blocks else ("free", "clamped")


_WHOLE = {
    "actual": (0, "nothing changed"),
    "blocks": (3, "a scale for every 32 elements"),
    "high_precision": (4, "no FP8 at all"),
    "own_scales": (4, "scales of each rank its own"),
}
"""Questions that change no sites, or all: place and name."""


def _is_beyond(question: Question, other: Question) -> bool:
    """Whether the other one changes more sites in the same way."""
    return other.kind == question.kind and len(other.sites) > len(question.sites)


def _one_or(question: Question, several: str) -> str:
    return str(question.sites[0]) if len(question.sites) == 1 else several
