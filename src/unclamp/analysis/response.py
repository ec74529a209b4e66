"""The loss as something that clamping may move: without its trend, on two scales.

In shares of the loss, for effects that people read; and as normal scores, for a test that one
spike does not decide. Both are against the local median, so that neither the decay of the loss
nor a level that changed with the data counts as an effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from unclamp.analysis.groups import Group, has_kinds, split_places
from unclamp.analysis.robust import LONG

LEVEL_STEPS = 51
SPREAD_STEPS = 201
HIGH_SCORE = 2.0
MAX_SCORE = 2.5
RECENT = (1, 2, 3)
"""Steps before the first one that clamping could act on, in which the loss must not be high."""
CHUNK_ELEMENTS = 2_000_000
MIN_FINITE = 20
"""A loss with fewer finite values says nothing."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """The loss without its trend, one value a step.

    Attributes:
        excess: log(loss / local median); a non-finite loss counts as the largest finite excess.
            In the loss's own unit where it is not positive throughout.
        scores: Normal scores of the excess over its local spread: ranks as standard normal
            quantiles.
        in_spike: Where a spike is.
        high: Where the loss is high already: in a spike, or among its highest 2 %.
        is_relative: Whether `excess` is a logarithm of a ratio.
    """

    excess: NDArray[np.float64]
    scores: NDArray[np.float64]
    in_spike: NDArray[np.bool_]
    high: NDArray[np.bool_]
    is_relative: bool

    def calm_scores(self) -> NDArray[np.float64]:
        """Return the scores without the spikes, and without outliers beyond 2.5.

        Spikes have a test of their own, and bunch in time where the rest is even.
        """
        return np.where(self.in_spike, 0.0, np.clip(self.scores, -MAX_SCORE, MAX_SCORE))

    def ahead(self, values: NDArray[np.float64], first: int, last: int) -> NDArray[np.float64]:
        """Return the mean of `values` over `first` to `last` steps later, as news.

        What the step before had foretold is taken off, and where the loss was high already the
        news is 0: clamping that a high loss caused must not get the blame for it.
        """
        padded = np.concatenate([values, np.zeros(last)])
        length = len(values)
        mean = np.mean([padded[lag : lag + length] for lag in range(first, last + 1)], axis=0)
        before = _later(values, first - 1)
        was_high = np.any([_later(self.high, first - back) for back in RECENT], axis=0)
        calm = ~was_high
        spread = float(before[calm] @ before[calm])
        slope = float(before[calm] @ mean[calm]) / spread if spread > 0 else 0.0
        return np.where(calm, mean - slope * before, 0.0)


def make_response(
    loss: NDArray[np.float64], in_spike: NDArray[np.bool_], groups: Sequence[Group] = ()
) -> Response | None:
    """Return the detrended loss; None where it is constant or has under 20 finite values.

    Args:
        loss: One a step.
        in_spike: Where a spike is.
        groups: The kind of each step's batch. Each loss is measured against those of its own kind,
            and scored among them; a kind that is constant or has under 20 finite values counts as
            what was expected of it, 0. Without them all are of one kind.
    """
    finite = np.isfinite(loss)
    is_relative = bool(np.all(loss[finite] > 0))
    excess, scores = np.zeros((2, len(loss)))
    kinds = split_places(groups) if has_kinds(groups) else {None: slice(None)}
    told = []
    for places in kinds.values():
        own = loss[places]
        known = own[np.isfinite(own)]
        if len(known) < MIN_FINITE or np.ptp(known) == 0:
            continue
        told.append(places)
        excess[places], scores[places] = _against_level(own, is_relative)
    if not told:
        return None
    return Response(
        excess=excess,
        scores=scores,
        in_spike=in_spike,
        high=in_spike | (scores > HIGH_SCORE),
        is_relative=is_relative,
    )


def _against_level(
    loss: NDArray[np.float64], is_relative: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return excess and scores of the losses of one kind."""
    finite = np.isfinite(loss)
    values = np.where(finite, loss, 1.0)
    values = np.log(values) if is_relative else values
    values = np.where(finite, values, np.nan)
    excess = values - running_median(values, LEVEL_STEPS)
    highest = np.nanmax(excess)
    excess = np.where(np.isfinite(excess), excess, highest)
    spread = running_median(np.abs(excess), SPREAD_STEPS)
    # Where most of the loss repeats itself the median is 0: a rounding error of its size is less
    # than any step of it, and small enough to divide by.
    size = max(float(np.max(np.abs(excess))), float(np.max(np.abs(values[finite]))))
    floor = max(float(np.median(spread)) * 1e-3, size * np.finfo(float).eps, np.finfo(float).tiny)
    return excess, _normal_scores(excess / np.maximum(spread, floor), ~finite)


def _later(values: NDArray, lag: int) -> NDArray:
    """Return at each step the value `lag` steps later (earlier below 0); 0 beyond the ends."""
    moved = np.zeros_like(values)
    if lag >= 0:
        moved[: len(values) - lag] = values[lag:]
    else:
        moved[-lag:] = values[:lag]
    return moved


def running_median(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the centred running median, NaN left out; the window narrows at the ends."""
    if len(values) >= LONG:
        from unclamp.analysis import kernels  # noqa: PLC0415 - numba is slow to import

        return kernels.running_median(values, width)
    half = width // 2
    padded = np.pad(values, half, constant_values=np.nan)
    windows = sliding_window_view(padded, width)
    medians = np.empty(len(values))
    size = max(1, CHUNK_ELEMENTS // width)
    for low in range(0, len(values), size):  # median copies what it is given
        medians[low : low + size] = np.median(windows[low : low + size], axis=-1)
    # NaN wherever the window has one.
    for index in np.flatnonzero(np.isnan(medians)):
        known = windows[index][~np.isnan(windows[index])]
        medians[index] = np.median(known) if len(known) else np.nan
    return medians


def _normal_scores(values: NDArray[np.float64], nonfinite: NDArray[np.bool_]) -> NDArray:
    order = np.argsort(np.where(nonfinite, np.inf, values), kind="stable")
    normal = NormalDist()
    scores = np.empty(len(values))
    shares = (np.arange(len(values)) + 0.5) / len(values)
    scores[order] = [normal.inv_cdf(share) for share in shares.tolist()]
    return scores
