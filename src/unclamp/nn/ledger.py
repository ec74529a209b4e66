"""Who owns amax histories and scales, and when they change.

One ledger serves a whole model. Its tensors have a row a scale, and a row a site (one operand of
one layer), so an update is a handful of kernels whatever the model's size:

    amax_history  [scales, longest history]  float32, newest first, 0 where nothing was measured
    scale         [scales]                   float32, 0 until a first non-zero amax is known
    block_amax    [scales]                   float32, amax of each block since the last update
    pending       [sites, len(Stat)]         float64, statistics since the last update

A site has one scale with a history, that of its tensor's amax; only a weight whose rows or blocks
have delayed or guarded scales has one a block. A site keeps its history whatever its scaling, as
long as its blocks stay the same, so that switching to another and back loses nothing.

Casts *commit* their statistics to `pending`. An update folds the pending amaxes into the
history and makes the next scales. It runs right after `optimizer.step()`, through torch's
optimizer hook, for every optimizer that holds a parameter of the model: there is no call for a
user to forget. An update with nothing pending (the version of `pending` tells) does nothing, so
two optimizers on one model still make one update a step, and under gradient accumulation the
maximum over the microsteps enters the history once.

A cast commits when its *backward* runs (`unclamp.nn.linear`). That alone gives the counts their
meaning: an evaluation forward commits nothing, and under activation checkpointing, where the
forward runs twice, the backward runs once.

A CUDA graph replays kernels and no Python. An update that is captured runs at every replay, counts
itself on the device, and leaves its statistics where `replayed` finds them; once a commit was
captured, every optimizer step outside of the graph updates, pending or not: the host cannot know.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from unclamp.nn.captured import Captured
from unclamp.nn.rows import RowSettings
from unclamp.nn.site import INSPECTIONS, Inspection, LayerSites, Site
from unclamp.nn.update import Listener, SwitchListener, Update
from unclamp.numerics import Stat, empty_details, empty_stats
from unclamp.numerics.gpu import is_capturing
from unclamp.recipe import Recipe
from unclamp.scaling import Scaling, Static


class Ledger:
    """Amax histories, scales and pending statistics of a model's sites.

    Invariants: sites stay in the order they were added; tensors are only written in place, so a
    view of a row stays valid until the layout changes (sites added, longer histories, another
    device), and then every layer takes its views anew; none of the tensors is a parameter or a
    buffer, so optimizers, gradient clipping, weight decay and dtype conversions never see them.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.sites: list[Site] = []
        self.first_row: list[int] = []
        self.recipe: Recipe | None = None
        self.updates = 0
        self.layers: weakref.WeakSet[LayerSites] = weakref.WeakSet()
        self.observes = False
        self.inspection: Inspection = "never"
        self._inspections: dict[int, Inspection] = {}
        self.details: Tensor | None = None
        self._counted_in = -1
        self._remembered: list[int] = []
        self._listeners: list[Listener] = []
        self._switch_listeners: list[SwitchListener] = []
        self._allocate(torch.device("cpu"))
        self._bind(model)

    # ---- layout ----------------------------------------------------------------------------

    def add(self, sites: list[Site]) -> list[int]:
        """Add sites with nothing measured yet; return their indices."""
        first = len(self.sites)
        self._lay_out([*self.sites, *sites])
        return list(range(first, len(self.sites)))

    def move_to(self, device: torch.device) -> None:
        """Move the state to a device; dtypes stay.

        A model on the meta device has its state elsewhere: meta tensors could not move back.
        """
        if device != self.scale.device and device.type != "meta":
            self._lay_out(self.sites, device=device)

    def _lay_out(self, sites: list[Site], *, device: torch.device | None = None) -> None:
        """Give these sites rows; those that are here keep what they know if it still fits."""
        old, old_first, old_sites = self.__dict__.copy(), self.first_row, self.sites
        was_pending, self.updates = self.has_pending, self.count()
        remembered = [site.history_len for site in sites]
        for index, before in enumerate(self._remembered):
            remembered[index] = max(before, remembered[index])
        self.sites, self._remembered = sites, remembered
        self._allocate(device or self.scale.device)
        width = min(old["amax_history"].shape[1], self.amax_history.shape[1])
        for index, site in enumerate(old_sites):
            self.pending[index] = old["pending"][index]
            if site.scales != sites[index].scales:
                continue
            here = self._rows_of(index)
            there = slice(old_first[index], old_first[index] + site.scales)
            self.amax_history[here, :width] = old["amax_history"][there, :width]
            self.scale[here] = old["scale"][there]
            self.block_amax[here] = old["block_amax"][there]
        self._mark(pending=was_pending)
        self.rebind()

    @torch.inference_mode(False)  # its tensors have no version, and could not train
    def _allocate(self, device: torch.device) -> None:
        counts = [site.scales for site in self.sites]
        self.first_row = [0, *itertools.accumulate(counts[:-1])] if counts else []
        rows, longest = sum(counts), max(self._remembered, default=1)
        float32 = {"dtype": torch.float32, "device": device}
        self.amax_history = torch.zeros(rows, longest, **float32)
        self.scale = torch.zeros(rows, **float32)
        self.block_amax = torch.full((rows,), -1.0, **float32)
        self.pending = empty_stats(len(self.sites), device)
        if self.details is not None:
            self._allocate_details()
        self._settings = RowSettings.of(self.sites, longest, device)
        self.captured = Captured(device)  # a graph of other tensors is of no use any more
        self.scale.copy_(torch.where(self._settings.is_static, self._settings.static, self.scale))
        self._mark(pending=False)

    @torch.inference_mode(False)
    def _allocate_details(self) -> None:
        self.details = empty_details(len(self.sites), self.scale.device)
        self._details_version = self.details._version

    def _rows_of(self, index: int) -> slice:
        first = self.first_row[index]
        return slice(first, first + self.sites[index].scales)

    def _indices_of(self, index: int) -> list[int]:
        rows = self._rows_of(index)
        return list(range(rows.start, rows.stop))

    def rebind(self) -> None:
        """Have every layer take its plan and its views anew."""
        for layer in self.layers:
            layer.bind()

    # ---- a step ----------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """Whether anything was committed since the last update. Needs no look at the device."""
        return self.pending._version != self._clean_version

    def _mark(self, *, pending: bool) -> None:
        self._clean_version = self.pending._version - int(pending)

    @property
    def is_warming(self) -> bool:
        """Whether casts are only counted: in the recipe's warm-up, and where they are observed."""
        is_early = self.recipe is not None and self.updates < self.recipe.warmup_steps
        return self.observes or is_early

    @torch.no_grad()
    def update(self, *, captured: bool | None = None) -> None:
        """Fold the pending amaxes into histories and scales, tell listeners, start afresh.

        Where it is `captured` in a CUDA graph (by default it looks), listeners are told by
        `replayed`.

        Numerics: a site that cast nothing, or saw no finite element, keeps its history and
        scale. An amax of 0 enters the history; a window of zeros keeps the scale. Where a
        reduce function gives NaN or Inf the scale is kept too.
        """
        captured = is_capturing() if captured is None else captured
        details, age = self._take_details()
        if captured:
            self.captured.keep((self.pending.clone(), details, age))
        for listener in [] if captured else self._listeners:
            look = None if details is None else details.clone()
            listener(Update(self.pending.clone(), look, age))
        amax = self._settings.newest(self.pending[:, Stat.AMAX], self.block_amax)
        measured = amax >= 0
        shifted = torch.cat([amax.unsqueeze(1), self.amax_history[:, :-1]], dim=1)
        self.amax_history.copy_(torch.where(measured.unsqueeze(1), shifted, self.amax_history))
        scale = self._settings.scale(self.amax_history, previous=self.scale)
        self.scale.copy_(torch.where(measured, scale, self.scale))
        self.block_amax.fill_(-1)
        self.pending.copy_(self._settings.empty)
        self._mark(pending=False)
        if captured:
            return
        # Optimizers that step within backward make an update a parameter, and one step in all.
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self._counted_in:
            self._count(self.updates + 1)
        self._counted_in = task

    def replayed(self) -> None:
        """Tell listeners what the last replay of a captured update saw; once after each replay.

        `Recorder.step` does it. Without a captured update it does nothing.
        """
        seen = self.captured.seen()
        for listener in [] if seen is None else self._listeners:
            stats, *others = seen or []
            assert stats is not None
            listener(Update(stats.clone(), *others))

    def count(self) -> int:
        """Return the number of updates; waits for the device if some are replayed."""
        return self.updates + self.captured.count()

    def _take_details(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the closer looks since the last update, and start afresh."""
        if self.details is None or self.details._version == self._details_version:
            return None, None
        details = self.details.clone()
        self.details.zero_()
        self._details_version = self.details._version
        sites = len(self.sites)
        return details, self._settings.scale_age(self.amax_history, self.scale, sites=sites)

    def inspect(self, inspection: Inspection, *, by: object = None) -> None:
        """Have casts from now on get a closer look, or none; costs a pass over each tensor.

        Of several who ask, each named by `by`, the one who wants most decides.
        """
        self._inspections.pop(id(by), None)
        if inspection != "never":
            self._inspections[id(by)] = inspection
        inspection = max(["never", *self._inspections.values()], key=INSPECTIONS.index)
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

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(Update(...))` at each update; return what ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def subscribe_to_switches(self, listener: SwitchListener) -> Callable[[], None]:
        """Call `listener({site: (before, after)})` at each switch; return what ends it."""
        self._switch_listeners.append(listener)
        return lambda: self._switch_listeners.remove(listener)

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
            site.scales == old.scales and site.history_len <= self.amax_history.shape[1]
            for site, old in zip(sites, self.sites, strict=True)
        )
        if fits:
            self.sites = sites
            self._remembered = [
                max(n, site.history_len) for n, site in zip(self._remembered, sites, strict=True)
            ]
            self._settings = RowSettings.of(sites, self.amax_history.shape[1], self.scale.device)
        else:
            self._lay_out(sites)
        for index, old in before.items():
            if isinstance(old, Static):
                self.scale[self._rows_of(index)] = 0
        self._rescale([row for index in before for row in self._indices_of(index)])
        changed = {self.sites[index].fqn for index in scalings}
        for layer in self.layers:
            if layer.fqn in changed:
                layer.bind()
        switched = {index: (old, scalings[index]) for index, old in before.items()}
        for listener in self._switch_listeners:
            listener(switched)

    def _rescale(self, rows: list[int]) -> None:
        """Take the scales of rows from their histories; where those say nothing they stay."""
        scale = self._settings.scale(self.amax_history, previous=self.scale)
        self.scale[rows] = scale[rows]

    # ---- saved state -----------------------------------------------------------------------

    def history_of(self, index: int) -> Tensor:
        """Return a copy of a site's history, newest first: `[history_len]`.

        A site with a scale a block has `[scales, history_len]`.
        """
        history = self.amax_history[self._rows_of(index), : self._remembered[index]].clone()
        return history[0] if self.sites[index].scales == 1 else history

    def scale_of(self, index: int) -> Tensor:
        """Return a copy of a site's scale: 0-d, or `[scales]` where it has one a block."""
        scale = self.scale[self._rows_of(index)].clone()
        return scale[0] if self.sites[index].scales == 1 else scale

    @torch.no_grad()
    def restore(self, index: int, history: Tensor | None, scale: Tensor | None) -> None:
        """Set a site's state; None forgets it, and the next tensor seeds it.

        A history of another length keeps its newest entries. The scale follows from the history
        under the site's own format, margin and reduction, which may differ from those that saved
        it; the saved one serves only where the history says nothing. State of other blocks (saved
        under another granularity) is forgotten. Pending statistics belong to the state that is
        replaced and go with it.
        """
        rows, count = self._rows_of(index), self.sites[index].scales
        was_pending = self.has_pending
        self.pending[index] = self._settings.empty[index]
        self.block_amax[rows] = -1
        self.amax_history[rows] = 0
        self.scale[rows] = 0
        if scale is not None and scale.numel() == count:
            self.scale[rows] = scale.reshape(count).to(self.scale)
        if history is not None and history.numel() // max(history.shape[-1], 1) == count:
            kept = min(history.shape[-1], self._remembered[index])
            newest = history.reshape(count, -1)[:, :kept]
            self.amax_history[rows, :kept] = newest.to(self.amax_history)
        self._mark(pending=was_pending)
        self._rescale(self._indices_of(index))

    def restore_updates(self, updates: int) -> None:
        """Set how many updates there were, which decides where a warm-up stands."""
        self.captured.forget_count()
        self._count(updates)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ledger":
        root = self._root() if self._root is not None else None
        twin = Ledger(memo.get(id(root)))
        memo[id(self)] = twin
        twin.recipe, twin.updates, twin.observes = self.recipe, self.count(), self.observes
        twin._remembered = list(self._remembered)
        twin._lay_out(list(self.sites), device=self.scale.device)
        for name in ("amax_history", "scale", "block_amax", "pending"):
            getattr(twin, name).copy_(getattr(self, name))
        twin._mark(pending=self.has_pending)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_root": None, "_listeners": [], "_switch_listeners": []}
        # Closer looks are asked for by those who listen.
        state |= {"inspection": "never", "_inspections": {}, "details": None}
        del state["layers"]
        return {**state, "_clean_version": self.has_pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.layers = weakref.WeakSet()
        self._mark(pending=state["_clean_version"])
        self._bind(None)

    # ---- optimizers ------------------------------------------------------------------------

    def _bind(self, model: nn.Module | None) -> None:
        self._root = None if model is None else weakref.ref(model)
        _follow_optimizers(self)

    def extend_to(self, model: nn.Module) -> None:
        """Follow the optimizers of a whole model, where the ledger's own is a part of it."""
        root = self._root() if self._root is not None else None
        if root is None or any(module is root for module in model.modules()):
            self._root = weakref.ref(model)

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer is a step of this ledger's model.

        A ledger whose model is unknown (unpickled, or a layer copied out of its model) follows
        every optimizer.
        """
        model = self._root() if self._root is not None else None
        if model is None:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for p in model.parameters())


_ledgers: "weakref.WeakSet[Ledger]" = weakref.WeakSet()
_hooks: list[Any] = []


def _follow_optimizers(ledger: Ledger) -> None:
    """Have every optimizer's step update this ledger for as long as it lives."""
    if not _hooks:
        # Traced into a compiled step, the update would be no side effect of it.
        hook: Any = torch.compiler.disable(_after_optimizer_step)
        _hooks.append(register_optimizer_step_post_hook(hook))
    _ledgers.add(ledger)


def _after_optimizer_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for ledger in list(_ledgers):
        if (ledger.has_pending or ledger.captured.is_in_graph) and ledger.follows(optimizer):
            ledger.update()
