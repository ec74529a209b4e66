"""What counts as more than chaos, and how often that is wrong."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from unclamp.explain.attribution import Attribution
from unclamp.explain.backwards import judged
from unclamp.explain.limits import Limits
from unclamp.explain.noise import LEAST_SHARE, NORMAL_FACTORS, QUIET, Noise, family_factor
from unclamp.explain.players import Player
from unclamp.explain.shapley import exact_shares, sampled_pair, shares_of_pairs
from unclamp.names import SiteName


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 18])
def test_normal_noise_passes_the_limit_in_5_of_100_cases(count: int) -> None:
    """By integration: another draw beyond a factor times the largest of so many."""
    factor = NORMAL_FACTORS[count - 1]

    def passing(size: float) -> float:
        return float(2 * stats.norm.pdf(size) * (2 * stats.norm.cdf(size / factor) - 1) ** count)

    rate, _ = integrate.quad(passing, 0, 12)
    assert rate == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize("draw", ["normal", "cauchy", "one in ten"])
def test_any_noise_passes_19_placebos_in_5_of_100_cases_at_most(draw: str) -> None:
    generator = np.random.default_rng(0)
    size = (4000, 20)
    draws = {
        "normal": generator.normal(size=size),
        "cauchy": generator.standard_cauchy(size),
        "one in ten": generator.normal(size=size) * (generator.random(size) < 0.1),
    }[draw]
    passed = sum(abs(row[0]) > Noise(moved=tuple(row[1:])).limit for row in draws)
    assert passed / len(draws) <= 0.05 + 3 * (0.05 * 0.95 / len(draws)) ** 0.5


def test_nothing_falls_short_where_it_is_quiet() -> None:
    quiet = Noise(moved=(0.0005, -0.001))
    assert quiet.limit < QUIET
    assert (quiet.least, quiet.slack) == (LEAST_SHARE, 0.0)
    loud = Noise(moved=(0.05, -0.1) + (0.0,) * 17)
    assert (loud.limit, loud.least, loud.slack) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("gone", "moved", "verdict"),
    [
        (0.95, 0.0, "clamping"),
        (0.69, 0.0, "mostly clamping"),
        (0.3, 0.0, "partly clamping"),
        (0.05, 0.0, "not clamping"),
        (-0.5, 0.0, "not clamping"),
        (0.3, 0.15, "partly clamping"),
        (0.15, 0.2, "not clamping"),
        # What chaos moves could hide most of the spike.
        (0.3, 0.35, "cannot tell"),
        (0.95, 1.2, "cannot tell"),
        (1.0, 0.4, "clamping"),
        # A spike that any change removes is chance, however much goes.
        (1.1, 1.0, "cannot tell"),
    ],
)
def test_what_follows_from_a_share(gone: float, moved: float, verdict: str) -> None:
    assert judged(gone, Noise(moved=(moved,) * 19)) == verdict


def test_few_pairs_of_orders_have_a_range_and_many_a_students_interval() -> None:
    pairs = [np.array([gain]) for gain in np.random.default_rng(0).normal(size=24)]
    few = shares_of_pairs(pairs[:4])
    assert (few.low[0], few.high[0]) == (min(pairs[:4])[0], max(pairs[:4])[0])
    many = shares_of_pairs(pairs)
    values = np.concatenate(pairs)
    low, high = stats.t.interval(0.95, 23, values.mean(), stats.sem(values))
    assert (many.low[0], many.high[0]) == pytest.approx((low, high))


def test_the_interval_of_twenty_pairs_holds_the_value_as_often_as_it_says() -> None:
    """In games of any effects among five players."""
    held = tried = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        everyone = [frozenset(m) for n in range(6) for m in itertools.combinations(range(5), n)]
        table = {members: float(generator.normal()) for members in everyone}
        value = table.__getitem__
        exact = exact_shares(5, value).values
        pairs = [sampled_pair(5, value, seed=seed, pair=i, tolerance=0.0) for i in range(20)]
        shares = shares_of_pairs(pairs)
        held += sum(a <= v <= b for a, v, b in zip(shares.low, exact, shares.high, strict=True))
        tried += 5
    assert 0.92 <= held / tried <= 0.98


@pytest.mark.parametrize(("placebos", "sites"), [(2, 12), (5, 12), (19, 1), (19, 40)])
def test_of_many_sites_without_effect_none_passes_in_95_of_100_cases(
    placebos: int, sites: int
) -> None:
    """By drawing: each loss is a normal number, and each share a difference of two of them."""
    generator = np.random.default_rng(sites)
    passed, tried = 0, 20_000
    for _ in range(10):
        run, free = generator.normal(size=(2, tried // 10, 1))
        largest = np.abs(generator.normal(size=(tried // 10, placebos)) - run).max(axis=1)
        alone = np.abs(generator.normal(size=(tried // 10, sites)) - run).max(axis=1)
        beside = np.abs(generator.normal(size=(tried // 10, sites)) - free).max(axis=1)
        most = np.maximum(alone, beside)
        passed += int((most > family_factor(placebos, sites) * largest).sum())
    assert passed / tried == pytest.approx(0.05, abs=0.005)


class NoisyGame:
    """One site causes all of a spike, the others nothing; every loss is moved by chaos."""

    def __init__(self, cause: Player, *, chaos: float, seed: int) -> None:
        self.budget, self.spent = 1000, 0
        self._cause, self._chaos = cause, chaos
        self._generator = np.random.default_rng(seed)
        self._losses: dict[object, float] = {}
        self._run = self._drawn("run")

    def _drawn(self, question: object) -> float:
        if question not in self._losses:
            self._losses[question] = self._chaos * float(self._generator.normal())
        return self._losses[question]

    def removed(self, kind: str, sites: frozenset[Any]) -> float:
        gone = 1.0 if self._cause.sites <= sites else 0.0
        return gone + self._run - self._drawn((kind, sites))

    def placebo(self, seed: int) -> float:
        return self._run - self._drawn(("placebo", seed))

    def share_gone(self, trace: float) -> float:
        return trace


def test_of_forty_sites_beside_a_cause_none_counts_by_chance() -> None:
    """Uncorrected, some do in 8 of 10 trainings with as many; the cause always counts."""
    players = [
        Player(fqn=f"layers.{i}", role="input", sites=frozenset({SiteName(f"layers.{i}", "input")}))
        for i in range(41)
    ]
    findings: Any = SimpleNamespace(publish=lambda **_: None, row=lambda *_, **__: None)
    wrong = tried = 0
    for seed in range(200):
        game: Any = NoisyGame(players[7], chaos=0.06, seed=seed)
        whole = game.removed("blocks", frozenset().union(*(p.sites for p in players)))
        asked = Attribution(game, findings, Limits(), kind="blocks", whole=whole)
        active, _, _ = asked._both_ways(players, [])  # pyright: ignore[reportPrivateUsage]
        assert players[7] in active
        wrong += active != [players[7]]
        tried += 1
    assert wrong / tried <= 0.05 + 3 * (0.05 * 0.95 / tried) ** 0.5
