"""Which kinds of batches have too few for a spike to be told from noise. Torch-free."""

import math
from collections.abc import Sequence

import numpy as np

from unclamp.analysis.groups import MOST_KINDS, Group, has_kinds, kind_in_words, largest_kinds
from unclamp.analysis.spikes import DEFAULT, DEFINITIONS
from unclamp.written import counted


def is_judged(
    values: Sequence[float | None] | np.ndarray,
    *,
    method: str = DEFAULT,
    threshold: float | None = None,
) -> bool:
    """Return whether a definition judges any value of a series, by what it needs before it.

    NaN and Inf are spikes whatever is judged.
    """
    definition = DEFINITIONS[method]
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    used = definition.threshold if threshold is None else threshold
    judged = definition.judge(numbers[np.isfinite(numbers)], used)
    return bool(np.isfinite(judged.limit).any())


def why_unjudged(values: Sequence[float | None], of_kind: str = "") -> str:
    """Say why the batches of a kind were not judged: too few of them are finite.

    Args:
        values: Of the kind's batches; None where there is none.
        of_kind: What kind they are of, in words, with a space before it.

    Example:
        >>> why_unjudged([2.0, 3.0], " of kind 'x'")
        "only 2 batches of kind 'x'"
    """
    there = [value for value in values if value is not None]
    finite = sum(math.isfinite(value) for value in there)
    batches = f"{counted(len(there), 'batch', 'batches')}{of_kind}"
    if finite == len(there):
        return f"only {batches}"
    if finite == 0:
        return (
            f"the only batch{of_kind} is not finite"
            if len(there) == 1
            else (f"none of {batches} is finite")
        )
    return f"only {finite:,} of {batches} {'is' if finite == 1 else 'are'} finite"


def unjudged_in_words(
    values: Sequence[float | None],
    groups: Sequence[Group],
    *,
    method: str = DEFAULT,
    threshold: float | None = None,
) -> list[str]:
    """Say of each kind with too few finite batches for a definition that it was not judged.

    The largest kinds come first; of more than four the last item says how many there are. Without
    groups there is nothing to say.

    Example:
        >>> unjudged_in_words([2.0] * 100 + [3.5] * 4, ["text"] * 100 + ["answers"] * 4)
        ["not judged: only 4 batches of kind 'answers'"]
    """
    if not has_kinds(groups):
        return []
    said = []
    for group, places in largest_kinds(groups).items():
        own = [value for i in places if (value := values[i]) is not None]
        if own and not is_judged(own, method=method, threshold=threshold):
            of_kind = kind_in_words(group).removeprefix("batches")
            said.append(f"not judged: {why_unjudged(own, of_kind)}")
    more = len(said) - MOST_KINDS
    return [*said[:MOST_KINDS], f"and {counted(more, 'more kind')}"] if more > 0 else said
