"""Who owns amax histories and scales, and when they change.

One ledger serves a whole model. Its tensors have a row a site (one operand of one layer), so
an update is a handful of kernels whatever the model's size:

    amax_history  [sites, longest history]  float32, newest first, 0 where nothing was measured
    scale         [sites]                   float32, 0 until a first non-zero amax is known
    pending       [sites, len(Stat)]        float64, statistics since the last update

Casts *commit* their statistics to `pending`. An update folds the pending amaxes into the
history and makes the next scales. It runs right after `optimizer.step()`, through torch's
optimizer hook, for every optimizer that holds a parameter of the model: there is no call for a
user to forget. An update with nothing pending does nothing, so two optimizers on one model
still make one update a step, and under gradient accumulation the maximum over the microsteps
enters the history once.

A cast commits when its *backward* runs (`unclamp.nn.linear`). That alone gives the counts their
meaning: an evaluation forward commits nothing, and under activation checkpointing, where the
forward runs twice, the backward runs once.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from unclamp.numerics import Stat, empty_stats, merge_stats, scale_from_amax
from unclamp.recipe import Delayed, Dynamic, HighPrecision, Operand, Recipe, Role

DEFAULT_HISTORY_LEN = Delayed().history_len
"""Updates remembered for sites whose scaling asks for none."""

Listener = Callable[[Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One operand of one layer, and what the recipe gives it."""

    fqn: str
    role: Role
    operand: Operand

    @property
    def history_len(self) -> int:
        """Updates that this site remembers."""
        scaling = self.operand.scaling
        return scaling.history_len if isinstance(scaling, Delayed) else DEFAULT_HISTORY_LEN

    @property
    def margin(self) -> int:
        """Powers of two of headroom."""
        scaling = self.operand.scaling
        return 0 if isinstance(scaling, HighPrecision) else scaling.margin


