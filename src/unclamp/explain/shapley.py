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

Value = Callable[[frozenset[int]], float]

T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at 97.5 %, for 1 to 30 degrees of freedom."""
NORMAL_95 = 1.960


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shapley values with 95 % intervals.

    Attributes:
        values: One a player.
        low: Lower ends; of exact values the values themselves.
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
    """Return means over pairs with 95 % t-intervals; one pair alone has no interval but -Inf, Inf.

    Raises:
        ValueError: No pair.
    """
    if not pairs:
        raise ValueError("expected at least one pair of orders, got none")
    table = np.stack(pairs)
    count = len(pairs)
    mean = table.mean(0)
    if count == 1:
        half = np.full_like(mean, np.inf)
    else:
        t = T_95[count - 2] if count - 1 <= len(T_95) else NORMAL_95
        half = t * table.std(0, ddof=1) / math.sqrt(count)
    return Shares(
        values=tuple(mean.tolist()),
        low=tuple((mean - half).tolist()),
        high=tuple((mean + half).tolist()),
        pairs=count,
    )
