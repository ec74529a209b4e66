"""How strongly the clamping of each site goes with the spikes and the loss, at every shift.

Two questions a site, in one currency (-log of a tail probability, nats), so that both and all
sites can compete: how many spikes had clamping just before them, and how the loss stood just
after clamping. The tail probabilities only weigh; what counts as evidence is decided by how
high the highest weight gets at shifts that broke every link.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from unclamp.analysis.response import LEVEL_STEPS, Response
from unclamp.analysis.shifts import Moves

TOP_SHARES = (1.0, 0.25, 0.0625)
"""A site's clamping counts at three levels: all of it, its largest quarter, its sixteenth."""
SHORT_LAGS = 2
"""Beside the whole window its first two lags: most harm is prompt, and has less company there."""
MIN_HITS = 3
"""Fewer spikes preceded by clamping, or fewer clamped steps, are coincidences to us."""
JOINT = 0.95
"""Chance with which the upper bounds of all cleared sites hold at once."""
CHUNK_ELEMENTS = 8_000_000


@dataclass(frozen=True, kw_only=True)
class Clamping:
    """Where each site clamped, and how much: rows of a sparse matrix.

    Attributes:
        starts: `steps[starts[s]:starts[s + 1]]` are those of site s; one more than sites.
        steps: Index of the step, increasing within a site.
        errors: Clamp error there, above 0.
        first_lags: For each site the first lag at which its clamping can act on the loss.
        length: Steps of the run.
    """

    starts: NDArray[np.int64]
    steps: NDArray[np.int64]
    errors: NDArray[np.float64]
    first_lags: NDArray[np.int64]
    length: int

    @property
    def sites(self) -> int:
        """How many sites there are."""
        return len(self.starts) - 1

    def counts(self) -> NDArray[np.int64]:
        """Return the clamped steps of each site."""
        return np.diff(self.starts)

    def apart(self) -> NDArray[np.float64]:
        """Return what share of the steps around a clamped step is not clamped, a site's mean.

        The loss is measured against its median over these steps: harm at all of them would be
        its level. NaN for a site that never clamped.
        """
        half, shares = LEVEL_STEPS // 2, np.full(self.sites, np.nan)
        for site in np.flatnonzero(self.counts()).tolist():
            own = self.steps[self.starts[site] : self.starts[site + 1]]
            low, high = np.maximum(own - half, 0), np.minimum(own + half, self.length - 1)
            inside = np.searchsorted(own, high, "right") - np.searchsorted(own, low, "left")
            shares[site] = 1 - float(np.mean(inside / (high - low + 1)))
        return shares

    def activity(self) -> NDArray[np.float64]:
        """Return how much was clamped at each step; a site counts by the root of its share."""
        counts = self.counts()
        weights = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts)
        total = np.bincount(self.steps, weights=weights, minlength=self.length)
        return total.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the sites weigh at each shift, the first being what happened; nats.

    Attributes:
        spikes: Sites by shifts.
        loss: Sites by shifts.
        hits: Spikes with clamping before them, a site; within the whole window.
        expected: Mean of that over the shifts.
        excess: Mean news of the loss at the first lags after clamping, less that over the shifts.
        excess_sd: Standard deviation of that mean over the shifts.
        joint: Standard deviations above `excess` below which the truth lies for all sites at
            once, with a chance of 95 %.
    """

    spikes: NDArray[np.float32]
    loss: NDArray[np.float32]
    hits: NDArray[np.int64]
    expected: NDArray[np.float64]
    excess: NDArray[np.float64]
    excess_sd: NDArray[np.float64]
    joint: float

    def highest(self) -> NDArray[np.float32]:
        """Return the highest weight of any site at each shift."""
        return np.maximum(self.spikes.max(axis=0), self.loss.max(axis=0))


def weigh(
    clamping: Clamping,
    onsets: NDArray[np.int64],
    response: Response | None,
    shifts: Moves,
    *,
    max_lag: int,
) -> Weights:
    """Return the weights of all sites; 0 where there is nothing to ask."""
    sites, count = clamping.sites, len(shifts.offsets)
    spikes = np.zeros((sites, count), dtype=np.float32)
    hits, expected = np.zeros(sites, dtype=np.int64), np.zeros(sites)
    if len(onsets) >= MIN_HITS:
        moved = shifts.move(onsets)
        for rows in _chunks(clamping):
            found = _weigh_spikes(clamping, rows, moved, max_lag)
            spikes[rows], hits[rows], expected[rows] = found
    loss = np.zeros((sites, count), dtype=np.float32)
    excess, excess_sd, joint = np.full(sites, np.nan), np.full(sites, np.nan), np.inf
    if response is not None:
        loss, excess, excess_sd, joint = _weigh_loss(clamping, response, shifts, max_lag)
    return Weights(
        spikes=spikes,
        loss=loss,
        hits=hits,
        expected=expected,
        excess=excess,
        excess_sd=excess_sd,
        joint=joint,
    )


def _chunks(clamping: Clamping) -> list[NDArray[np.int64]]:
    """Return the sites in groups of one first lag that fit in memory as dense rows."""
    size = max(1, CHUNK_ELEMENTS // max(clamping.length, 1))
    groups = []
    for lag in np.unique(clamping.first_lags):
        rows = np.flatnonzero((clamping.first_lags == lag) & (clamping.counts() >= MIN_HITS))
        groups += [rows[i : i + size] for i in range(0, len(rows), size)]
    return groups


def _weigh_spikes(
    clamping: Clamping, rows: NDArray[np.int64], moved: NDArray[np.int64], max_lag: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    first = int(clamping.first_lags[rows[0]])
    levels = clamp_levels(clamping, rows)
    weights = np.zeros((len(rows), moved.shape[1]), dtype=np.float32)
    all_hits = np.zeros((len(rows), moved.shape[1]), dtype=np.int64)
    for last in sorted({min(first + SHORT_LAGS - 1, max_lag), max_lag}):
        seen = window_max(levels, first, last)
        at = np.stack([seen[:, moved[k]] for k in range(len(moved))])
        for level in range(1, len(TOP_SHARES) + 1):
            hits = (at >= level).sum(axis=0)
            np.maximum(weights, binomial_weights(hits, len(moved)), out=weights)
            if last == max_lag and level == 1:
                all_hits = hits
    return weights, all_hits[:, 0], all_hits.mean(axis=1)


def clamp_levels(clamping: Clamping, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return sites by steps: 0 where nothing was clamped, else the highest level reached."""
    levels = np.zeros((len(rows), clamping.length), dtype=np.uint8)
    for row, site in enumerate(rows):
        own = slice(clamping.starts[site], clamping.starts[site + 1])
        ranks = np.argsort(np.argsort(-clamping.errors[own], kind="stable"), kind="stable")
        reached = sum((ranks < max(1, share * len(ranks))).astype(np.uint8) for share in TOP_SHARES)
        levels[row, clamping.steps[own]] = reached
    return levels


