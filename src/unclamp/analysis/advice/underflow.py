"""What underflow takes, and how much of it advice tolerates.

*Of inputs and weights the number of elements counts* that become zero. Values go through norms, and
what they say may be a ratio of small ones.

*Of gradients their squares count.* Backward is linear: what an element adds to any weight's
gradient is proportional to it, however many there are. A fifth of a step's elements may be 25
orders of magnitude smaller than the others, as those of tokens are that a model predicts for
certain, and then they are nothing. What is tolerated is as much as rounding takes at least.
Squares are added up over one step, and over the experts of a bank, which share its tokens. Sums
over steps would hide those in which everything vanishes, as after a spike of the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.analysis.advice.groups import Group
from unclamp.analysis.advice.outruns import Outruns
from unclamp.analysis.whatif import Outcome, WhatIf
from unclamp.analysis.whatif.inspected import Inspected
from unclamp.formats import Format, get_format
from unclamp.names import bank_of
from unclamp.runlog.sites import SiteInfo
from unclamp.scaling import Scaling
from unclamp.totals import share

MORE, LARGER = 0.001, 1.25
"""Elements of inputs and weights that a policy may make zero: so large a share beyond those that
dynamic scaling does, or so many times as many."""


@dataclass(frozen=True, kw_only=True)
class Underflows:
    """What each policy loses by underflow, the last of them being dynamic scaling.

    Attributes:
        outcomes: Of each policy.
        zeroed: Squares that each makes zero, `[policies, rows]`, of inspected casts.
        squares: All of theirs, `[rows]`.
        place: Which site, `[rows]`.
        sums: What each cast's squares are added up with: a number a step and bank, `[rows]`.
        rounding: What rounding takes at least, share, `[sites]`.
    """

    outcomes: Sequence[Outcome]
    zeroed: np.ndarray
    squares: np.ndarray
    place: np.ndarray
    sums: np.ndarray
    rounding: np.ndarray

    @classmethod
    def of(
        cls,
        found: WhatIf,
        missed: Sequence[Outruns],
        inspected: Inspected,
        sites: Sequence[SiteInfo],
    ) -> "Underflows":
        """Return it of policies, in the order of `found` and `missed`."""
        formats = [get_format(site.format) for site in sites]
        banks = {name: number for number, name in enumerate({bank_of(s.fqn): 0 for s in sites})}
        bank = np.array([banks[bank_of(site.fqn)] for site in sites], np.int64)
        sums = inspected.step * len(banks) + bank[inspected.place]
        zeroed = [zeroed_squares(inspected, m.tried, m.policy, formats) for m in missed]
        return cls(
            outcomes=found.outcomes,
            zeroed=np.array(zeroed),
            squares=_squares(inspected).sum(1),
            place=inspected.place,
            sums=sums,
            rounding=np.array([rounding_takes(fmt) for fmt in formats]),
        )

    def tolerable(self, rung: int, group: Group) -> bool:
        """Return whether a policy loses little more than dynamic scaling does."""
        if group.role == "grad_output":
            most = self.squares_lost(-1, group) + float(self.rounding[group.sites].min())
            return self.squares_lost(rung, group) <= most
        plain = _elements_lost(self.outcomes[-1], group)
        return _elements_lost(self.outcomes[rung], group) <= max(plain + MORE, plain * LARGER)

    def squares_lost(self, rung: int, group: Group) -> float:
        """Return the share of a step's squares that become zero, mean over steps and banks."""
        rows = np.flatnonzero(np.isin(self.place, group.sites))
        if not len(rows):
            return 0.0
        _, where = np.unique(self.sums[rows], return_inverse=True)
        zeroed, whole = (
            np.bincount(where, squares[rows]) for squares in (self.zeroed[rung], self.squares)
        )
        return float(share(zeroed, whole).mean())


def _elements_lost(outcome: Outcome, group: Group) -> float:
    """Return the mean share of elements that become zero; 0 where no cast was inspected."""
    lost = [part for i in group.sites if (part := outcome.sites[i].lost) is not None]
    casts = sum(part.casts for part in lost)
    return share(sum(part.underflow.value * part.casts for part in lost), casts)


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
    below = np.clip(np.log2(least)[:, None] - _octaves(inspected), 0, 1)
    return (_squares(inspected) * (4**below - 1) / 3).sum(1)


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
