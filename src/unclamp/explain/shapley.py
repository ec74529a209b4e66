"""Shapley values: each player's fair share of what all of them gain together.

A player's value is what it adds to those before it, averaged over all orders of the players. Few
players: all coalitions are asked, and the values are exact. Many: orders are drawn in pairs, one
and its reverse, whose errors largely cancel (antithetic sampling); an order ends early once what is
left to gain lies within a tolerance. Orders follow from a seed, so a larger budget asks the same
ones first, and goes on.

Knows nothing of sites and replays: a game is a function from coalitions to gains.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from unclamp.analysis.shares import ENOUGH_PAIRS

Value = Callable[[frozenset[int]], float]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shapley values with how far they are known.

    Attributes:
        values: One a player.
        low: Lower ends: of exact values the values themselves, of fewer than `ENOUGH_PAIRS` pairs
            the least of them, and of more the lower end of Student's 95 % interval of the mean.
        high: Upper ends.
        pairs: Pairs of orders drawn; 0 for exact values.
    """

    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    pairs: int = 0


def exact_shares(players: int, value: Value) -> Shares:
    """Return exact Shapley values; asks all `2**players` coalitions."""
    values = [0.0] * players
    for size in range(players):
        weight = 1 / (players * math.comb(players - 1, size))
        for members in itertools.combinations(range(players), size):
            before = frozenset(members)
            for player in set(range(players)) - before:
                values[player] += weight * (value(before | {player}) - value(before))
    return Shares(values=tuple(values), low=tuple(values), high=tuple(values))


def sampled_pair(
    players: int, value: Value, *, seed: int, pair: int, tolerance: float
) -> np.ndarray:
    """Return each player's gain averaged over one order and its reverse, `[players]`.

    Numerics: an order ends where all that is left to gain is within `tolerance`; the gains of
    the players that remain are then 0, wrong by no more than that in sum.
    """
    order = list(np.random.default_rng([seed, pair]).permutation(players))
    gains = np.zeros(players)
    total = value(frozenset(range(players)))
    for one in (order, order[::-1]):
        before: frozenset[int] = frozenset()
        reached = value(before)
        for player in map(int, one):
            if abs(total - reached) <= tolerance and before:
                break
            after = value(before | {player})
            gains[player] += after - reached
            before, reached = before | {player}, after
    return gains / 2


def shares_of_pairs(pairs: list[np.ndarray]) -> Shares:
    """Return means over pairs, with their range or from `ENOUGH_PAIRS` on with 95 % t-intervals.

    One pair alone has neither, but -Inf and Inf. Pairs are independent of each other, as Student's
    interval needs; the two orders of a pair are not. Players whose gains depend on a rare place in
    the order are held less often with few pairs, in 91 % of cases with 8: hence the number.

    Raises:
        ValueError: No pair.
    """
    if not pairs:
        raise ValueError("expected at least one pair of orders, got none")
    table = np.stack(pairs)
    count = len(pairs)
    mean = table.mean(0)
    if count == 1:
        low, high = np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    elif count < ENOUGH_PAIRS:
        low, high = table.min(0), table.max(0)
    else:
        half = stdtrit(count - 1, 0.975) * table.std(0, ddof=1) / math.sqrt(count)
        low, high = mean - half, mean + half
    return Shares(
        values=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        pairs=count,
    )