def window_max(levels: NDArray[np.uint8], first: int, last: int) -> NDArray[np.uint8]:
    """Return at each step the highest level `first` to `last` steps earlier."""
    seen = np.zeros_like(levels)
    for lag in range(first, last + 1):
        np.maximum(seen[:, lag:], levels[:, : levels.shape[1] - lag], out=seen[:, lag:])
    return seen


def binomial_weights(hits: NDArray[np.int64], trials: int) -> NDArray[np.float32]:
    """Return -log P(at least so many hits), sites by shifts; the chance of one is their mean."""
    chance = np.clip(hits.mean(axis=1) / trials, 1e-12, 1 - 1e-12)
    table = tail_weights(chance, trials)
    return np.take_along_axis(table, hits, axis=1).astype(np.float32)


def tail_weights(chance: NDArray[np.float64], trials: int) -> NDArray[np.float64]:
    """Return -log P(hits >= h) for h = 0..trials, a row for each chance; 0 below `MIN_HITS`."""
    counts = np.arange(trials + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    ways = log_factorial[-1] - log_factorial - log_factorial[::-1]
    hit, miss = np.log(chance)[:, None], np.log1p(-chance)[:, None]
    log_share = ways + counts * hit + (trials - counts) * miss
    tail = np.logaddexp.accumulate(log_share[:, ::-1], axis=1)[:, ::-1]
    weights = np.maximum(-tail, 0.0)
    weights[:, :MIN_HITS] = 0.0
    return weights


def _weigh_loss(
    clamping: Clamping, response: Response, shifts: Moves, max_lag: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], float]:
    weights = np.zeros((clamping.sites, len(shifts.offsets)), dtype=np.float32)
    lowest = np.zeros(1)
    excess, excess_sd = np.full(clamping.sites, np.nan), np.full(clamping.sites, np.nan)
    for first in np.unique(clamping.first_lags):
        rows = np.flatnonzero((clamping.first_lags == first) & (clamping.counts() >= MIN_HITS))
        short = min(int(first) + SHORT_LAGS - 1, max_lag)
        for last in sorted({short, max_lag}):
            news = response.ahead(response.calm_scores(), int(first), last).astype(np.float32)
            sums = _products(clamping, rows, news, shifts, score_weights)
            weights[rows] = np.maximum(weights[rows], normal_weights(_standard(sums)))
        news = response.ahead(response.excess, int(first), short).astype(np.float32)
        means = _products(clamping, rows, news, shifts, _mean_weights, every=4)
        excess[rows] = means[:, 0] - means.mean(axis=1)
        excess_sd[rows] = means.std(axis=1)
        lowest = np.minimum(lowest, _standard(means).min(axis=0, initial=0.0))
    return weights, excess, excess_sd, _joint_reach(lowest, int(np.sum(excess_sd > 0)))


