"""How much of a spike is chaos: what *placebos*, changes that mean nothing, move.

In a placebo every weight changes by a 4096th. A change of scaling that does no harm moves the loss
in the same way: it is one more draw. So of a change without effect and n placebos each is as
likely to move most, and the change passes all placebos once in n + 1 times, whatever the noise is
like: with 19, once in 20. With fewer, their largest is multiplied by what gives the same rate, of
5 %, if the noise is normal. Two suffice where they hardly move at all, as in most trainings.

That is the rate of one question. Where many are asked at once, as of a dozen sites both ways, the
largest of *all* answers without effect is what must stay below the limit in 95 % of cases: the
maximum statistic, with the factor of `family_factor` on the largest placebo.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import ndtr

from unclamp.explain.game import BudgetSpent, Game

LEAST_SHARE = 0.02
"""Smaller shares of a spike are not told from none."""
FEWEST_PLACEBOS = 2
STAGES = (FEWEST_PLACEBOS, 5, 19)
"""So many placebos are made, where those before move too much for the next question."""
NORMAL_FACTORS = (
    12.706, 3.427, 2.263, 1.834, 1.610, 1.469, 1.373, 1.301, 1.245, 1.201,
    1.164, 1.133, 1.106, 1.083, 1.062, 1.044, 1.028, 1.013,
)  # fmt: skip
"""Of 1 to 18 placebos: how many times the largest of them another draw of normal noise exceeds in
5 % of cases; from 19 on it is once or less for any noise."""
QUIET = LEAST_SHARE / 2
"""A limit as low as this leaves nothing to chaos."""
RATE = 0.05
"""How often chaos may pass for a cause, of all questions that are asked at once."""
MOST_FACTOR = 1000.0
PART = 5
"""At most one of so many replays of the budget is a placebo, beyond the first two."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What placebos moved.

    Attributes:
        moved: Share of the spike that each moved, of either sign; at least one.
    """

    moved: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The most that one of them moved."""
        return max(map(abs, self.moved))

    @property
    def limit(self) -> float:
        """What a change without effect moves in 95 % of cases at most."""
        count = len(self.moved)
        factor = NORMAL_FACTORS[count - 1] if count <= len(NORMAL_FACTORS) else 1.0
        return factor * self.largest

    @property
    def typical(self) -> float:
        """What the middle one of them moved."""
        return float(np.median(np.abs(self.moved)))

    @property
    def least(self) -> float:
        """The smallest share that counts."""
        return max(LEAST_SHARE, self.limit)

    def least_of(self, sites: int) -> float:
        """Return the smallest share that counts where so many sites are asked, each both ways.

        Of sites without effect none reaches it in 95 % of cases at least.
        """
        return max(self.least, family_factor(len(self.moved), sites) * self.largest)

    @property
    def slack(self) -> float:
        """By how much a set may fall short because of chaos; 0 where it is quiet."""
        return 0.0 if self.limit <= QUIET else self.largest


@functools.cache
def family_factor(placebos: int, sites: int) -> float:
    """Return how many times the largest placebo the largest null of many sites is in 5 % of cases.

    Each site is asked twice, and each answer is the difference of two losses that chaos moves, one
    of which is shared: un-clamped alone it is compared with the run, as placebos are, and clamped
    alone with the replay in which nothing clamps. All losses are draws of one normal noise.
    """
    shared = np.linspace(-6.0, 6.0, 121)
    weights = np.exp(-(shared**2) / 2)
    weights /= weights.sum()
    sizes = np.linspace(0.0, 9.0, 451)

    def below(size: np.ndarray) -> np.ndarray:
        """Return how often a difference stays below a size, by the shared loss, `[121, sizes]`."""
        return ndtr(size - shared[:, None]) - ndtr(-size - shared[:, None])

    largest = np.diff(below(sizes) ** placebos, axis=1)
    middles = (sizes[1:] + sizes[:-1]) / 2

    def passing(factor: float) -> float:
        alone = below(factor * middles) ** sites
        beside = weights @ alone
        return float(1 - weights @ (largest * alone) @ beside)

    found = root_scalar(
        lambda factor: passing(factor) - RATE,
        bracket=(0.1, MOST_FACTOR),
        method="brentq",
        xtol=1e-3,
    )
    return float(found.root)


def placebo_noise(game: Game, *, sites: int = 0) -> Noise:
    """Make placebos, more of them the more they move, within a part of the budget.

    Args:
        game: Answers questions.
        sites: How many sites are to be judged by them; 0 for one question about all together.

    Raises:
        BudgetSpent: It does not suffice for the first two.
    """
    moved = [game.share_gone(game.placebo(seed)) for seed in range(FEWEST_PLACEBOS)]
    most = max(FEWEST_PLACEBOS, game.budget // PART)
    for stage in STAGES[1:]:
        noise = Noise(moved=tuple(moved))
        if noise.limit <= QUIET and (not sites or noise.least_of(sites) <= LEAST_SHARE):
            break
        try:
            for seed in range(len(moved), min(stage, most)):
                moved.append(game.share_gone(game.placebo(seed)))
        except BudgetSpent:
            break
    return Noise(moved=tuple(moved))


def noise_of(game: Game, noise: Noise) -> Noise:
    """Return what the same placebos move of another game on the same replays, at no cost."""
    return Noise(moved=_again(game, range(len(noise.moved))))


def _again(game: Game, seeds: Sequence[int]) -> tuple[float, ...]:
    return tuple(game.share_gone(game.placebo(seed)) for seed in seeds)
