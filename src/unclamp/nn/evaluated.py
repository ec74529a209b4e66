"""What the casts of evaluations saw, and whether the scales behind them are still right.

A ledger's scales follow its own training. A copy of a model (an average of its weights, a teacher)
has a ledger of its own, which no optimizer updates: its scales stay those of the step at which it
was made, while its weights and inputs go on. So the casts of evaluations are counted beside those
of the training, and where an average clamps on scales that are older than its source's, one
warning says so.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from unclamp.errors import UnclampWarning
from unclamp.names import SiteName
from unclamp.numerics import Stat, empty_stats
from unclamp.numerics.gpu import is_capturing
from unclamp.written import counted


class Steps:
    """How many steps a ledger has made; its copies have it too, and outlive the ledger."""

    def __init__(self) -> None:
        self.made = 0


class Stepping:
    """What counts its steps where its copies see them: a ledger.

    Attributes:
        steps: The count.
    """

    steps: Steps

    @property
    def updates(self) -> int:
        """Updates so far that were steps; those of a graph's replays aside."""
        return self.steps.made

    @updates.setter
    def updates(self, made: int) -> None:
        self.steps.made = made


class Named(Protocol):
    """A site, as far as it is named here."""

    name: SiteName


class Evaluated:
    """Counts of a ledger's evaluations, and where a copy's scales are from.

    Attributes:
        stats: Statistics of casts in evaluations, float64 `[sites, len(Stat)]`.
        source: The steps of the model that this one was copied from; None where it is no copy,
            or has trained on its own since.
        is_average: Whether the scaling state that was loaded is an average of several.
    """

    def __init__(self) -> None:
        self.source: Steps | None = None
        self.is_average = False
        self.stats = empty_stats(0)
        self._before: Tensor | None = None
        self._looks = 0
        self._has_warned = False

    @torch.inference_mode(False)
    def lay_out(self, sites: int, device: torch.device) -> None:
        """Count so many sites from now on, whose tensors lie on a device; counts stay."""
        old, self.stats = self.stats, empty_stats(sites, device)
        self.stats[: len(old)] = old.to(device)
        self._before = None

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Start counting anew."""
        self.stats.copy_(empty_stats(len(self.stats), self.stats.device))
        self._before = None

    # ---- where the scales are from ---------------------------------------------------------

    def copied_from(self, steps: Steps, other: "Evaluated") -> None:
        """Note that the scales are those of another ledger, as they are now."""
        self.source = other.source or steps  # of a copy's copy: where its scales are from
        self.is_average, self._before = other.is_average, None

    def trained(self) -> None:
        """Note that the ledger's own training has set its scales."""
        self.source, self.is_average = None, False

    def restored(self, updates: float) -> None:
        """Note that scales of so many updates were loaded."""
        self.is_average = updates != round(updates)
        self._before = None

    def age(self, updates: int) -> int | None:
        """Return by how many updates scales of so many are older than the source's.

        0 where they are a training's own; None where nobody knows: they are an average's.
        """
        if self.source is not None:
            return max(self.source.made - updates, 0)
        return None if self.is_average else 0

    def pickled(self) -> "Evaluated":
        """Return what a pickle keeps: no counts, and no other model."""
        kept = Evaluated()
        kept.is_average = self.is_average
        kept.lay_out(len(self.stats), self.stats.device)
        return kept

    # ---- in evaluations --------------------------------------------------------------------

    def watches(self, updates: int) -> bool:
        """Whether the next cast is to be looked at: scales are not as new as the source's."""
        if self._has_warned or (self.source is None and not self.is_average):
            return False
        if self.age(updates) == 0:
            return False
        if self._before is None:
            self._before = self.stats[:, Stat.SATURATED].clone()
        return True

    def look(self, sites: list[Any], updates: int, *, is_written: Callable[[], bool]) -> None:
        """Warn, once, if an average clamps on old scales.

        A copy that is meant to be old (the best model so far, a target network) has the weights
        that its scales are of: it clamps what its source would have. So the weights must have
        been written since the scales were, of which `is_written` tells, and one element is no
        sign either.

        On a CPU after each product. On another device, which has to be waited for, ever more
        rarely; evaluations of copies whose scales are new are never waited for.
        """
        self._looks += 1
        is_rare = self._looks & (self._looks - 1) == 0
        if self._before is None or is_capturing():
            return
        if self.stats.device.type != "cpu" and not is_rare:
            return
        clamped = self.stats[:, Stat.SATURATED] - self._before
        if not (clamped > 1).any() or not (self.is_average or is_written()):
            return
        self._has_warned = True
        worst = int(clamped.argmax())
        site: Named = sites[worst]
        elements = int(self.stats[worst, Stat.ELEMENTS])
        age = self.age(updates)
        old = (
            "its scales are an average of several states"
            if age is None
            else f"its scales are {counted(age, 'update')} older than those of the model that it "
            "was copied from, and its weights were written since"
        )
        warnings.warn(
            f"a copy of a model clamps in evaluation: {int(clamped[worst]):,} of "
            f"{counted(elements, 'element')} so far at {site.name}; {old}. Call "
            "unclamp.refresh(copy, from_=model) before evaluating it, and see "
            "unclamp.evaluation_counts(copy) for all sites.",
            UnclampWarning,
            stacklevel=5,
        )
