"""Lightning Fabric: a callback for `Fabric(callbacks=[...])` that converts and records.

Fabric tells a callback of models that are set up and of optimizer steps. Losses and norms pass
through `fabric.backward` and `fabric.clip_gradients`, which are wrapped on the user's Fabric.
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from unclamp.errors import UnsupportedError
from unclamp.integrations.norms import grad_norm as norm_of
from unclamp.integrations.norms import unscaled
from unclamp.integrations.recorded import Framework, Recorded, Recording, status_of
from unclamp.integrations.scaled import Scaled
from unclamp.nn.convert import State
from unclamp.recipe import Recipe
from unclamp.runlog import Status
from unclamp.telemetry.columns import Number
from unclamp.telemetry.group import Name

STEP = "step"
"""Key of the number of steps in our part of a checkpoint."""


class FabricRecorder:
    """Convert the model that Fabric sets up, record every optimizer step, keep the scales.

    Give it to `Fabric(callbacks=[...])`, and put it into the dict that `fabric.save` and
    `fabric.load` get: then a resumed training goes on with its scales, its run and its numbers,
    which count steps from 1. Of several models the first that trains is converted and recorded, so
    put a GAN's halves into one `nn.ModuleDict`. With several optimizers say `manual=True`, and
    call `step` once an iteration.

    Args:
        recipe: What to convert the model by; None leaves it as it is.
        run: The run's folder; None records nothing.
        skip: Globs of modules to leave alone.
        state: "apart": the model's own keys are those of a plain one. "model": scaling state is
            among them, too.
        grad_norm: Whether to compute the norm of all gradients where `fabric.clip_gradients` did
            not, at the price of a pass over them. What clipping by value changed has no norm.
        manual: You call `step`; by default each step of the optimizer is recorded.
        **recording: As `unclamp.Recorder` takes it: metadata, notes, plain, casts, inspect, sinks,
            overwrite, flush_interval_s.

    Attributes:
        report: What the conversion did; None before it, and without a recipe.
        recorder: The open `unclamp.Recorder`; None before the first backward and after `close`.

    Raises:
        RunLogError: At the first backward: the training begins anew, and the folder holds a run.
        UnsupportedError: A second optimizer steps, and not `manual`.

    Example:
        >>> with FabricRecorder(unclamp.Recipe(), "runs/first") as recorder:  # doctest: +SKIP
        ...     fabric = Fabric(callbacks=[recorder])
        ...     train(fabric)
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        run: str | Path | None = None,
        *,
        skip: Sequence[str] = (),
        state: State = "apart",
        grad_norm: bool = True,
        manual: bool = False,
        **recording: Any,
    ) -> None:
        self._scaled = Scaled(recipe, skip=skip, state=state)
        self._run, self._recording = run, Recording(**recording)
        self._wants_norm, self._is_manual = grad_norm, manual
        self._recorded: Recorded | None = None
        self._fabric: Any = None
        self._optimizer: int | None = None
        self._losses: list[Number] = []
        self._norm: Tensor | None = None
        self._is_clipped = False
        self._lr: Number | None = None
        self._steps = 0
        self._resumes = False

    @property
    def report(self) -> Any:
        """What the conversion did; None before it."""
        return self._scaled.report

    @property
    def recorder(self) -> Any:
        """The open recorder; None outside of a training."""
        return None if self._recorded is None else self._recorded.recorder

    # ---- what Fabric calls ---------------------------------------------------------------------

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Convert the first model that trains, and listen to this Fabric."""
        model = getattr(module, "module", module)  # what Fabric has wrapped
        trains = any(each.requires_grad for each in model.parameters())
        if self._recorded is not None or not trains:
            return
        self._scaled.take(model)
        self._recorded = Recorded(model, self._run, recording=self._recording)
        self._fabric = fabric
        fabric.backward = _before(fabric.backward, self._on_backward)
        fabric.clip_gradients = _after(fabric.clip_gradients, self._on_clipped)

    def on_after_optimizer_step(self, strategy: Any, optimizer: Optimizer) -> None:
        """Record the step."""
        if self.recorder is None:
            return
        if self._lr is None:
            lr = optimizer.param_groups[0].get("lr")
            self._lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
        if self._is_manual:
            return
        if self._optimizer not in (None, id(optimizer)):
            raise UnsupportedError(
                "FabricRecorder records each step of one optimizer, and a second one has stepped: "
                "say FabricRecorder(..., manual=True), and call its step() once an iteration, "
                "after all optimizers"
            )
        self._optimizer = id(optimizer)
        if self._wants_norm and not self._is_clipped and (norm := norm_of(optimizer)) is not None:
            self._norm = unscaled(norm, optimizer, getattr(strategy.precision, "scaler", None))
        self.step()

    # ---- what a user calls ---------------------------------------------------------------------

    def step(self, *, loss: Number | None = None, group: Name = None, **scalars: Number) -> None:
        """Record the iteration that was just made, with `manual=True`.

        Args:
            loss: Its loss; by default the sum of what `fabric.backward` got since the last call.
            group: The kind of its batch.
            **scalars: What else to record, by name.
        """
        self._steps += 1
        if self._recorded is not None:
            for each in self._losses if loss is None else [loss]:
                self._recorded.micro(each)
            self._recorded.grad_norm(self._norm)
            self._recorded.step(self._steps, lr=self._lr, group=group, scalars=scalars)
        self._losses, self._norm, self._lr, self._is_clipped = [], None, None, False

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation's metrics, as an event at the present step."""
        if self._recorded is not None:
            self._recorded.evaluation(self._steps, metrics)

    def close(self, status: Status = "finished") -> None:
        """Close the run; later steps are not recorded."""
        fabric, self._fabric = self._fabric, None
        for name in ("backward", "clip_gradients") if fabric is not None else ():
            with suppress(AttributeError):
                delattr(fabric, name)
        if self._recorded is not None:
            self._recorded.end(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        self.close("finished" if error is None else status_of(error))

    def state_dict(self) -> dict[str, Any]:
        """Return scaling state and number of steps, for `fabric.save`."""
        return {STEP: self._steps, **self._scaled.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `fabric.load` has read; an open run as a new attempt."""
        if self._recorded is not None:
            self._recorded.end("interrupted")
            self._losses, self._norm, self._lr, self._is_clipped = [], None, None, False
        self._steps, self._resumes = int(state_dict[STEP]), True
        self._scaled.load_state_dict(state_dict)

    # ---- inside --------------------------------------------------------------------------------

    def _on_backward(self, tensor: Tensor, *_: Any, **__: Any) -> None:
        if self._recorded is None or self._fabric is None:
            return
        self._recorded.begin(_framework(self._fabric), resumes=self._resumes)
        self._losses.append(tensor.detach())

    def _on_clipped(self, norm: Tensor | None) -> None:
        self._norm, self._is_clipped = norm, True


def _before(method: Any, heard: Any) -> Any:
    @functools.wraps(method)
    def wrapped(*args: Any, **named: Any) -> Any:
        heard(*args, **named)
        return method(*args, **named)

    return wrapped


def _after(method: Any, heard: Any) -> Any:
    @functools.wraps(method)
    def wrapped(*args: Any, **named: Any) -> Any:
        result = method(*args, **named)
        heard(result)
        return result

    return wrapped


def _framework(fabric: Any) -> Framework:
    package = next(c.__module__ for c in type(fabric).__mro__ if c.__name__ == "Fabric")
    root = package.partition(".")[0]
    version = getattr(importlib.import_module(root), "__version__", "unknown")
    precision = getattr(fabric.strategy.precision, "precision", None)
    return Framework(
        name=f"{root} Fabric",
        version=version,
        precision=None if precision is None else str(precision),
        world_size=fabric.world_size,
    )
