"""The same steps again from a snapshot, with another scaling at chosen sites.

A replay starts from the snapshot's state, gives the sites their scalings, and does the same
steps on the same batches. Without a change the losses must come back bit for bit.

*Un-clamped* is the smallest change that ends clamping: a delayed site becomes the guarded one
with the same history, margin and rounding, whose casts are those of the delayed one, bit for bit,
wherever that would not clamp. A static site has no such twin and becomes dynamic.

On several ranks all do the same replays. A trace is the same on each: its losses are means over
the ranks, and what was clamped is added up over them.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from unclamp.errors import ReplayError
from unclamp.explain.facts import scalings_of, sites_of
from unclamp.explain.ranks import ALONE, Ranks
from unclamp.explain.shards import like_parameter
from unclamp.explain.snapshot import Snapshot
from unclamp.explain.training import Step, Training, keeping_random_state, put_state
from unclamp.explain.watch import loss_number
from unclamp.names import SiteName
from unclamp.nn import Ledger
from unclamp.nn.update import Update
from unclamp.numerics import Stat, empty_stats, merge_stats
from unclamp.policy import overflows
from unclamp.scaling import Scaling
from unclamp.totals import clamp_error, overshoot

PLACEBO = 2.0**-12
"""Relative change of every weight in a placebo: too small to mean anything, and large enough to
reach codes. One unit in the last place mostly vanishes in the casts of the weights."""


@dataclass(frozen=True, kw_only=True)
class SiteCount:
    """What a site's casts did in the steps of a replay.

    Attributes:
        saturated: Elements clamped.
        would_clamp: Casts that were repeated so as not to clamp, or had no need to.
        clamp_error: Squares removed by clamping over the squares of the tensor, summed over steps.
        overshoot: Largest amax over the largest representable value.
    """

    saturated: int = 0
    would_clamp: int = 0
    clamp_error: float = 0.0
    overshoot: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A replay: the loss of each step, and what was clamped or lost.

    Attributes:
        losses: By step.
        sites: Sites that clamped, or would have.
        underflowed: Non-zero elements that became zero.
        elements: Elements cast.
        seconds: Duration.
        underflow: Share of a site's elements that underflowed, in the step with the largest; only
            sites with any.
        own: This rank's losses by step; empty where it is alone.
        clamped_on: The ranks on which a site clamped, where there are several.
        unequal: Sites whose amaxes were not the same on all ranks.
    """

    losses: Mapping[int, float]
    sites: Mapping[SiteName, SiteCount]
    underflowed: int
    elements: int
    seconds: float
    underflow: Mapping[SiteName, float] = field(default_factory=dict)
    own: Mapping[int, float] = field(default_factory=dict)
    clamped_on: Mapping[SiteName, tuple[int, ...]] = field(default_factory=dict)
    unequal: frozenset[SiteName] = frozenset()


