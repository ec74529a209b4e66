"""Shapley values against their definition and their axioms, without any replay."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.explain.players import Player, group_sites
from unclamp.explain.shapley import exact_shares, sampled_pair, shares_of_pairs
from unclamp.explain.smallest import smallest_set
from unclamp.names import SiteName

Table = dict[frozenset[int], float]


def game(players: int, seed: int) -> Table:
    generator = np.random.default_rng(seed)
    members = [frozenset(c) for n in range(players + 1)
               for c in itertools.combinations(range(players), n)]  # fmt: skip
    return {m: 0.0 if not m else float(generator.normal()) for m in members}


def by_orders(players: int, table: Table) -> list[float]:
    """The definition: gains averaged over all orders."""
    gains = [0.0] * players
    for order in itertools.permutations(range(players)):
        before: frozenset[int] = frozenset()
        for player in order:
            gains[player] += table[before | {player}] - table[before]
            before |= {player}
    return [gain / math.factorial(players) for gain in gains]


@given(st.integers(1, 5), st.integers(0, 1000))
def test_exact_values_are_the_mean_over_all_orders(players: int, seed: int) -> None:
    table = game(players, seed)
    shares = exact_shares(players, table.__getitem__)
    assert shares.values == pytest.approx(by_orders(players, table))
    assert sum(shares.values) == pytest.approx(table[frozenset(range(players))])


@given(st.integers(2, 6), st.integers(0, 1000))
def test_a_pair_of_orders_shares_out_the_whole(players: int, seed: int) -> None:
    table = game(players, seed)
    gains = sampled_pair(players, table.__getitem__, seed=1, pair=seed, tolerance=0.0)
    assert gains.sum() == pytest.approx(table[frozenset(range(players))])


def test_samples_come_near_the_exact_values_and_their_intervals_hold_them() -> None:
    held = 0
    for seed in range(20):
        table = game(5, seed)
        pairs = [
            sampled_pair(5, table.__getitem__, seed=seed, pair=i, tolerance=0.0) for i in range(40)
        ]
        shares, exact = shares_of_pairs(pairs), by_orders(5, table)
        held += sum(
            low <= value <= high
            for low, value, high in zip(shares.low, exact, shares.high, strict=True)
        )
        assert shares.values == pytest.approx(exact, abs=0.6)
    assert held >= 0.85 * 100


def test_antithetic_pairs_are_exact_where_players_act_two_by_two() -> None:
    """A game of pairwise effects: an order and its reverse give every value exactly."""
    effects = np.random.default_rng(0).normal(size=(6, 6))

    def value(members: frozenset[int]) -> float:
        return float(sum(effects[i, j] for i in members for j in members))

    one = sampled_pair(6, value, seed=0, pair=0, tolerance=0.0)
    assert one.tolist() == pytest.approx(list(exact_shares(6, value).values))


def test_orders_do_not_depend_on_how_many_there_are() -> None:
    asked: list[list[frozenset[int]]] = []
    for count in (2, 4):
        seen: list[frozenset[int]] = []

        def value(members: frozenset[int], seen: list[frozenset[int]] = seen) -> float:
            seen.append(members)
            return float(len(members))

        for pair in range(count):
            sampled_pair(4, value, seed=3, pair=pair, tolerance=0.0)
        asked.append(seen)
    assert asked[1][: len(asked[0])] == asked[0]


def test_an_order_ends_where_nothing_is_left_to_gain() -> None:
    seen: set[frozenset[int]] = set()

    def value(members: frozenset[int]) -> float:
        seen.add(members)
        return 1.0 if 0 in members else 0.0

    gains = sampled_pair(12, value, seed=0, pair=0, tolerance=0.01)
    assert gains.tolist() == [1.0] + [0.0] * 11
    assert len(seen) < 2 * 12


def test_one_pair_has_no_interval() -> None:
    shares = shares_of_pairs([np.array([0.5, 0.5])])
    assert shares.low[0] == -math.inf
    with pytest.raises(ValueError, match="at least one pair"):
        shares_of_pairs([])


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("site", ["model.layers.0.mlp.up input", "model.layers.0.mlp.up weight",
                  "model.layers.1.mlp.up input", "head input"]),
        ("layer", ["model.layers.0.*", "model.layers.1.*", "head"]),
        ("role", ["* input", "* weight"]),
        ("projection", ["*.up", "head"]),
    ],
)  # fmt: skip
def test_sites_are_grouped_by_what_they_share(by: str, names: list[str]) -> None:
    first, second = "model.layers.0.mlp.up", "model.layers.1.mlp.up"
    sites = [SiteName(first, "input"), SiteName(first, "weight"), SiteName(second, "input"),
             SiteName("head", "input")]  # fmt: skip
    players = group_sites(sites, by)  # pyright: ignore[reportArgumentType]
    assert [player.name for player in players] == names
    assert frozenset().union(*(p.sites for p in players)) == set(sites)


def test_the_smallest_set_leaves_out_who_is_not_needed() -> None:
    a, b, c = (Player(fqn=n, role="input", sites=frozenset({SiteName(n, "input")})) for n in "abc")
    gains = {"": 0.0, "a": 0.5, "b": 0.45, "c": 0.92, "ab": 0.95, "ac": 0.95, "bc": 0.95, "abc": 1}

    def gain(players: object) -> float:
        return gains["".join(sorted(p.fqn for p in players))]  # pyright: ignore

    nothing = lambda players: None  # noqa: E731
    assert smallest_set([a, b, c], 0.9, gain=gain, known=nothing) == [a, b]
    assert smallest_set([a, b, c], 0.9, gain=gain, known=gain) == [c]
    assert smallest_set([a, b, c], 2.0, gain=gain, known=nothing) == [a, b, c]
