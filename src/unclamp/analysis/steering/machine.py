"""The state machine: from each update's amaxes to decisions, for all sites at once.

It knows what every rung would have done, because scales follow from amaxes alone: the ledger's
policy (`unclamp.policy`) runs here for each rung that predicts, whatever rung a site is on. One
machine steers a training and runs over its log, with the same numbers.

All of it is a function of amaxes that ranks share (and of prices, where the caller has some that
they share), in the order of sites: ranks that hold the same sites decide alike without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclamp.analysis.steering.decisions import Decision, Kind, Reason
from unclamp.analysis.steering.past import Past
from unclamp.analysis.steering.rule import MOST_RELAPSES, Rule
from unclamp.formats import Format
from unclamp.names import SiteName
from unclamp.policy import Settings, next_scales, overflows
from unclamp.rule import Operand
from unclamp.totals import clamp_error_bound

NOTHING = -1.0
"""Stands for the amax of a site that cast nothing, or saw no finite element."""
OWN_READS = 2.0
"""Reads of a cast that measures first, and what a site counts that is not cast at all."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What each rung would have done to an update's casts, `[rungs, sites]` each.

    Attributes:
        overshoot: Amax over the largest value that the rung represents; 0: it takes the tensor's
            own scale, or nothing is known yet.
        overflows: Whether its predicted scale would clamp: a guarded rung repeats the cast.
        clamp_error: The most that it may lose by clamping, a fraction; 0 on a rung that guards.
        speaks: Whether the cast speaks against the rung, by the rule.
        rung: Which rung each site's cast was made on, `[sites]`.
        is_cast: Which sites cast anything, `[sites]`.
    """

    overshoot: np.ndarray
    overflows: np.ndarray
    clamp_error: np.ndarray
    speaks: np.ndarray
    rung: np.ndarray
    is_cast: np.ndarray


class Machine:
    """Where each site stands on the ladder, and what speaks for going up or down.

    Args:
        rule: How to decide.
        sites: In an order that is the same on every rank.
        formats: Of each.
        start: The rung that each begins on, and never goes below; the lowest by default.

    Attributes:
        rung: Where each site stands, int64 `[sites]`.
    """

    def __init__(
        self,
        rule: Rule,
        sites: Sequence[SiteName],
        formats: Sequence[Format],
        *,
        start: Sequence[int] | None = None,
    ) -> None:
        self.rule, self.sites, self.formats = rule, list(sites), list(formats)
        count, rungs = len(self.sites), len(rule.ladder)
        self._start = np.zeros(count, np.int64) if start is None else np.asarray(start, np.int64)
        self.rung = self._start.copy()
        self._predicts = [r.casts and not r.takes_own for r in rule.ladder]
        self._settings = [
            Settings.of([Operand(format=fmt, scaling=rung) for fmt in self.formats])
            for rung in rule.ladder
        ]
        self._scales = np.stack([s.static.astype(np.float32) for s in self._settings])
        self._past = Past.of(count, rule.longest)
        self._of_format = [
            (fmt, np.array([i for i, each in enumerate(self.formats) if each == fmt]))
            for fmt in dict.fromkeys(self.formats)
        ]
        self._largest = np.array([fmt.max for fmt in self.formats], np.float64)
        self._of = np.array([rule.recasts_of if r.guards else rule.of for r in rule.ladder])
        self._needs = np.array([rule.recasts if r.guards else rule.casts for r in rule.ladder])
        self._spoke = np.zeros((rungs, count, int(self._of.max())), np.bool_)
        self._updates = np.zeros(count, np.int64)
        self._clean = np.zeros((rungs, count), np.int64)
        self._avoided = np.zeros(count, np.int64)
        self._relapses = np.zeros(count, np.int64)
        self._came_back = np.zeros(count, np.bool_)
        self._is_priced = np.zeros(count, np.bool_)
        self._is_held = np.zeros(count, np.bool_)

    # ---- an update -------------------------------------------------------------------------

    def step(
        self, step: int, amax: np.ndarray, *, prices: np.ndarray | None = None
    ) -> tuple[list[Decision], Tried]:
        """Take an update's amaxes; return what is decided, and what each rung would have done.

        Args:
            step: Its number, for the decisions.
            amax: Of each site, over all ranks, float32 `[sites]`; below 0 where it cast nothing or
                saw no finite element.
            prices: First-order price of each site's cast, NaN where unknown; the same on all ranks.
        """
        amax = np.asarray(amax, np.float32)
        tried = self._try(amax, prices)
        self._note(tried)
        decisions = self._go_up(step, amax, tried, prices) + self._come_back(step, amax, tried)
        self._past.push(amax, tried.is_cast)
        for rung, predicts in enumerate(self._predicts):
            if predicts:
                made = next_scales(self._past, self._settings[rung], self._scales[rung], xp=np)
                self._scales[rung] = np.where(tried.is_cast, made, self._scales[rung])
        return decisions, tried

    def _try(self, amax: np.ndarray, prices: np.ndarray | None) -> Tried:
        is_cast = amax >= 0
        over = np.zeros(self._scales.shape)
        flows = np.zeros(self._scales.shape, np.bool_)
        error = np.zeros(self._scales.shape)
        for rung, scaling in enumerate(self.rule.ladder):
            if not self._predicts[rung]:
                continue
            seen = np.where(is_cast, amax, np.float32(0))
            with np.errstate(over="ignore"):
                for fmt, own in self._of_format:
                    flows[rung, own] = overflows(seen[own], self._scales[rung, own], fmt)
            over[rung] = seen.astype(np.float64) * self._scales[rung] / self._largest
            if scaling.clamps:
                bound = clamp_error_bound(np.maximum(over[rung], 1))
                error[rung] = np.where(flows[rung], bound, 0)
        speaks = error > self.rule.tolerance
        for rung, scaling in enumerate(self.rule.ladder):
            if scaling.guards:
                speaks[rung] = flows[rung]
        if prices is not None and self.rule.price is not None:
            here = (self.rung, np.arange(len(self.rung)))
            speaks[here] |= np.nan_to_num(prices, nan=-np.inf) > self.rule.price
        return Tried(
            overshoot=over,
            overflows=flows,
            clamp_error=error,
            speaks=speaks & is_cast,
            rung=self.rung.copy(),
            is_cast=is_cast,
        )

    def _note(self, tried: Tried) -> None:
        """Count what spoke, at the sites that cast."""
        is_cast = tried.is_cast
        for rung, of in enumerate(self._of):
            place = self._updates % of
            rows = np.flatnonzero(is_cast)
            self._spoke[rung, rows, place[rows]] = tried.speaks[rung, rows]
        self._updates += is_cast
        self._clean = np.where(is_cast, np.where(tried.speaks, 0, self._clean + 1), self._clean)
        lower = np.maximum(self.rung - 1, 0)
        spoke_below = tried.speaks[lower, np.arange(len(lower))]
        self._avoided += spoke_below & (self.rung > self._start)

    def _count(self, rung: int, site: int) -> int:
        return int(self._spoke[rung, site, : self._of[rung]].sum())

    # ---- deciding --------------------------------------------------------------------------

    def _go_up(
        self, step: int, amax: np.ndarray, tried: Tried, prices: np.ndarray | None
    ) -> list[Decision]:
        everyone = np.arange(len(self.rung))
        top = len(self.rule.ladder) - 1
        speaks = tried.speaks[self.rung, everyone] & (self.rung < top)
        # The worst first, for the ceiling may not admit all; of equals the first.
        over = tried.overshoot[self.rung, everyone]
        found = [int(i) for i in np.flatnonzero(speaks)]
        found.sort(key=lambda i: (-over[i], i))
        decisions = []
        for site in found:
            rung = int(self.rung[site])
            spoke = self._count(rung, site)
            price = None if prices is None or np.isnan(prices[site]) else float(prices[site])
            by_price = self._is_by_price(price) and not (
                tried.clamp_error[rung, site] > self.rule.tolerance
            )
            if spoke < (1 if by_price else self._needs[rung]):
                continue
            reads = self.reads(moved=(site, rung + 1))
            is_held = reads > self.rule.reads and reads > self.reads()
            if is_held and self._is_held[site]:
                continue
            reason: Reason = "price" if by_price else "clamped"
            if self.rule.ladder[rung].guards and not by_price:
                reason = "repeated"
            decisions.append(
                self._decision(
                    step, site, "held" if is_held else "up", reason, rung + 1, amax, tried,
                    price=price, spoke=spoke, reads=reads,
                )
            )  # fmt: skip
            self._is_held[site] = is_held
            if not is_held:
                self._relapses[site] = min(
                    self._relapses[site] + self._came_back[site], MOST_RELAPSES
                )
                self._came_back[site] = False
                self._is_priced[site] |= by_price
                self._move(site, rung + 1)
        return decisions

    def _is_by_price(self, price: float | None) -> bool:
        return price is not None and self.rule.price is not None and price > self.rule.price

    def _come_back(self, step: int, amax: np.ndarray, tried: Tried) -> list[Decision]:
        decisions = []
        up = (self.rung > self._start) & ~self._is_priced & tried.is_cast
        for site in np.flatnonzero(up & (self.rung == tried.rung)):
            lower = int(self.rung[site]) - 1
            clean = int(self._clean[lower, site])
            if clean < self.rule.needed(lower, int(self._relapses[site])):
                continue
            reads = self.reads(moved=(int(site), lower))
            decisions.append(
                self._decision(
                    step, int(site), "down", "clean", lower, amax, tried, clean=clean, reads=reads
                )
            )
            self._came_back[site] = True
            self._is_held[site] = False
            self._move(int(site), lower)
        return decisions

    def _move(self, site: int, rung: int) -> None:
        self.rung[site] = rung
        self._avoided[site] = 0
        # What it would take to go on down is counted from here.
        self._clean[:rung, site] = 0

    def _decision(
        self,
        step: int,
        site: int,
        kind: Kind,
        reason: Reason,
        to: int,
        amax: np.ndarray,
        tried: Tried,
        **facts: Any,
    ) -> Decision:
        rung = int(self.rung[site])
        return Decision(
            step=step,
            site=self.sites[site],
            kind=kind,
            reason=reason,
            before=self.rule.ladder[rung],
            after=self.rule.ladder[to],
            amax=float(amax[site]),
            overshoot=float(tried.overshoot[rung, site]),
            clamp_error=float(tried.clamp_error[rung, site]),
            of=int(self._of[rung]),
            avoided=int(self._avoided[site]),
            **facts,
        )

    def avoided(self, site: SiteName) -> int:
        """Return what staying where it is has gained a site so far, in updates."""
        return int(self._avoided[self.sites.index(site)])

    def reads(self, moved: tuple[int, int] | None = None) -> float:
        """Return the reads a cast, meant over sites; as if one site were on another rung.

        Of a guarded rung 1 and the share of its newest casts that were repeated.
        """
        if not self.sites:
            return 1.0
        rung = self.rung
        if moved is not None:
            rung = rung.copy()
            rung[moved[0]] = moved[1]
        total = np.zeros(len(rung))
        for number, scaling in enumerate(self.rule.ladder):
            here = rung == number
            if not scaling.casts or scaling.takes_own:
                total[here] = OWN_READS
            elif scaling.guards:
                known = np.maximum(np.minimum(self._updates, self._of[number]), 1)
                total[here] = (1 + self._spoke[number].sum(1) / known)[here]
            else:
                total[here] = 1
        return float(total.mean())

    # ---- saved state -----------------------------------------------------------------------

    _SAVED = ("rung", "_scales", "_spoke", "_updates", "_clean", "_avoided", "_relapses",
              "_came_back", "_is_priced", "_is_held")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return everything that decisions depend on, as copies of arrays."""
        known = {name.lstrip("_"): getattr(self, name).copy() for name in self._SAVED}
        return known | {"amaxes": self._past.amaxes.copy(), "cursor": self._past.cursor.copy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned, of a machine with the same rule and sites.

        Raises:
            ValueError: It is another machine's.
        """
        whole = {name.lstrip("_"): getattr(self, name) for name in self._SAVED}
        whole |= {"amaxes": self._past.amaxes, "cursor": self._past.cursor}
        for name, own in whole.items():
            given = np.asarray(state[name])
            if given.shape != own.shape:
                raise ValueError(
                    f"expected the state of an autopilot with the same rule and sites: {name} has "
                    f"the shape {list(own.shape)} here, and {list(given.shape)} there"
                )
        for name, own in whole.items():
            own[...] = np.asarray(state[name])
