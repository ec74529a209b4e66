"""The ranks of a run apart: how far each overshot where others hold the same sites. Torch-free.

A rank whose data, device or code is broken is to be seen at a glance. Ranks of different modules,
the stages of a pipeline, are compared in nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from unclamp.names import shown
from unclamp.report.panels import rounded
from unclamp.runlog import Cut, RankOvershoot, RunLog
from unclamp.written import counted, listed, percent, times

LISTED_RANKS = 16
DRAWN_RANKS = 64
STANDS_OUT = 2.0
"""So many times the median of the others' overshoot."""
RANK_COLUMNS = ("rank", "largest overshoot", "at", "clamped elements", "had the largest amax")


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """A rank as a row of the table.

    Attributes:
        rank: The rank.
        overshoot: Largest amax over the largest representable value.
        worst: The site of it, as text.
        saturated: Elements that it clamped, replicated operands left out; None if not counted.
        led: Share of windows and sites in which its amax was the largest, where ranks differed.
        cells: Largest overshoot a window, None without casts; only drawn.
    """

    rank: int
    overshoot: float | None
    worst: str
    saturated: int | None
    led: float | None
    cells: list[float | None] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RanksView:
    """The ranks of a run; without rows where nothing tells them apart.

    Attributes:
        rows: Of each rank, in order.
        sentences: Which of them stand out.
    """

    rows: list[RankRow] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    @property
    def listed(self) -> list[RankRow]:
        """The rows of a table: those with the largest overshoot first."""
        return sorted(self.rows, key=lambda row: (-(row.overshoot or 0), row.rank))[:LISTED_RANKS]

    @property
    def drawn(self) -> list[RankRow]:
        """The rows of a heat map, in order of ranks: of very many those that overshot most."""
        worst = sorted(self.rows, key=lambda row: (-(row.overshoot or 0), row.rank))[:DRAWN_RANKS]
        return sorted(worst, key=lambda row: row.rank)


def read_ranks(log: RunLog, cut: Cut) -> RanksView:
    """Return the ranks of a run.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    found = log.overshoots(cut) if log.header.world_size > 1 else []
    return RanksView(rows=[_row(rank) for rank in found], sentences=_sentences(found))


def rank_row(row: RankRow) -> list[str]:
    """Return a rank as cells under `RANK_COLUMNS`."""
    return [
        str(row.rank),
        "-" if row.overshoot is None else times(row.overshoot),
        row.worst,
        "-" if row.saturated is None else f"{row.saturated:,}",
        "-" if row.led is None else percent(row.led),
    ]


def _row(found: RankOvershoot) -> RankRow:
    return RankRow(
        rank=found.rank,
        overshoot=rounded(found.overshoot),
        worst=f"{shown(found.worst.fqn)} {found.worst.role}",
        saturated=found.saturated,
        led=rounded(found.led),
        cells=[None if np.isnan(value) else rounded(float(value)) for value in found.cells],
    )


def _sentences(found: Sequence[RankOvershoot]) -> list[str]:
    """Name the ranks that clamped, and overshot far more than the others."""
    if len(found) < 2:
        return []
    usual = median(rank.overshoot for rank in found)
    if len(found) == 2:  # their median lies between them
        usual = min(rank.overshoot for rank in found)
    odd = [rank for rank in found if rank.overshoot > 1 and rank.overshoot >= STANDS_OUT * usual]
    if not odd or 2 * len(odd) > len(found):
        return []
    worst = max(odd, key=lambda rank: rank.overshoot)
    names = listed([str(rank.rank) for rank in odd], most=6)
    which = "" if len(odd) == 1 else f"rank {worst.rank}, "
    who = f"Rank {names} stands" if len(odd) == 1 else f"Ranks {names} stand"
    return [
        f"{who} out of {counted(len(found), 'rank')}: an overshoot of up to "
        f"{times(worst.overshoot)} ({which}{shown(worst.worst.fqn)} {worst.worst.role}), where "
        f"{'the other has' if len(found) == 2 else 'the median rank has'} {times(usual)}."
    ]
