"""Sums over the chunks of a log, of one policy, and the outcome that they come to."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from unclamp.analysis.whatif.amaxes import Chunk
from unclamp.analysis.whatif.outcome import Lost, Outcome, SiteOutcome
from unclamp.analysis.whatif.scales import Casts
from unclamp.runlog.sites import SiteInfo
from unclamp.scaling import Scaling


@dataclass
class Sums:
    """Sums of a policy over chunks, `[sites]` each.

    Attributes:
        clamped: Casts whose scale clamps.
        scaled: Largest amax times scale, float32.
        first: First step that clamps; -1 for none.
        again: Elements of the casts that clamp.
    """

    clamped: np.ndarray
    scaled: np.ndarray
    first: np.ndarray
    again: np.ndarray

    @classmethod
    def of(cls, sites: int) -> "Sums":
        """Return them before any cast."""
        return cls(
            clamped=np.zeros(sites, np.int64),
            scaled=np.zeros(sites, np.float32),
            first=np.full(sites, -1),
            again=np.zeros(sites, np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence["Sums"]) -> "Sums":
        """Return those of several blocks of sites, one behind the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})

    def add(self, chunk: Chunk, casts: Casts) -> None:
        """Add a chunk's casts, as the policy makes them."""
        if chunk.amax.size == 0 or not casts.scale.any():
            return
        with np.errstate(over="ignore"):
            np.maximum(self.scaled, (chunk.amax * casts.scale).max(1), out=self.scaled)
        clamped = casts.clamps.sum(1)
        hit = np.flatnonzero(clamped)
        if not len(hit):
            return
        clamps = casts.clamps[hit]
        self.clamped[hit] += clamped[hit]
        self.again[hit] += (chunk.elements[hit] * clamps).sum(1)
        new = hit[self.first[hit] < 0]
        self.first[new] = chunk.step[new, casts.clamps[new].argmax(1)]

    def outcome(
        self,
        policy: Scaling,
        sites: Sequence[SiteInfo],
        *,
        casts: np.ndarray,
        elements: np.ndarray,
        lost: Sequence[Lost | None],
    ) -> Outcome:
        """Return what they come to, with the casts of each site, their elements, and losses."""
        reads = _reads(policy, elements, self.again)
        guards = policy.guards
        return Outcome(
            policy=policy,
            sites=tuple(
                SiteOutcome(
                    site=site.name,
                    casts=int(casts[i]),
                    clamped=0 if guards else int(self.clamped[i]),
                    recast=int(self.clamped[i]) if guards else 0,
                    overshoot=_overshoot(policy, float(self.scaled[i]), site.format_max),
                    first_clamp=None if guards or self.first[i] < 0 else int(self.first[i]),
                    elements=int(elements[i]),
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
