"""Which kinds of batches have too few for a spike to be told from noise. Torch-free."""

from collections.abc import Sequence

import numpy as np

from unclamp.analysis.groups import Group, has_kinds, kind_in_words, split_places
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


def unjudged_in_words(
    values: Sequence[float | None],
    groups: Sequence[Group],
    *,
    method: str = DEFAULT,
    threshold: float | None = None,
) -> list[str]:
    """Say of each kind with too few batches for a definition that it was not judged.

    Without groups there is nothing to say.

    Example:
        >>> unjudged_in_words([2.0] * 100 + [3.5] * 4, ["text"] * 100 + ["answers"] * 4)
        ["not judged: only 4 batches of kind 'answers'"]
    """
    if not has_kinds(groups):
        return []
    said = []
    for group, places in split_places(groups).items():
        own = [value for i in places if (value := values[i]) is not None]
        if own and not is_judged(own, method=method, threshold=threshold):
            of_kind = kind_in_words(group).removeprefix("batches ")
            said.append(f"not judged: only {counted(len(own), 'batch', 'batches')} {of_kind}")
    return said
