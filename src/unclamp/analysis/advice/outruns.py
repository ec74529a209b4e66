"""How often amaxes outrun what a policy predicts, cast by cast: what each would do to a log.

Beyond its inspected casts a log knows no more of a clamp than its overshoot, so advice is made by
the bound that this gives (`totals.clamp_error_bound`). One reading of the log serves all policies.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from unclamp.analysis.whatif.amaxes import Chunk, read_chunks
from unclamp.analysis.whatif.evaluate import NO_CASTS
from unclamp.analysis.whatif.inspected import Inspected
from unclamp.analysis.whatif.outcome import Outcome
from unclamp.analysis.whatif.scales import Maxima, Player
from unclamp.analysis.whatif.sums import Sums
from unclamp.errors import AnalysisError
from unclamp.formats import get_format
from unclamp.runlog import RunLog
from unclamp.runlog.sites import SiteInfo
from unclamp.scaling import Scaling
from unclamp.totals import clamp_error_bound


@dataclass(frozen=True, kw_only=True)
class Outruns:
    """What a policy would do to the casts of a log, and where amaxes outrun it.

    Attributes:
        outcome: Its casts, repeats and reads, site by site.
        site: Of each cast that would clamp, which site, `[clamps]`.
        step: Which step, `[clamps]`.
        overshoot: By how much, above 1, `[clamps]`.
        tried: Scale that each inspected cast is tried with, `[rows]`; 0: its own.
    """

    outcome: Outcome
    site: np.ndarray
    step: np.ndarray
    overshoot: np.ndarray
    tried: np.ndarray

    @property
    def policy(self) -> Scaling:
        """The scaling."""
        return self.outcome.policy

    def of_sites(self, sites: np.ndarray) -> "Outruns":
        """Return the clamps of some sites alone."""
        keep = np.isin(self.site, sites)
        return replace(
            self, site=self.site[keep], step=self.step[keep], overshoot=self.overshoot[keep]
        )

    def hard(self, harm: float) -> int:
        """Return how many casts may lose more than `harm` of their squares."""
        return int((clamp_error_bound(self.overshoot) > harm).sum())


@dataclass
class _Try:
    player: Player
    sums: Sums
    tried: np.ndarray
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


def outruns(
    log: RunLog, sites: Sequence[SiteInfo], policies: Sequence[Scaling], inspected: Inspected
) -> list[Outruns]:
    """Return what each policy would do; of a guard's, what is outrun is repeated.

    Raises:
        AnalysisError: There are no casts.
    """
    formats = [get_format(site.format) for site in sites]
    largest_value = np.array([site.format_max for site in sites])
    rows = len(inspected.step)
    tries = [
        _Try(Player.of(policy, formats), Sums.of(len(sites)), np.zeros(rows, np.float32))
        for policy in policies
    ]
    maxima = {w: Maxima.of(w, len(sites)) for t in tries if (w := t.player.window) is not None}
    casts, elements = np.zeros(len(sites), np.int64), np.zeros(len(sites), np.int64)
    with ThreadPoolExecutor(2) as pool:
        for chunk in read_chunks(log, sites):
            casts += chunk.counts
            elements += chunk.elements.sum(1)
            taken = {window: maximum.take(chunk) for window, maximum in maxima.items()}
            looked = _Looked(inspected.place, *inspected.columns(chunk))
            for _ in pool.map(
                lambda t: _play(t, chunk, taken, looked, largest_value),  # noqa: B023
                tries,
            ):
                pass
    if not casts.any():
        raise AnalysisError(NO_CASTS)
    return [_joined(each, sites, casts, elements) for each in tries]


@dataclass(frozen=True)
class _Looked:
    """Which inspected casts lie in a chunk, and in which column; `place` is of all."""

    place: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def _play(
    each: _Try,
    chunk: Chunk,
    taken: dict[int, np.ndarray],
    looked: _Looked,
    largest_value: np.ndarray,
) -> None:
    window = each.player.window
    played = each.player.play(chunk, None if window is None else taken[window])
    each.sums.add(chunk, played)
    each.tried[looked.rows] = played.scale[looked.place[looked.rows], looked.columns]
    site, column = np.nonzero(played.clamps)
    scaled = chunk.amax[site, column].astype(np.float64) * played.scale[site, column]
    each.parts.append((site, chunk.step[site, column], scaled / largest_value[site]))


def _joined(
    each: _Try, sites: Sequence[SiteInfo], casts: np.ndarray, elements: np.ndarray
) -> Outruns:
    site, step, overshoot = (np.concatenate([part[i] for part in each.parts]) for i in range(3))
    return Outruns(
        outcome=each.sums.outcome(
            each.player.policy, sites, casts=casts, elements=elements, lost=[None] * len(sites)
        ),
        site=site.astype(np.int64),
        step=step.astype(np.int64),
        overshoot=overshoot,
        tried=each.tried,
    )