class Replay:
    """Replays steps from one snapshot, in a training that it takes over.

    Sites that are only counted are none of a replay: nothing is computed from their casts, so
    that no other scaling of theirs could change a loss.

    Args:
        training: Made by the build function; its state is replaced again and again.
        step: The step function.
        snapshot: Where to start.
        ranks: Who replays with this process, each from its own part of the snapshot.

    Raises:
        ReplayError: The training does not fit the snapshot.
    """

    def __init__(
        self, training: Training, step: Step, snapshot: Snapshot, *, ranks: Ranks = ALONE
    ) -> None:
        self.training, self.snapshot, self.ranks = training, snapshot, ranks
        self._step, self._doing = step, "a replay"
        self.sites = {
            key: place
            for key, place in sites_of(training.model).items()
            if place.row not in place.ledger.only_counted
        }
        self._ledgers = list(dict.fromkeys(place.ledger for place in self.sites.values()))
        self._before = {key: self.scaling_of(key) for key in self.sites}
        self._before |= scalings_of(snapshot.facts)

    def scaling_of(self, key: SiteName) -> Scaling:
        """Return the scaling of a site as it stands."""
        return self.sites[key].operand.scaling

    def original(self, key: SiteName) -> Scaling:
        """Return the scaling of a site in the run."""
        return self._before[key]

    def run(
        self,
        changes: Mapping[SiteName, Scaling],
        *,
        last: int,
        perturb: int | None = None,
        own_scales: bool = False,
        watching: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Trace:
        """Replay the steps up to `last`, with these sites scaled otherwise.

        Args:
            changes: Scalings by site; the others are scaled as they were.
            last: The last step.
            perturb: Seed of a change of every weight by a 4096th, up or down.
            own_scales: Whether each rank takes scales from its own amaxes alone.
            watching: A context for the time of the steps.

        Raises:
            ReplayError: A batch is missing, or the step function returns no loss.
            RankFailed: Something failed on this rank and not on all alike.
        """
        self._doing = "a replay"
        try:
            return self._run(changes, last, perturb, own_scales, watching)
        except Exception as error:
            told = self.ranks.failed(error, self._doing)
            if told is error:
                raise
            raise told from error

    def _run(
        self,
        changes: Mapping[SiteName, Scaling],
        last: int,
        perturb: int | None,
        own_scales: bool,
        watching: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> Trace:
        snapshot = self.snapshot
        steps = range(snapshot.step, last + 1)
        missing = [n for n in steps if n not in snapshot.batches]
        if missing:
            raise ReplayError(
                f"the snapshot before step {snapshot.step} lacks the batch of step {missing[0]}: "
                "keep more steps after a spike, Snapshots(..., after=...), in the next run"
            )
        began = time.perf_counter()
        losses: dict[int, float] = {}
        with (
            keeping_random_state(),
            _threads(snapshot.facts.get("threads")),
            self._alone() if own_scales else contextlib.nullcontext(),
            self._counts() as seen,
        ):
            self._switch({**self._before, **changes})
            put_state(self.training, snapshot.state)
            if perturb is not None:
                self._perturb(perturb)
            with watching():
                for n in steps:
                    self._doing = f"step {n} of a replay"
                    losses[n] = loss_number(self._step(self.training, snapshot.batches[n].fresh()))
                    for one in seen.values():
                        one.end_step()
        return self._trace(losses, seen, time.perf_counter() - began)

    def undo(self) -> None:
        """Scale the training's sites as they were, so that another replay may take it over."""
        self._switch(self._before)

    def _switch(self, wanted: Mapping[SiteName, Scaling]) -> None:
        for ledger in self._ledgers:
            changes = {
                index: wanted[key]
                for key, (owner, index) in self.sites.items()
                if owner is ledger and self.scaling_of(key) != wanted[key]
            }
            if changes:
                ledger.switch(changes)

    @torch.no_grad()
    def _perturb(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.training.model.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(like_parameter(1 + PLACEBO * signs, parameter))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Have ledgers agree with no other rank in this context."""
        for ledger in self._ledgers:
            ledger.shared.is_off = True
        try:
            yield
        finally:
            for ledger in self._ledgers:
                ledger.shared.is_off = False

    # ---- counting --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _counts(self) -> Iterator["dict[Ledger, _Seen]"]:
        seen = {ledger: _Seen(ledger) for ledger in self._ledgers}
        ends = [ledger.subscribe(one.hear) for ledger, one in seen.items()]
        try:
            yield seen
        finally:
            for end in ends:
                end()

    def _trace(
        self, losses: dict[int, float], seen: "dict[Ledger, _Seen]", seconds: float
    ) -> Trace:
        ranks = self.ranks
        own = {ledger: torch.stack(one.steps).cpu() for ledger, one in seen.items()}
        tables = {ledger: ranks.merged(table) for ledger, table in own.items()}
        sites: dict[SiteName, SiteCount] = {}
        underflow: dict[SiteName, float] = {}
        for key, (ledger, index) in self.sites.items():
            rows = tables[ledger][:, index]
            count = self._count(key, rows)
            if count.saturated or count.would_clamp:
                sites[key] = count
            lost = float((rows[:, Stat.UNDERFLOWED] / rows[:, Stat.ELEMENTS].clamp(min=1)).max())
            if lost > 0:
                underflow[key] = lost
        rows = [
            table[:, [index for one, index in self.sites.values() if one is ledger]]
            for ledger, table in tables.items()
        ]
        clamped_on, unequal = self._by_rank(own)
        return Trace(
            losses=ranks.mean(losses),
            sites=sites,
            underflowed=int(sum(t[..., Stat.UNDERFLOWED].sum() for t in rows)),
            elements=int(sum(t[..., Stat.ELEMENTS].sum() for t in rows)),
            seconds=max(ranks.gathered(seconds)),
            underflow=underflow,
            own=losses if ranks.are_several else {},
            clamped_on=clamped_on,
            unequal=unequal,
        )

    def _by_rank(
        self, own: Mapping[Ledger, torch.Tensor]
    ) -> tuple[dict[SiteName, tuple[int, ...]], frozenset[SiteName]]:
        """Return on which ranks sites clamped, and whose amaxes differed between ranks."""
        if not self.ranks.are_several:
            return {}, frozenset()
        differs = {
            ledger: self.ranks.unequal(table[..., Stat.AMAX]).any(0)
            for ledger, table in own.items()
        }
        clamped = [
            key
            for key, (ledger, index) in self.sites.items()
            if own[ledger][:, index, Stat.SATURATED].sum() > 0
        ]
        on: dict[SiteName, tuple[int, ...]] = {}
        for rank, keys in enumerate(self.ranks.gathered(clamped)):
            for key in keys:
                on[key] = (*on.get(key, ()), rank)
        unequal = frozenset(k for k, (one, index) in self.sites.items() if differs[one][index])
        return on, unequal

    def _count(self, key: SiteName, rows: torch.Tensor) -> SiteCount:
        fmt, before = self.sites[key].operand.format, self._before[key]
        amax = rows[:, Stat.AMAX]
        would = rows[:, Stat.RECAST].sum() if before.clamps else torch.tensor(0.0)
        if before.fixed_scale is not None:
            would = overflows(amax.to(torch.float32), before.fixed_scale, fmt).sum()
        square = rows[:, Stat.SQUARE]
        error = clamp_error(rows[:, Stat.SATURATED_SQUARE], square)
        peak = overshoot(amax / rows[:, Stat.SCALE_INV], fmt.max)
        return SiteCount(
            saturated=int(rows[:, Stat.SATURATED].sum()),
            would_clamp=int(would),
            clamp_error=float(error.sum()),
            overshoot=float(peak.nan_to_num(0, 0, 0).max()),
        )


class _Seen:
    """What a ledger's updates said: merged into one table a step, `[sites, statistics]`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._updates: list[torch.Tensor] = []
        self.steps: list[torch.Tensor] = []

    def hear(self, update: Update) -> None:
        self._updates.append(update.stats)

    def end_step(self) -> None:
        # A step may have no update, or several with several optimizers.
        total = empty_stats(len(self._ledger.sites), self._ledger.pending.device)
        for stats in self._updates:
            merge_stats(total, stats)
        self._updates.clear()
        self.steps.append(total)


def same_losses(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Whether the losses of the steps that both have are equal bit for bit; NaN equals NaN."""
    shared = set(one) & set(other)
    return all(one[n] == other[n] or (math.isnan(one[n]) and math.isnan(other[n])) for n in shared)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with the run's number of threads, which decides the order of sums."""
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
