"""Sums over the chunks of a log, of one policy, and the outcome that they come to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.analysis.whatif.amaxes import Chunk
from unclamp.analysis.whatif.outcome import Lost, Outcome, SiteOutcome
from unclamp.analysis.whatif.scales import Casts
from unclamp.runlog.sites import SiteInfo
from unclamp.scaling import Scaling


@dataclass
class Sums:
    """Sums of a policy over chunks, `[sites]` each."""

    casts: np.ndarray
    clamped: np.ndarray
    scaled: np.ndarray
    first: np.ndarray
    elements: np.ndarray
    again: np.ndarray

    @classmethod
    def of(cls, sites: int) -> "Sums":
        """Return them before any cast."""
        whole = [np.zeros(sites, np.int64) for _ in range(4)]
        return cls(whole[0], whole[1], np.zeros(sites), np.full(sites, -1), whole[2], whole[3])

    def add(self, chunk: Chunk, casts: Casts) -> None:
        """Add a chunk's casts, as the policy makes them."""
        self.casts += chunk.counts
        self.elements += chunk.elements.sum(1)
        if not casts.scale.any():
            return
        scaled = (chunk.amax.astype(np.float64) * casts.scale).max(1, initial=0)
        self.scaled = np.maximum(self.scaled, scaled)
        hit = casts.clamps.any(1)
        if not hit.any():
            return
        self.clamped += casts.clamps.sum(1)
        self.again += np.where(casts.clamps, chunk.elements, 0).sum(1)
        step = np.where(casts.clamps, chunk.step, np.iinfo(np.int64).max).min(1)
        self.first = np.where(hit & (self.first < 0), step, self.first)

    def outcome(
        self, policy: Scaling, sites: Sequence[SiteInfo], lost: Sequence[Lost | None]
    ) -> Outcome:
        """Return what they come to; `lost` is of each site."""
        reads = _reads(policy, self.elements, self.again)
        guards = policy.guards
        return Outcome(
            policy=policy,
            sites=tuple(
                SiteOutcome(
                    site=site.name,
                    casts=int(self.casts[i]),
                    clamped=0 if guards else int(self.clamped[i]),
                    recast=int(self.clamped[i]) if guards else 0,
                    overshoot=_overshoot(policy, float(self.scaled[i]), site.format_max),
                    first_clamp=None if guards or self.first[i] < 0 else int(self.first[i]),
                    elements=int(self.elements[i]),
                    reads=float(reads[i]),
                    lost=lost[i],
                )
                for i, site in enumerate(sites)
            ),
        )


def _reads(policy: Scaling, elements: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Return elements read: none where nothing is cast, twice where the scale is measured first."""
    if not policy.casts:
        return np.zeros_like(elements)
    if policy.takes_own:
        return 2 * elements
    return elements + again if policy.guards else elements


def _overshoot(policy: Scaling, scaled: float, format_max: float) -> float:
    largest = scaled / format_max
    return min(largest, 1.0) if policy.guards else largest