def _joint_reach(lowest: NDArray[np.float64], sites: int) -> float:
    """Return how far below the truth, in standard deviations, the furthest of all sites comes.

    As far as the lowest site does at all but 5 % of the shifts; but not less than Sidak's bound
    for so many independent normal sites, since the shifts are few.
    """
    if not sites:
        return float("inf")
    normal = NormalDist().inv_cdf(JOINT ** (1 / sites))
    return max(normal, -float(np.quantile(lowest, 1 - JOINT)))


def _products(
    clamping: Clamping,
    rows: NDArray[np.int64],
    news: NDArray[np.float32],
    shifts: Moves,
    make_weights: Callable[[NDArray[np.float64]], NDArray[np.float32]],
    *,
    every: int = 1,
) -> NDArray[np.float64]:
    """Return the weighted sum of the news at each site's clamped steps, at every n-th shift."""
    count = -(-len(shifts.offsets) // every)
    out = np.zeros((len(rows), count))
    parts = [slice(clamping.starts[site], clamping.starts[site + 1]) for site in rows]
    weights = [make_weights(clamping.errors[part]) for part in parts]
    is_asked = np.zeros(clamping.length, dtype=bool)  # of a million steps few clamped
    for part in parts:
        is_asked[clamping.steps[part]] = True
    asked = np.flatnonzero(is_asked)
    own = [np.searchsorted(asked, clamping.steps[part]) for part in parts]
    size = max(1, CHUNK_ELEMENTS // max(len(asked), 1))
    for low in range(0, count, size):
        which = slice(low * every, (low + size) * every, every)
        moved = news[shifts.steps_before(which, steps=asked)]
        for row, steps in enumerate(own):
            out[row, low : low + size] = weights[row] @ moved[steps]
    return out


def score_weights(errors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return what each clamped step counts by the rank of its error: exponential quantiles."""
    ranks = np.argsort(np.argsort(errors, kind="stable"), kind="stable")
    return (-np.log1p(-(ranks + 0.5) / len(errors))).astype(np.float32)


def _mean_weights(errors: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.full(len(errors), 1 / len(errors), dtype=np.float32)


def _standard(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = sums.std(axis=1, keepdims=True)
    centred = sums - sums.mean(axis=1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(sums), where=spread > 1e-12)


def normal_weights(z: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return -log P(standard normal > z), within 5 %; 0 for z below 0."""
    above = np.maximum(z, 0.0)
    weights = above**2 / 2 - np.log(np.sqrt(2 / np.pi) / (above + np.sqrt(above**2 + 8 / np.pi)))
    return np.where(z > 0, weights, 0.0).astype(np.float32)
