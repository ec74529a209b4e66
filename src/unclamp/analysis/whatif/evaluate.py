"""What would other policies have done to the casts of a log?

Exact, given the amaxes: scales, clamped casts, overshoot, repeated casts and reads. Estimated, of
the casts whose exponents were counted: elements clamped, clamp error and underflow. A log knows the
tensors of the training that wrote it, and not those that another policy would have led to; what
that means for an answer is said with it (`WhatIf.limits`).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from unclamp.analysis.whatif.amaxes import Chunk, chosen_sites, read_chunks
from unclamp.analysis.whatif.inspected import Inspected, read_inspected
from unclamp.analysis.whatif.limits import find_limits
from unclamp.analysis.whatif.lost import lost_of, spreads_of
from unclamp.analysis.whatif.outcome import WhatIf
from unclamp.analysis.whatif.policies import check_policies
from unclamp.analysis.whatif.recorded import recorded
from unclamp.analysis.whatif.scales import Maxima, Player
from unclamp.analysis.whatif.sums import Sums
from unclamp.errors import AnalysisError
from unclamp.formats import get_format
from unclamp.runlog import RunLog
from unclamp.scaling import Scaling

THREADS = 2
NO_CASTS = "the run has no casts: this needs the log of a training in FP8, or of an observed one"


@dataclass
class _Try:
    """One policy on its way through a log; `scale` is what inspected casts are tried with."""

    player: Player
    sums: Sums
    scale: np.ndarray


def evaluate(
    log: RunLog, policies: Sequence[Scaling], *, site: str | None = None, threads: int = THREADS
) -> WhatIf:
    """Return what each policy would have done to the casts of a log.

    Args:
        log: Of a training, or of an observed one.
        policies: Scalings with one scale a tensor; `parse_policy` and `grid` make them.
        site: A glob of products ("*.down_proj"), roles ("grad_output") or both ("0 input"); by
            default all sites.
        threads: Policies that are tried at a time.

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
    tries = [
        _Try(Player.of(policy, formats), Sums.of(len(sites)), np.zeros(len(inspected.step)))
        for policy in policies
    ]
    steps = 0
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        maxima = {w: Maxima.of(w, len(sites)) for t in tries if (w := t.player.window) is not None}
        for chunk in read_chunks(log, sites):
            _play(chunk, tries, maxima, inspected, pool)
            steps += len(np.unique(chunk.step[chunk.is_there]))
        if not steps:
            raise AnalysisError(NO_CASTS)
        spreads = spreads_of(inspected, formats)
        losses = pool.map(
            lambda t: lost_of(
                t.player.policy, t.player.settings, t.scale, inspected, formats, spreads
            ),
            tries,
        )
        outcomes = tuple(
            each.sums.outcome(each.player.policy, sites, lost)
            for each, lost in zip(tries, losses, strict=True)
        )
    limits = find_limits(log, policies, looked_at=len(inspected.step), known=inspected.known)
    return WhatIf(outcomes=outcomes, steps=steps, limits=limits, recorded=recorded(log, sites))


def _play(
    chunk: Chunk,
    tries: Sequence[_Try],
    maxima: dict[int, Maxima],
    inspected: Inspected,
    pool: ThreadPoolExecutor,
) -> None:
    """Have every policy make its scales for a chunk."""
    windows = sorted(maxima)
    taken = pool.map(lambda window: maxima[window].take(chunk), windows)
    largest = dict(zip(windows, taken, strict=True))
    rows, columns = inspected.columns(chunk)

    def play(each: _Try) -> None:
        window = each.player.window
        casts = each.player.play(chunk, None if window is None else largest[window])
        each.sums.add(chunk, casts)
        each.scale[rows] = casts.scale[inspected.place[rows], columns]

    for _ in pool.map(play, tries):
        pass


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
    maximum = None if player.window is None else Maxima.of(player.window, 1)
    parts = []
    for chunk in read_chunks(log, sites):
        casts = player.play(chunk, None if maximum is None else maximum.take(chunk))
        columns = {"step": chunk.step, "amax": chunk.amax, "scale": casts.scale}
        count = int(chunk.counts[0])
        whole = {name: np.array(values[0, :count]) for name, values in columns.items()}
        parts.append(pa.table(whole | {"clamps": casts.clamps[0, :count]}))
    return pa.concat_tables(parts) if parts else pa.table({})
