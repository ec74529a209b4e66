"""The ids of a run's sites, and the rows that tell of them.

How a model is spread over ranks may be known only once it was called: FSDP wraps late. So where
there are several ranks, the rows wait for the first step.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from unclamp.formats import Format
from unclamp.nn.layout import Site
from unclamp.runlog import Columns
from unclamp.telemetry.columns import site_columns
from unclamp.telemetry.source import Source


class Numbering:
    """Numbers the sites of what is heard.

    Args:
        sources: The ledgers that are heard.
        free: Ids that no other rank counts in.

    Attributes:
        formats: The format of each site, by its id.
    """

    def __init__(self, sources: Sequence[Source], free: Iterator[int]) -> None:
        self.formats: dict[int, Format] = {}
        self._sources, self._free = sources, free
        self._waiting: list[tuple[Source, list[Site], list[int]]] = []

    def number(self) -> list[Columns]:
        """Number sites that were added since the last call; return their rows."""
        pieces: list[Columns] = []
        for source in self._sources:
            sites, ids = source.number_new_sites(self._free)
            if sites:
                self.formats |= {i: s.operand.format for i, s in zip(ids, sites, strict=True)}
                self._waiting.append((source, sites, ids))
                pieces.append(site_columns(sites, ids, only_counted=source.only_counted()))
        return pieces

    def take(self, root: nn.Module | None) -> list[Columns]:
        """Return rows that were not taken, with what a lower rank of the model `root` has too."""
        waiting, self._waiting = self._waiting, []
        return [
            site_columns(
                sites, ids, repeated=source.repeated(root), only_counted=source.only_counted()
            )
            for source, sites, ids in waiting
        ]
