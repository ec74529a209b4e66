"""What the casts of evaluations saw, and whether the scales behind them are still right.

A ledger's scales follow its own training. A copy of a model (an average of its weights, a teacher)
has a ledger of its own, which no optimizer updates: its scales stay those of the step at which it
was made, while its weights and inputs go on. So the casts of evaluations are counted beside those
of the training, and where an average clamps on scales that are older than its source's, one
warning says so.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from unclamp.errors import UnclampWarning
from unclamp.names import ROLES, SiteName
from unclamp.numerics import Stat, empty_stats
from unclamp.numerics.gpu import host_may_look, is_capturing
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
        is_stale: Whether the scales are older than those of a source that is not known here.
    """

    def __init__(self) -> None:
        self.source: Steps | None = None
        self.is_stale = False
        self._averages: frozenset[int] = frozenset()
        self._doubts: list[tuple[int, Tensor]] = []
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

    def copied_from(
        self, steps: Steps, other: "Evaluated", numbers: Mapping[int, int] | None = None
    ) -> None:
        """Note that the scales are those of another ledger, as they are now.

        Args:
            steps: The other's.
            other: What the other one has evaluated.
            numbers: Which of the other's products each is; None: all by the same number.
        """
        self.source = other.source or steps  # of a copy's copy: where its scales are from
        self.is_stale, self._before = other.is_stale, None
        if numbers is None:
            self._averages, self._doubts = other.averages(), []
        else:
            averages = frozenset(n for n, old in numbers.items() if old in other.averages())
            self._averages = (self.averages() - numbers.keys()) | averages

    def averages(self) -> frozenset[int]:
        """Return the products whose scaling state is an average of several.

        Waits for the device once after a load.
        """
        if self._doubts and not is_capturing():
            numbers, doubts = zip(*self._doubts, strict=True)
            device = doubts[0].device
            found = torch.stack([doubt.to(device) for doubt in doubts]).tolist()
            self._averages |= {n for n, is_one in zip(numbers, found, strict=True) if is_one}
            self._doubts = []
        return self._averages

    def trained(self, turn: frozenset[int] | None) -> None:
        """Note that the ledger's own training has set the scales of some products; None: of all."""
        self.source, self.is_stale = None, False
        if turn is None:
            self._averages, self._doubts = frozenset(), []
        elif self._averages or self._doubts:
            self.reloaded(turn)

    def reloaded(self, products: frozenset[int]) -> None:
        """Forget what was known of some products: their scales are others now."""
        self._averages -= products
        self._doubts = [each for each in self._doubts if each[0] not in products]
        self._before = None

    def doubt(self, product: int, is_average: Tensor | bool) -> None:  # a finding
        """Note whether what was loaded of a product is an average; a tensor is looked at later."""
        if isinstance(is_average, Tensor):
            self._doubts.append((product, is_average))
        elif is_average:
            self._averages |= {product}

    def age(self, updates: int, products: frozenset[int] | None = None) -> int | None:
        """Return by how many updates scales of so many are older than the source's.

        0 where no older source is known; None where there is one, and nobody knows: scales of one
        of these products (None: any) are an average's, or those of a copy without its source.
        """
        averages = self.averages()
        if self.is_stale or (averages if products is None else averages & products):
            return None
        return 0 if self.source is None else max(self.source.made - updates, 0)

    def is_behind(self, updates: int) -> bool:
        """Whether a source has gone on since the scales were taken from it."""
        return self.is_stale or (self.source is not None and self.source.made > updates)

    def pickled(self, updates: int) -> "Evaluated":
        """Return what a pickle keeps: no counts, and no other model."""
        kept = Evaluated()
        kept._averages, kept.is_stale = self.averages(), self.is_behind(updates)
        kept.lay_out(len(self.stats), self.stats.device)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        Evaluated.__init__(self)
        of_all = state.pop("is_average", False)  # as older pickles have it
        self.__dict__.update(state)
        if of_all:
            self._averages = frozenset(range(len(self.stats) // len(ROLES)))

    # ---- in evaluations --------------------------------------------------------------------

    def watches(self, updates: int, product: int) -> bool:
        """Whether a product's casts are to be looked at: scales are not as new as the source's."""
        if self._has_warned or not (self.source or self._averages or self._doubts or self.is_stale):
            return False
        if not (self.is_behind(updates) or product in self.averages()):
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
        if not (host_may_look(self.stats) or is_rare):
            return
        clamped = self.stats[:, Stat.SATURATED] - self._before
        if not (clamped > 1).any():
            return
        averages, is_old = self.averages(), self.is_behind(updates) and is_written()
        if not is_old:
            sites_of = torch.arange(len(clamped), device=clamped.device) // len(ROLES)
            of_averages = torch.isin(
                sites_of, torch.tensor(sorted(averages), dtype=torch.long, device=clamped.device)
            )
            clamped = torch.where(of_averages, clamped, 0)
            if not (clamped > 1).any():
                return
        self._has_warned = True
        worst = int(clamped.argmax())
        site: Named = sites[worst]
        elements = int(self.stats[worst, Stat.ELEMENTS])
        age = self.age(updates, frozenset())
        old = (
            "its scales are an average of several states"
            if worst // len(ROLES) in averages
            else "its scales are older than those of the model that it was copied from, and its "
            "weights were written since"
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
