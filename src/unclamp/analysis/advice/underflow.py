"""What underflow takes, and how much of it advice tolerates: as much as rounding takes at least.

Never told by how many elements become zero, which says nothing of what they were worth.

*Of inputs and weights: the squares of the smaller half of a cast's elements.* A product loses
nothing with elements that are small beside their neighbours. Of the smaller half, since a few large
tokens or channels have most of a tensor's squares, and the others say something too. What it takes
grows with the cube of the largest value that becomes zero, and of a normal or uniform tensor is as
much as rounding takes where that is a fifteenth of the median (E4M3).

*Of gradients: all squares of a step.* Backward is linear: what an element adds to any weight's
gradient is proportional to it. A fifth of a step's elements may be 25 orders of magnitude smaller
than the others, as those of tokens are that a model predicts for certain, and then they are
nothing. Squares are added up over one step, and over the experts of a bank, which share its tokens.
Sums over steps would hide those in which everything vanishes, as after a spike of the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.analysis.advice.groups import Group
from unclamp.analysis.advice.outruns import Outruns
from unclamp.analysis.whatif.inspected import Inspected
from unclamp.formats import Format, get_format
from unclamp.names import bank_of
from unclamp.runlog.sites import SiteInfo
from unclamp.scaling import Scaling
from unclamp.totals import share


@dataclass(frozen=True, kw_only=True)
class Underflows:
    """What each policy loses by underflow in inspected casts, the last being dynamic scaling.

    Attributes:
        zeroed: Squares that each makes zero, `[policies, rows]`.
        squares: All of theirs, `[rows]`.
        smaller: Those of the smaller half of their elements, `[rows]`.
        place: Which site, `[rows]`.
        sums: What a gradient's squares are added up with: a number a step and bank, `[rows]`.
        rounding: What rounding takes at least, share, `[sites]`.
    """

    zeroed: np.ndarray
    squares: np.ndarray
    smaller: np.ndarray
    place: np.ndarray
    sums: np.ndarray
    rounding: np.ndarray

    @classmethod
    def of(
        cls, missed: Sequence[Outruns], inspected: Inspected, sites: Sequence[SiteInfo]
    ) -> "Underflows":
        """Return it of policies."""
        formats = [get_format(site.format) for site in sites]
        banks = {name: number for number, name in enumerate({bank_of(s.fqn): 0 for s in sites})}
        bank = np.array([banks[bank_of(site.fqn)] for site in sites], np.int64)
        zeroed = [zeroed_squares(inspected, m.tried, m.policy, formats) for m in missed]
        return cls(
            zeroed=np.array(zeroed),
            squares=_squares(inspected).sum(1),
            smaller=_smaller_half(inspected),
            place=inspected.place,
            sums=inspected.step * len(banks) + bank[inspected.place],
            rounding=np.array([rounding_takes(fmt) for fmt in formats]),
        )

    def tolerable(self, rung: int, group: Group) -> bool:
        """Return whether a policy loses little more than dynamic scaling does."""
        rounding = float(self.rounding[group.sites].min())
        return self.lost(rung, group) <= self.lost(-1, group) + rounding

    def lost(self, rung: int, group: Group) -> float:
        """Return the mean share of squares that become zero; 0 where no cast was inspected.

        Of gradients the mean is over steps and banks, of the others over casts.
        """
        rows = np.flatnonzero(np.isin(self.place, group.sites))
        if not len(rows):
            return 0.0
        zeroed = self.zeroed[rung][rows]
        if group.role != "grad_output":
            return float(np.minimum(share(zeroed, self.smaller[rows]), 1).mean())
        _, where = np.unique(self.sums[rows], return_inverse=True)
        parts = (np.bincount(where, values) for values in (zeroed, self.squares[rows]))
        return float(share(*parts).mean())


def zeroed_squares(
    inspected: Inspected, tried: np.ndarray, policy: Scaling, formats: Sequence[Format]
) -> np.ndarray:
    """Return sums of squares of the elements that become zero, `[rows]`.

    Args:
        inspected: The casts.
        tried: Scale that each is tried with, `[rows]`; 0: its own.
        policy: The scaling.
        formats: Of each site.

    Numerics: float64. Elements lie evenly in the logarithm within their octave; a tensor's own
    scale is taken for exact.
    """
    of_rows = [formats[place] for place in inspected.place.tolist()]
    own = np.array([fmt.max for fmt in of_rows]) / inspected.amax
    used = np.where(tried == 0, own, tried.astype(np.float64))
    if policy.guards:
        used = np.minimum(used, own)
    least = np.array([fmt.min_subnormal for fmt in of_rows]) / 2 / used
    return _lowest_squares(inspected, np.log2(least)[:, None] - _octaves(inspected))


def _smaller_half(inspected: Inspected) -> np.ndarray:
    """Return sums of squares of the smaller half of a cast's elements, `[rows]`."""
    counts = inspected.counts
    left = counts.sum(1, keepdims=True) / 2 - (np.cumsum(counts, 1) - counts)
    return _lowest_squares(inspected, left / np.maximum(counts, 1))


def _lowest_squares(inspected: Inspected, parts: np.ndarray) -> np.ndarray:
    """Return sums of squares of the lowest part of each octave: all of it from 1, none below 0."""
    return (_squares(inspected) * (4 ** np.clip(parts, 0, 1) - 1) / 3).sum(1)


def _octaves(inspected: Inspected) -> np.ndarray:
    return inspected.lowest + np.arange(inspected.counts.shape[1], dtype=np.float64)


def _squares(inspected: Inspected) -> np.ndarray:
    """Return sums of squares by octave, over a constant that all have, `[rows, octaves]`."""
    return inspected.counts * 4 ** _octaves(inspected)


def rounding_takes(fmt: Format) -> float:
    """Return the least that rounding takes of the squares of ordinary tensors, share.

    Errors spread evenly over a step have a mean square of its square over 12; and a step is more
    than half of 2**-mantissa_bits of the element, and no more where that lies below a power of two.
    """
    return 4.0**-fmt.mantissa_bits / 48
