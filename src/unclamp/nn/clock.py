"""When a ledger updates: right after the optimizers' steps, once for each.

There is no call for a user to forget. An optimizer that holds a parameter of the model makes an
update if something is pending, so two optimizers on one model still make one update a step.
Optimizers that step within one backward (one a parameter) make an update each, and one step in
all. What a CUDA graph holds is counted by `unclamp.nn.captured`.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from unclamp.nn.alive import Alive

NO_TASK = -1
"""What torch calls the backward that runs, when none does."""


class Clock:
    """Whose optimizers one ledger follows, and which of its updates count as steps."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._root = None if model is None else weakref.ref(model)
        self._counted_in = NO_TASK

    @property
    def model(self) -> nn.Module | None:
        """The model; None where it is gone, or unknown (unpickled, or copied out of it)."""
        return None if self._root is None else self._root()

    def is_a_step(self) -> bool:
        """Whether an update now is a step of its own; asked once at each update."""
        task = torch._C._current_graph_task_id()
        is_new = task == NO_TASK or task != self._counted_in
        self._counted_in = task
        return is_new

    def extend_to(self, model: nn.Module) -> None:
        """Follow the optimizers of a whole model, where the clock's own is a part of it."""
        own = self.model
        if own is None or any(module is own for module in model.modules()):
            self._root = weakref.ref(model)

    def root_in(self, model: nn.Module) -> nn.Module | None:
        """Return the clock's own model as it lies in another, which may be itself.

        `model` where the own one is unknown; None where `model` is a part of it, or another.
        """
        own = self.model
        return model if own is None else next((m for m in model.modules() if m is own), None)

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer is one of the model; of an unknown model every is."""
        model = self.model
        if model is None:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in held for p in model.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": None, "_counted_in": NO_TASK}


class Ticking(Protocol):
    """What a clock drives: a ledger."""

    @property
    def is_due(self) -> bool:
        """Whether there is something to update."""
        ...

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer is one of its model."""
        ...

    def update(self) -> None:
        """Do what a step asks for."""
        ...


ticking: Alive[Ticking] = Alive()
"""The ledgers of this process, in the order in which they were made."""
_hooks: list[Any] = []


def follow_optimizers(ledger: Ticking) -> None:
    """Have every optimizer's step update this ledger for as long as it lives."""
    if not _hooks:
        # Traced into a compiled step, the update would be no side effect of it.
        hook: Any = torch.compiler.disable(_after_optimizer_step)
        _hooks.append(register_optimizer_step_post_hook(hook))
    ticking.add(ledger)


def _after_optimizer_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for ledger in ticking:
        if ledger.is_due and ledger.follows(optimizer):
            ledger.update()
