"""What a recorder hears from one ledger: its updates since the last step, and its sites."""

import itertools
from collections.abc import Callable, Iterator

from torch import nn

from unclamp.nn.layout import Site
from unclamp.nn.ledger import Ledger
from unclamp.nn.replicas import repeated_sites
from unclamp.nn.update import Inspection, Update
from unclamp.telemetry.columns import UNNUMBERED, merged_update

MOST_UPDATES = 2
"""Optimizer steps after which closer looks end, if nobody records a step meanwhile."""


class Source:
    """One ledger, heard. Updates between two steps are merged: they take no more room than one."""

    def __init__(self, ledger: Ledger, told: Callable[[], None]) -> None:
        """Listen to a ledger, and call `told` at each of its updates."""
        self.ledger = ledger
        self.ids: list[int] = []
        self._looked_at: tuple[int, frozenset[int]] = (0, frozenset())
        self._waiting: Update | None = None
        self._updates_at_step = ledger.updates
        self._between: Inspection = "never"
        self._is_closed = False
        self._tell = told
        self._commits = 0
        self._end = ledger.subscribe(self._hear)
        if ledger.clock.is_blind():
            ledger.clock.look_at_weights(ledger)

    @property
    def is_in_model(self) -> bool:
        """Whether a product of the ledger is left in its model, as far as it was looked at."""
        return len(self.ledger.gone) < len(self.ledger.sites)

    def number_new_sites(self, free: Iterator[int]) -> tuple[list[Site], list[int]]:
        """Give sites that have no id yet the next `free` ones; return both.

        Sites whose modules are no longer in the model get none until they are back in it. An id
        that a site has stays its own.
        """
        sites, gone = self.ledger.sites, self.ledger.gone
        if self._looked_at == (len(sites), gone):
            return [], []
        self._looked_at = (len(sites), gone)
        self.ids += [UNNUMBERED] * (len(sites) - len(self.ids))
        new = [i for i, own in enumerate(self.ids) if own == UNNUMBERED and i not in gone]
        ids = list(itertools.islice(free, len(new)))
        for index, number in zip(new, ids, strict=True):
            self.ids[index] = number
        return [sites[index] for index in new], ids

    def repeated(self, root: nn.Module | None) -> frozenset[int]:
        """Return the ids of the sites whose tensor a lower rank casts as well."""
        found = repeated_sites(self.ledger, root)
        return frozenset(self.ids[index] for index in found if index < len(self.ids))

    def only_counted(self) -> frozenset[int]:
        """Return the ids of the sites from whose casts nothing is computed, beside others in FP8.

        None of an observed model, whose casts are all of that kind.
        """
        return frozenset(self.ids[i] for i in self.ledger.only_counted if i < len(self.ids))

    def inspect(self, inspection: Inspection, *, between: Inspection) -> None:
        """Have the casts of the coming step inspected; `between` if it is not recorded."""
        self._between = between
        self._updates_at_step = self.ledger.updates
        self.ledger.inspect(inspection, by=self)

    def take(self) -> tuple[list[int], Update] | None:
        """Return the ids of the sites and what was heard since the last call; None if nothing.

        The id of a site that is not in the model is `UNNUMBERED`.
        """
        if self._waiting is None:
            self.ledger.replayed()  # in a CUDA graph no listener is called
        if self._waiting is None:
            self.ledger.clock.catch_up(self.ledger)
        update, self._waiting = self._waiting, None
        return None if update is None else (self.ids[: len(update.stats)], update)

    def note_commits(self) -> None:
        """Remember what was committed until now: an update of some ledger is being made."""
        self._commits = self.ledger.pending._version

    def has_later_commits(self) -> bool:
        """Whether casts were committed since the last update of any ledger that is heard."""
        return self.ledger.is_fresh and self.ledger.pending._version != self._commits

    def close(self) -> None:
        """Hear no more, and ask for nothing; later calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end()
        self.ledger.inspect("never", by=self)

    def _hear(self, update: Update) -> None:
        self._waiting = merged_update(self._waiting, update)
        self._tell()
        if self.ledger.updates - self._updates_at_step >= MOST_UPDATES:
            self.ledger.inspect(self._between, by=self)