class Ledger:
    """Amax histories, scales and pending statistics of a model's sites.

    Invariants: rows are in the order of `sites`; tensors are only written in place, so a view
    of a row stays valid until sites are added; none of them is a parameter or a buffer, so
    optimizers, gradient clipping, weight decay and dtype conversions never see them.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.sites: list[Site] = []
        self.recipe: Recipe | None = None
        self.updates = 0
        self.has_pending = False
        self.amax_history = torch.zeros(0, 1)
        self.scale = torch.zeros(0)
        self.pending = empty_stats(0)
        self._rows: _RowSettings = _RowSettings.of(self.sites, self.scale.device)
        self._listeners: list[Listener] = []
        self._bind(model)

    # ---- sites -----------------------------------------------------------------------------

    def add(self, sites: list[Site]) -> list[int]:
        """Add sites with nothing measured yet; return their rows."""
        first = len(self.sites)
        old_history, old_scale, old_pending = self.amax_history, self.scale, self.pending
        self.sites = [*self.sites, *sites]
        device = old_scale.device
        longest = max((site.history_len for site in self.sites), default=1)
        self.amax_history = torch.zeros(len(self.sites), longest, device=device)
        self.amax_history[:first, : old_history.shape[1]] = old_history
        self.scale = torch.zeros(len(self.sites), device=device)
        self.scale[:first] = old_scale
        self.pending = empty_stats(len(self.sites), device)
        self.pending[:first] = old_pending
        self._rows = _RowSettings.of(self.sites, device)
        return list(range(first, len(self.sites)))

    def move_to(self, device: torch.device) -> None:
        """Move the state to a device; dtypes stay.

        A model on the meta device has its state elsewhere: meta tensors could not move back.
        """
        if device == self.scale.device or device.type == "meta":
            return
        self.amax_history = self.amax_history.to(device)
        self.scale = self.scale.to(device)
        self.pending = self.pending.to(device)
        self._rows = _RowSettings.of(self.sites, device)

    def scale_for(self, row: int) -> Tensor | None:
        """Return the scale a cast at this row must use; None where it takes its own."""
        scaling = self.sites[row].operand.scaling
        return None if isinstance(scaling, Dynamic) else self.scale[row]

    # ---- a step ----------------------------------------------------------------------------

    def commit(self, row: int, stats: Tensor) -> None:
        """Merge a cast's statistics into what the next update folds in."""
        merge_stats(self.pending[row], stats)
        self.has_pending = True

    @torch.no_grad()
    def update(self) -> None:
        """Fold the pending amaxes into histories and scales, tell listeners, start afresh.

        Numerics: a site that cast nothing, or saw no finite element, keeps its history and
        scale. An amax of 0 enters the history; a window of zeros keeps the scale. Where a
        reduce function gives NaN or Inf the scale is kept too.
        """
        for listener in self._listeners:
            listener(self.pending.clone())
        amax = self.pending[:, Stat.AMAX]
        measured = amax >= 0
        newest = amax.to(torch.float32).unsqueeze(1)
        shifted = torch.cat([newest, self.amax_history[:, :-1]], dim=1)
        self.amax_history.copy_(torch.where(measured.unsqueeze(1), shifted, self.amax_history))
        scale = scale_from_amax(
            self._rows.reduce(self.amax_history),
            self._rows.format_max,
            margin=self._rows.margin,
            previous=self.scale,
        )
        self.scale.copy_(torch.where(measured, scale, self.scale))
        self.pending.copy_(self._rows.empty)
        self.has_pending = False
        self.updates += 1

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(pending)` at each update, with a copy; return what ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ---- saved state -----------------------------------------------------------------------

    def history_of(self, row: int) -> Tensor:
        """Return a copy of a site's history, `[history_len]`, newest first."""
        return self.amax_history[row, : self.sites[row].history_len].clone()

    @torch.no_grad()
    def restore(self, row: int, history: Tensor | None, scale: Tensor | None) -> None:
        """Set a site's state; None forgets it, and the next tensor seeds it.

        A history of another length keeps its newest entries. The scale follows from the history
        under the site's own format, margin and reduction, which may differ from those that saved
        it; the saved one serves only where the history says nothing. Pending statistics belong
        to the state that is replaced and go with it.
        """
        self.pending[row] = self._rows.empty[row]
        self.amax_history[row].zero_()
        self.scale[row] = 0 if scale is None else scale
        if history is not None:
            kept = min(len(history), self.sites[row].history_len)
            self.amax_history[row, :kept] = history[:kept]
            self.scale[row] = scale_from_amax(
                self._rows.reduce(self.amax_history)[row],
                self._rows.format_max[row],
                margin=self._rows.margin[row],
                previous=self.scale[row],
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ledger":
        root = self._root() if self._root is not None else None
        twin = Ledger(memo.get(id(root)))
        memo[id(self)] = twin
        twin.add(self.sites)
        twin.recipe = self.recipe
        twin.updates, twin.has_pending = self.updates, self.has_pending
        twin.move_to(self.scale.device)
        for name in ("amax_history", "scale", "pending"):
            getattr(twin, name).copy_(getattr(self, name))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None, "_listeners": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
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


@dataclass(frozen=True, kw_only=True)
class _RowSettings:
    """The recipe's settings as columns, so that an update needs no loop over sites."""

    format_max: Tensor
    margin: Tensor
    window: Tensor
    empty: Tensor
    reductions: tuple[tuple[Callable[[Tensor], Tensor], Tensor, int], ...]

    @classmethod
    def of(cls, sites: list[Site], device: torch.device) -> "_RowSettings":
        lengths = [_window(site) for site in sites]
        longest = max((site.history_len for site in sites), default=1)
        columns = torch.arange(longest, device=device)
        groups: dict[tuple[Callable[[Any], Any], int], list[int]] = {}
        for row, site in enumerate(sites):
            scaling = site.operand.scaling
            if isinstance(scaling, Delayed) and not isinstance(scaling.reduce, str):
                groups.setdefault((scaling.reduce, scaling.history_len), []).append(row)
        return cls(
            format_max=torch.tensor([s.operand.format.max for s in sites], device=device),
            margin=torch.tensor([float(s.margin) for s in sites], device=device),
            window=columns < torch.tensor(lengths, device=device).unsqueeze(1),
            empty=empty_stats(len(sites), device),
            reductions=tuple(
                (reduce, torch.tensor(rows, device=device), length)
                for (reduce, length), rows in groups.items()
            ),
        )

    def reduce(self, history: Tensor) -> Tensor:
        """Return one amax a site from its history."""
        amax = torch.where(self.window, history, 0).amax(dim=1)
        for reduce, rows, length in self.reductions:
            amax[rows] = reduce(history[rows, :length])
        return amax


def _window(site: Site) -> int:
    """Newest entries whose maximum is the amax; "most_recent" looks at one."""
    scaling = site.operand.scaling
    most_recent = isinstance(scaling, Delayed) and scaling.reduce == "most_recent"
    return 1 if most_recent else site.history_len


_ledgers: "weakref.WeakSet[Ledger]" = weakref.WeakSet()
_hooks: list[Any] = []


def _follow_optimizers(ledger: Ledger) -> None:
    """Have every optimizer's step update this ledger for as long as it lives."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))
    _ledgers.add(ledger)


def _after_optimizer_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for ledger in list(_ledgers):
        if ledger.has_pending and ledger.follows(optimizer):
            ledger.update()
