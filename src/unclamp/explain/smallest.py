"""The smallest set of players that removes enough of a spike."""

import itertools
from collections.abc import Callable, Sequence

from unclamp.explain.players import Player

MAX_SIZE = 3
"""Smaller sets than the one found are looked for up to so many players."""

Gain = Callable[[Sequence[Player]], float]


def smallest_set(
    ranked: Sequence[Player],
    target: float,
    *,
    gain: Gain,
    known: Callable[..., float | None],
    slack: float = 0.0,
) -> list[Player]:
    """Return a set of players that gains at least `target`, as small as can be told.

    Players are added in order until the set gains enough, and those that it does not need are
    taken out again. Among sets whose gain is known already, a smaller one, or one as small that
    gains more, is preferred; after exact Shapley values all sets are known.

    Args:
        ranked: Players, the most important first.
        target: What to gain; if all together gain less, all that are needed for what they do.
        gain: A set's gain.
        known: The same if it costs nothing, else None.
        slack: By how much a set may fall short, as chaos moves as much.
    """
    reachable = min(target, gain(ranked)) - slack
    chosen: list[Player] = []
    for player in ranked:
        chosen.append(player)
        if gain(chosen) >= reachable:
            break
    for player in chosen[::-1]:
        without = [other for other in chosen if other is not player]
        if without and gain(without) >= reachable:
            chosen = without
    best = (len(chosen), -gain(chosen), chosen)
    for size in range(1, min(len(chosen), MAX_SIZE) + 1):
        for members in itertools.combinations(ranked, size):
            gained = known(members)
            if gained is not None and gained >= reachable and (size, -gained) < best[:2]:
                best = (size, -gained, list(members))
    return best[2]
