"""What would other policies have done to the casts of a log?

Exact, given the amaxes: scales, clamped casts, overshoot, repeated casts and reads. Estimated, of
the casts whose exponents were counted: elements clamped, clamp error and underflow. A log knows the
tensors of the training that wrote it, and not those that another policy would have led to; what
that means for an answer is said with it (`WhatIf.limits`).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pyarrow as pa

from unclamp.analysis.whatif.amaxes import CHUNK_ROWS, Chunk, chosen_sites, read_chunks, steps_of
from unclamp.analysis.whatif.inspected import Inspected, read_inspected
from unclamp.analysis.whatif.limits import find_limits
from unclamp.analysis.whatif.lost import lost_of, spreads_of
from unclamp.analysis.whatif.outcome import WhatIf
from unclamp.analysis.whatif.policies import check_policies
from unclamp.analysis.whatif.recorded import recorded
from unclamp.analysis.whatif.scales import Player, Windows
from unclamp.analysis.whatif.sums import Sums
from unclamp.errors import AnalysisError
from unclamp.formats import Format, get_format
from unclamp.runlog import RunLog
from unclamp.scaling import Scaling

THREADS = 2
NO_CASTS = "the run has no casts: this needs the log of a training in FP8, or of an observed one"


BLOCK_CELLS = 1 << 16
"""Casts of a block of sites that are worked on at a time: arrays of them stay in a core's cache."""


@dataclass
class _Block:
    """Some sites, and every policy on its way through their casts.

    Attributes:
        sites: Which.
        players: The policies.
        sums: What they come to.
        windows: Of the windows that they look back on.
    """

    sites: slice
    players: list[Player]
    sums: list[Sums]
    windows: Windows

    @classmethod
    def of(cls, sites: slice, policies: Sequence[Scaling], formats: Sequence[Format]) -> "_Block":
        """Return it before any cast."""
        formats = formats[sites]
        players = [Player.of(policy, formats) for policy in policies]
        lengths = [player.window for player in players if player.window is not None]
        return cls(
            sites=sites,
            players=players,
            sums=[Sums.of(len(formats)) for _ in players],
            windows=Windows.of(lengths, len(formats)),
        )

    def play(self, chunk: Chunk, look: "_Look") -> None:
        """Have every policy make its scales for the casts of these sites."""
        chunk = chunk.of_sites(self.sites)
        largest = self.windows.take(chunk)
        place = look.inspected.place[look.rows] - self.sites.start
        mine = (place >= 0) & (place < len(chunk.counts))
        rows, place, columns = look.rows[mine], place[mine], look.columns[mine]
        for number, player in enumerate(self.players):
            casts = player.play(chunk, None if player.window is None else largest[player.window])
            self.sums[number].add(chunk, casts)
            look.scales[number, rows] = casts.scale[place, columns]


@dataclass(frozen=True)
class _Look:
    """Which inspected casts lie in a chunk, and where each policy's scales for them are kept."""

    inspected: Inspected
    rows: np.ndarray
    columns: np.ndarray
    scales: np.ndarray


def evaluate(
    log: RunLog, policies: Sequence[Scaling], *, site: str | None = None, threads: int = THREADS
) -> WhatIf:
    """Return what each policy would have done to the casts of a log.

    Args:
        log: Of a training, or of an observed one.
        policies: Scalings with one scale a tensor; `parse_policy` and `grid` make them.
        site: A glob of products ("*.down_proj"), roles ("grad_output") or both ("0 input"); by
            default all sites.
        threads: Blocks of sites that are worked on at a time.

    Raises:
        AnalysisError: There are no casts, no policies, or no such site.
        RecipeError: A policy of which a log's amaxes say nothing.
    """
    if not policies:
        raise AnalysisError("expected at least one policy, such as parse_policy('guarded')")
    check_policies(policies)
    sites = chosen_sites(log, site)
    if not sites:
        raise AnalysisError(NO_CASTS)
    formats = [get_format(each.format) for each in sites]
    inspected = read_inspected(log, sites)
    scales = np.zeros((len(policies), len(inspected.step)), np.float32)
    blocks = _blocks(policies, formats, steps=len(steps_of(log)))
    casts, elements, steps = np.zeros(len(sites), np.int64), np.zeros(len(sites), np.int64), 0
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for chunk in read_chunks(log, sites):
            look = _Look(inspected, *inspected.columns(chunk), scales)
            for _ in pool.map(_Block.play, blocks, repeat(chunk), repeat(look)):
                pass
            casts += chunk.counts
            elements += chunk.elements.sum(1)
            steps += _different(chunk)
        if not steps:
            raise AnalysisError(NO_CASTS)
        spreads = spreads_of(inspected, formats)
        settings = [Player.of(policy, formats).settings for policy in policies]
        losses = pool.map(
            lambda i: lost_of(policies[i], settings[i], scales[i], inspected, formats, spreads),
            range(len(policies)),
        )
        outcomes = tuple(
            Sums.joined([block.sums[i] for block in blocks]).outcome(
                policies[i], sites, casts=casts, elements=elements, lost=lost
            )
            for i, lost in enumerate(losses)
        )
    limits = find_limits(log, policies, looked_at=len(inspected.step), known=inspected.known)
    return WhatIf(outcomes=outcomes, steps=steps, limits=limits, recorded=recorded(log, sites))


def _different(chunk: Chunk) -> int:
    """Return how many steps a chunk has."""
    if not chunk.step.strides[0]:  # each site has the same
        return chunk.step.shape[1]
    return len(np.unique(chunk.step[chunk.is_there]))


def _blocks(policies: Sequence[Scaling], formats: Sequence[Format], *, steps: int) -> list[_Block]:
    """Return blocks of neighbouring sites, each small enough for a core's cache."""
    casts_a_site = max(min(CHUNK_ROWS // len(formats), steps), 1)
    width = max(BLOCK_CELLS // casts_a_site, 1)
    return [
        _Block.of(slice(first, first + width), policies, formats)
        for first in range(0, len(formats), width)
    ]


def trace(log: RunLog, policy: Scaling, *, site: str) -> pa.Table:
    """Return what a policy does to each cast of one site, in the order of steps.

    Columns: `step`, `amax`, `scale` (what the cast is tried with, float32; 0: the tensor's own, as
    nothing was known yet, or always), `clamps` (whether that scale clamps the largest element).

    Raises:
        AnalysisError: No site, or several, match.
        RecipeError: As `evaluate`.
    """
    check_policies([policy])
    sites = chosen_sites(log, site)
    if len(sites) != 1:
        names = ", ".join(f"{each.fqn} {each.role}" for each in sites[:5])
        raise AnalysisError(f"expected a glob of one site, {site!r} matches {names}, ...")
    player = Player.of(policy, [get_format(sites[0].format)])
    windows = Windows.of([] if player.window is None else [player.window], 1)
    parts = []
    for chunk in read_chunks(log, sites):
        largest = windows.take(chunk)
        casts = player.play(chunk, None if player.window is None else largest[player.window])
        columns = {"step": chunk.step, "amax": chunk.amax, "scale": casts.scale}
        count = int(chunk.counts[0])
        whole = {name: np.array(values[0, :count]) for name, values in columns.items()}
        parts.append(pa.table(whole | {"clamps": casts.clamps[0, :count]}))
    return pa.concat_tables(parts) if parts else pa.table({})
