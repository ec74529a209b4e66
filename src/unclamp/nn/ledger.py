"""Who owns amax histories and scales, and how an update changes them.

One ledger serves a whole model. Its tensors have a row a scale, and a row a site (one operand of
one layer), so an update is a handful of kernels whatever the model's size:

    ring        [scales, longest history]  float32, 0 where nothing was measured (`nn.ring`)
    scale       [scales]                   float32, 0 until a first non-zero amax is known
    block_amax  [scales]                   float32, amax of each block since the last update
    pending     [sites, len(Stat)]         float64, statistics since the last update

`nn.layout` says which row belongs to which site, `unclamp.policy` which scale follows from a
history, `nn.clock` when there is an update, and `nn.turns` for which products.

Casts *commit* their statistics to `pending`. An update folds the pending amaxes into the
histories and makes the next scales. If nothing is pending, which the version of the tensor
`pending` shows, it does nothing. Under gradient accumulation the maximum over the microsteps
enters the history once.

A cast commits when its *backward* runs (`unclamp.nn.product`). That alone gives the counts their
meaning: an evaluation forward commits nothing, and under activation checkpointing, where the
forward runs twice, the backward runs once.

A CUDA graph replays kernels and no Python. An update that is captured runs at every replay, counts
itself on the device, and leaves its statistics where `replayed` finds them; once a commit was
captured, every optimizer step outside of the graph updates, pending or not: the host cannot know.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.covered import CoverageReport
from unclamp.names import ROLES, SiteName
from unclamp.nn.alive import Alive
from unclamp.nn.averaged import is_average, is_fraction
from unclamp.nn.captured import Captured
from unclamp.nn.clock import Clock, follow_optimizers
from unclamp.nn.evaluated import Evaluated, Stepping, Steps
from unclamp.nn.layout import Layout, Site
from unclamp.nn.loading import Loading
from unclamp.nn.ring import Ring
from unclamp.nn.rows import Rows
from unclamp.nn.shared import Shared
from unclamp.nn.turns import FRESH, NOTHING, Turn, Turns, clear, taken
from unclamp.nn.uncollected import uncollected
from unclamp.nn.update import Asked, Bound, Inspection, Told, Update
from unclamp.numerics import Stat, empty_details, empty_stats
from unclamp.numerics.gpu import is_capturing
from unclamp.policy import next_scales
from unclamp.recipe import Recipe
from unclamp.scaling import Scaling


class Ledger(Rows, Stepping, Told):
    """Amax histories, scales and pending statistics of a model's sites.

    Invariants: sites stay in the order they were added; tensors are only written in place, so a
    view of a row stays valid until the layout changes (sites added, longer histories, another
    device), and then every layer takes its views anew; none of the tensors is a parameter or a
    buffer, so optimizers, gradient clipping, weight decay and dtype conversions never see them.

    Attributes:
        evaluated: What casts of evaluations saw, and how old the scales of a copy are.
        layers: The layers that have views of the tensors.
        clock: When it updates.
        turns: Which products its updates are for.
        gone: Sites whose modules are no longer in the model, when it was last looked at.
        shared: With whom updates agree on the newest amaxes, and on whether to update.
        unmatched: Rules and skip globs that decided nothing in the conversion, and why.
        kept: Layers that another recipe than the last one made.
        coverage: What share of a step's FLOPs the last conversion covers, where it was asked.
        is_apart: Whether no state_dict holds any of it; `ScalingState` does.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.recipe: Recipe | None = None
        self.unmatched: dict[str, str] = {}
        self.kept: list[str] = []
        self.coverage: CoverageReport | None = None
        self.steps, self.evaluated = Steps(), Evaluated()
        self.layers: Alive[Bound] = Alive()
        self.clock, self.turns = Clock(model), Turns()
        self.observes = self.is_apart = False
        self.inspection: Inspection = "never"
        self.shared = Shared()
        self.gone: frozenset[int] = frozenset()
        self.details: Tensor | None = None
        self.loading = Loading()
        self._asked = Asked()
        Told.__init__(self)
        self._allocate(Layout.of([], device=torch.device("cpu")))
        follow_optimizers(self)

    @property
    def only_counted(self) -> frozenset[int]:
        """The sites from whose casts nothing is computed, beside others in FP8."""
        own = [] if self.observes else [each for each in self.layers if each.only_observed]
        return frozenset(each.number * len(ROLES) + i for each in own for i in range(len(ROLES)))

    @property
    def is_in_state_dicts(self) -> bool:
        """Whether a state_dict holds scaling state: not where it is apart, or observes."""
        return not (self.observes or self.is_apart)

    # ---- layout ----------------------------------------------------------------------------

    def add(self, sites: list[Site]) -> list[int]:
        """Add sites with nothing measured yet; return their indices."""
        first = len(self.sites)
        self.lay_out([*self.sites, *sites])
        return list(range(first, len(self.sites)))

    def move_to(self, device: torch.device) -> None:
        """Move the state to a device; dtypes stay.

        A model on the meta device has its state elsewhere: meta tensors could not move back.
        """
        if device != self.scale.device and device.type != "meta":
            self.lay_out(self.sites, device=device)

    @torch.no_grad()
    def lay_out(self, sites: list[Site], *, device: torch.device | None = None) -> None:
        """Give these sites rows; those that are here keep what they know if it still fits."""
        old, ring, scale, block_amax = self.layout, self.ring, self.scale, self.block_amax
        pending, was_pending, self.updates = self.pending, self.has_pending, self.count()
        self._allocate(Layout.of(sites, device=device or scale.device, remembered=old.remembered))
        fits = [i for i, site in enumerate(old.sites) if site.scales == sites[i].scales]
        here, there = self.layout.numbers_of(fits), old.numbers_of(fits)
        self.pending[: len(pending)] = pending.to(self.pending.device)
        self.ring.write(here, ring.newest(there, old.longest))
        self.scale[here] = scale[there].to(self.scale.device)
        self.block_amax[here] = block_amax[there].to(self.scale.device)
        self._mark(pending=was_pending)
        self.rebind()

    @torch.inference_mode(False)  # its tensors have no version, and could not train
    def _allocate(self, layout: Layout) -> None:
        device, rows = layout.site_of_row.device, layout.rows
        self.layout = layout
        self.ring = Ring(rows, layout.longest, device)
        self.scale = layout.settings.static.clone()  # 0 where it is not static
        self.block_amax = torch.full((rows,), -1.0, dtype=torch.float32, device=device)
        self._nothing_pending = empty_stats(len(layout.sites), device)
        self.pending = self._nothing_pending.clone()
        if self.details is not None:
            self._allocate_details()
        self.captured = Captured(device)  # a graph of other tensors is of no use any more
        self.turns.lay_out(len(layout.sites), device)
        self.evaluated.lay_out(len(layout.sites), device)
        self._mark(pending=False)

    @torch.inference_mode(False)
    def _allocate_details(self) -> None:
        self.details = empty_details(len(self.sites), self.scale.device)
        self._details_version = self.details._version

    def rebind(self) -> None:
        """Have every layer take its plan and its views anew."""
        with uncollected():
            for layer in self.layers:
                layer.bind()

    def rename(self, names: Mapping[int, SiteName]) -> None:
        """Name sites as a model's modules are named now; those of modules that are gone stay.

        A layer's name is its place in a model, and models are copied, wrapped, pruned and put into
        others.
        """
        for index, name in names.items():
            if self.sites[index].name != name:
                self.sites[index] = replace(self.sites[index], name=name)
        self.gone = frozenset(range(len(self.sites))) - names.keys()

    # ---- a step ----------------------------------------------------------------------------

    @property
    def is_fresh(self) -> bool:
        """Whether anything was committed since the last update. Needs no look at the device."""
        return self.pending._version != self._clean_version

    @property
    def has_pending(self) -> bool:
        """Whether anything was committed that no update has taken, as far as the host knows."""
        return self.is_fresh or bool(self.turns.left)

    def _mark(self, *, pending: bool) -> None:
        self._clean_version = self.pending._version - int(pending)

    @property
    def is_due(self) -> bool:
        """Whether a step is to update: something is pending, here, in a graph, or on some rank."""
        return self.shared.look(self) or self.has_pending or self.captured.is_in_graph

    @property
    def is_warming(self) -> bool:
        """Whether casts are only counted: in the recipe's warm-up, and where they are observed."""
        is_early = self.recipe is not None and self.updates < self.recipe.warmup_steps
        return self.observes or is_early

    @torch.no_grad()
    def update(
        self, turn: Turn = None, *, captured: bool | None = None, skipped: bool = False
    ) -> None:
        """Fold the pending amaxes into histories and scales, tell listeners, start afresh.

        Of a `turn` of products only theirs; what the others' casts saw stays pending. Where it is
        `captured` in a CUDA graph (by default it looks), listeners are told by `replayed`.

        Numerics: a site that cast nothing, or saw no finite element, keeps its history and
        scale. An amax of 0 enters the history; a window of zeros keeps the scale. Where a
        reduce function gives NaN or Inf the scale is kept too.
        """
        captured = is_capturing() if captured is None else captured
        pending = self.turns.pending(turn, is_fresh=self.is_fresh or self.captured.is_in_graph)
        newest = self.layout.newest(self.pending[:, Stat.AMAX], self.block_amax)
        if self.shared.parts:
            if skipped:
                newest, pending = torch.full_like(newest, -1), NOTHING
            newest, pending, turn = self.shared.agree(
                self, newest, pending, turn, captured=captured
            )
            if pending == NOTHING:
                return
        newest = self._of_turn(newest, turn)
        is_fresh = pending == FRESH
        turn = self.turns.narrowed(turn, is_fresh=is_fresh)
        if turn is not None and not turn:
            return
        sites = self.turns.chosen(turn)  # and which rows; None: all
        rows = None if sites is None else sites[self.layout.site_of_row]
        stats = taken(self.pending, sites, self._nothing_pending)
        details, age = self._take_details(sites)
        self.shared.tell_alone(self)
        counts = self.turns.is_next_step(turn, self.clock.is_a_step)
        if captured:
            self.captured.keep(turn, (stats.clone(), details, age, newest), counts=counts)
        for listener in [] if captured else self._listeners:
            look = None if details is None else details.clone()
            listener(Update(stats.clone(), look, age, newest))
        measured = newest >= 0
        self.ring.push(newest, measured)
        scale = next_scales(self.ring, self.layout.settings, self.scale, xp=torch)
        self.scale.copy_(torch.where(measured, scale, self.scale))
        clear(self.block_amax, rows, -1)
        clear(self.pending, sites, self._nothing_pending)
        self._mark(pending=False)
        self.turns.note(turn, is_fresh=is_fresh)
        if counts and not captured:
            self._count(self.updates + 1)
        self.evaluated.trained(turn)
        self.loading.clear()

    def _of_turn(self, newest: Tensor, turn: Turn) -> Tensor:
        """Return each row's newest amax, -1 for products of another turn."""
        sites = self.turns.chosen(turn)
        return newest if sites is None else torch.where(sites[self.layout.site_of_row], newest, -1)

    def replayed(self) -> None:
        """Tell listeners what the last replay of captured updates saw; once after each replay.

        `Recorder.step` does it. Without a captured update it does nothing.
        """
        for stats, *others in self.captured.seen() if self._listeners else []:
            assert stats is not None
            for listener in self._listeners:
                listener(Update(stats.clone(), *others))

    def count(self) -> int:
        """Return the number of updates; waits for the device if some are replayed."""
        return self.updates + self.captured.count()

    def _take_details(self, sites: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the closer looks since the last update at some sites, and start afresh there."""
        if self.details is None or self.details._version == self._details_version:
            return None, None
        details = taken(self.details, sites, torch.zeros_like(self.details)).clone()
        clear(self.details, sites, 0)
        if sites is None:  # else the rest may hold some
            self._details_version = self.details._version
        return details, self.layout.scale_age(self.ring, self.scale)

    def inspect(self, inspection: Inspection, *, by: object = None) -> None:
        """Have casts from now on get a closer look, or none; costs a pass over each tensor.

        Of several who ask, each named by `by`, the one who wants most decides.
        """
        inspection = self._asked.note(inspection, by)
        if inspection == self.inspection:
            return
        self.inspection = inspection
        if self.details is None:
            self._allocate_details()
            self.rebind()
        for layer in self.layers:
            layer.inspection = inspection

    def _count(self, updates: int) -> None:
        was_warming, self.updates = self.is_warming, updates
        if was_warming != self.is_warming:
            self.rebind()

    # ---- switching -------------------------------------------------------------------------

    @torch.no_grad()
    def switch(self, scalings: Mapping[int, Scaling]) -> None:
        """Give sites another scaling, from the next cast on; histories go on.

        The scale follows at once from the history under the new scaling. A site whose scales
        are no longer the same blocks starts a new history.
        """
        before = {index: self.sites[index].operand.scaling for index in scalings}
        sites = list(self.sites)
        for index, scaling in scalings.items():
            sites[index] = sites[index].switched(scaling)
        fits = all(
            site.scales == old.scales and site.history_len <= self.ring.length
            for site, old in zip(sites, self.sites, strict=True)
        )
        if fits:
            self.layout = Layout.of(
                sites, device=self.scale.device, remembered=self.layout.remembered
            )
        else:
            self.lay_out(sites)
        for index, old in before.items():
            if old.fixed_scale is not None:
                self.scale[self.layout.rows_of(index)] = 0
        self.rescale(before)
        changed = {self.sites[index].fqn for index in scalings}
        for layer in self.layers:
            if layer.fqn in changed:
                layer.bind()
        switched = {index: (old, scalings[index]) for index, old in before.items()}
        for listener in self._switch_listeners:
            listener(switched)

    # ---- saved state -----------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, index: int, history: Tensor | None, scale: Tensor | None) -> None:
        """Set a site's state; None for both forgets it, and the next tensor seeds the scale.

        A history of another length keeps its newest entries. The scale follows from the history
        under the site's own format, margin and reduction, which may differ from those that saved
        it; the saved one serves only where the history says nothing. State of other blocks (saved
        under another granularity) is forgotten. A scale alone leaves the history. Pending
        statistics belong to the state that is replaced and go with it.
        """
        was_pending = self.has_pending
        self.pending[index] = self._nothing_pending[index]
        self.set_state(index, history, scale)
        if history is not None and scale is not None and self.sites[index].is_delayed:
            made = self.scale[self.layout.rows_of(index)]
            if scale.numel() == len(made) and history.numel() % len(made) == 0:
                saved, past = scale.reshape(-1), history.reshape(len(made), -1)
                self.evaluated.doubt(index // len(ROLES), is_average(saved, past, made))
        self._mark(pending=was_pending)
        self.shared.is_loaded = True

    def restored(self, product: int, updates: float | None) -> None:
        """Note of how many updates the state is that was loaded of a product; None: it has none.

        They are the ledger's, and decide about its warm-up: they are set when, with no update in
        between, all products were loaded that have a state, to the fewest. What is loaded of a
        part leaves them. A fraction says that the state is an average.
        """
        self.loading.updates_came(product, updates)
        self.evaluated.doubt(product, updates is not None and is_fraction(updates))
        products = self.clock.products(self)
        if len(self.loading.updates) < sum(layer.is_saved for layer in self.layers):
            return
        # Adapters' layers are in no state_dict; where all are such, they are all that counts.
        every = {layer.number for layer in self.layers}
        saved = {layer.number for layer in self.layers if layer.is_saved} or every
        fewest = self.loading.agreed_updates(frozenset(saved & {p.number for p in products}))
        if fewest is not None:
            self.restore_updates(fewest)

    def restore_updates(self, updates: float) -> None:
        """Set how many updates there were, for the warm-up."""
        self.captured.forget_count()
        self.shared.is_loaded = True
        self._count(round(updates))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ledger":
        twin = Ledger(memo.get(id(self.clock.model)))
        memo[id(self)] = twin
        twin.recipe, twin.updates, twin.observes = self.recipe, self.count(), self.observes
        twin.evaluated.copied_from(self.steps, self.evaluated)
        twin.unmatched, twin.kept = dict(self.unmatched), list(self.kept)
        twin.coverage, twin.is_apart = self.coverage, self.is_apart
        twin._allocate(
            Layout.of(list(self.sites), device=self.scale.device, remembered=self.layout.remembered)
        )
        with torch.inference_mode(False):  # else nobody could write into it later
            twin.ring = copy.deepcopy(self.ring)
        twin.scale.copy_(self.scale)  # and nothing pending, as no gradient is copied either
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_listeners": [], "_switch_listeners": [], "shared": Shared()}
        # Closer looks are asked for by those who listen.
        state |= {"inspection": "never", "_asked": Asked(), "details": None}
        state["evaluated"] = self.evaluated.pickled(self.count())
        for name in ("layers", "clock", "turns", "loading"):
            del state[name]
        return {**state, "_clean_version": self.has_pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Ledger.__init__(self)  # what an older pickle does not know is as in a new ledger
        self.__dict__.update(state)
        self.updates = self.__dict__.pop("updates", self.updates)  # where older ones had them
        self.turns.lay_out(len(self.sites), self.scale.device)
        self.evaluated.lay_out(len(self.sites), self.scale.device)
        self._mark(pending=state["_clean_version"])
