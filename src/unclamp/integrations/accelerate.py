"""Hugging Face Accelerate: `attach` converts a model and records every step of your own loop.

Accelerate has no events: the loop is the user's. But all that is worth recording passes through
the `Accelerator`, so `attach` stands in front of some methods of this one:

    backward               a micro-batch's loss, as large as its share of the step's
    clip_grad_norm_        the norm before clipping
    accumulate             the run is opened, at the latest with the first loss
    end_training           the run is closed

A step is recorded right after the optimizer's own, by torch's hook, and the scaling state is
saved and loaded by the hooks that Accelerate has for `save_state` and `load_state`.
"""

import atexit
import json
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from unclamp.errors import ConvertError, naming_arguments
from unclamp.files import write_json
from unclamp.integrations.recorded import (
    Framework,
    Recorded,
    Recording,
    load_scaling_state,
    not_installed,
    save_scaling_state,
    status_of,
)
from unclamp.integrations.trainer_hooks import Replaced
from unclamp.nn import ConvertReport, find_ledgers
from unclamp.recipe import Recipe
from unclamp.runlog import Status

try:
    import accelerate
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    raise not_installed(error, "hf") from error

__all__ = ["Attached", "attach"]

STEP_FILE = "unclamp_step.json"
"""In a checkpoint's folder: the number of the last step, which Accelerate does not count."""
_MARK = "unclamp_attached"


@naming_arguments
def attach(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    recipe: Recipe | None = None,
    run: str | Path | None = None,
    skip: Sequence[str] = (),
    trackers: bool = False,
    recording: Recording | Mapping[str, Any] | None = None,
) -> "Attached":
    """Convert a model, and have the steps of your loop recorded. Before or after `prepare`.

    Recorded are, under step numbers from 1: the sum of the losses given to `accelerator.backward`,
    each divided by `gradient_accumulation_steps`, as its gradient is; the norm that
    `accelerator.clip_grad_norm_` returns; the learning rate. Of several ranks each records its own
    loss. `accelerator.save_state` puts the scaling state beside the weights, which keep the keys
    of the plain model, and `load_state` brings it back: the run goes on where it was.

    Args:
        accelerator: Yours.
        model: The model, also as `prepare` returned it. It is converted in place.
        recipe: None leaves the model as it is: plain, observed, or converted by you.
        run: The run's folder; None records nothing. After `load_state` a run in it goes on.
        skip: Globs of layers to leave alone.
        trackers: Send each step's numbers to the trackers of this accelerator too, under
            "unclamp/" names (`accelerator.log`).
        recording: What else `unclamp.Recorder` is to be given: `{"inspect": 10}`.

    Returns:
        The attachment. `accelerator.end_training()` closes the run as finished. As a context
        manager it closes it with the right status when the loop raises.

    Raises:
        ConvertError: The accelerator is none, or attached already; or as `unclamp.convert`.
        RunLogError: At the first step: the folder holds a run, and nothing was loaded.
    """
    if not isinstance(accelerator, Accelerator):
        raise ConvertError(
            "attach takes the accelerator first, an accelerate.Accelerator, and then the model: "
            f"got {type(accelerator).__name__}"
        )
    if getattr(accelerator, _MARK, None) is not None:
        raise ConvertError(
            "this accelerator is attached already: call detach() on what attach returned before"
        )
    plain = accelerator.unwrap_model(model)
    if not isinstance(recording, Recording):
        recording = Recording(**(recording or {}))
    if trackers:
        recording = replace(recording, sinks=[*recording.sinks, _Trackers(accelerator)])
    recorded = Recorded(plain, run, recipe=recipe, skip=skip, state="apart", recording=recording)
    return Attached(accelerator, recorded)


class Attached:
    """An accelerator that is attached; made by `attach`.

    Attributes:
        report: What the conversion did; None where there was none.
        step: The number of the last step.
    """

    def __init__(self, accelerator: Accelerator, recorded: Recorded) -> None:
        self.report: ConvertReport | None = recorded.report
        self.step = 0
        self._accelerator, self._recorded = accelerator, recorded
        self._resumes = self._is_begun = self._hears_steps = False
        self._scaler: Any = None
        self._methods = Replaced(accelerator)
        self._methods.put("backward", self._backward)
        self._methods.put("clip_grad_norm_", self._clip_grad_norm)
        self._methods.put("accumulate", self._accumulate)
        self._methods.put("end_training", self._end_training)
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
            recorded.model.register_forward_pre_hook(_Forward(self)),
        ]
        setattr(accelerator, _MARK, self)

    @property
    def recorder(self) -> Any:
        """The open `unclamp.Recorder`, for events and evaluations; None outside of a training."""
        return self._recorded.recorder

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation, after the last step, as an event; NaN and Inf as texts."""
        self._recorded.evaluation(self.step, metrics)

    def detach(self) -> None:
        """Let go of the accelerator, and close the run; the model stays converted."""
        self._end("finished")
        self._methods.restore()
        while self._handles:
            self._handles.pop().remove()
        if hasattr(self._accelerator, _MARK):
            delattr(self._accelerator, _MARK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        try:
            self._end("finished" if error is None else status_of(error))
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"unclamp could not close the run: {second}")

    # ---- what the accelerator does -------------------------------------------------------------

    def begin(self) -> None:
        """Open the run, the first time."""
        if self._is_begun:
            return
        accelerator = self._accelerator
        framework = Framework(
            name="accelerate",
            version=accelerate.__version__,
            accumulation=accelerator.gradient_accumulation_steps,
            precision=str(accelerator.mixed_precision),
            world_size=accelerator.num_processes,
        )
        self._recorded.begin(framework, resumes=self._resumes)
        self._is_begun = True
        if not self._hears_steps:
            self._hears_steps = True
            # After the ledgers' own hook, which the first of them has made.
            self._handles.append(register_optimizer_step_post_hook(_Step(self)))
        atexit.register(self._at_exit)

    def _accumulate(self, plain: Callable[..., Any], *models: Any) -> Any:
        self.begin()
        return plain(*models)

    def _backward(self, plain: Callable[..., Any], loss: Tensor, **kwargs: Any) -> None:
        self.begin()
        steps = self._accelerator.gradient_accumulation_steps
        divides = self._accelerator.distributed_type != DistributedType.DEEPSPEED
        share = loss.detach() / steps if divides else loss.detach()
        plain(loss, **kwargs)
        self._recorded.micro(share)
        self._mind_skips()

    def _clip_grad_norm(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = plain(*args, **kwargs)
        whole = getattr(norm, "full_tensor", None)
        self._recorded.grad_norm(norm if whole is None else whole())
        return norm

    def stepped(self, optimizer: Optimizer) -> None:
        """Record the step that an optimizer has just made, if it is this model's."""
        own = self._optimizers()
        if not own or optimizer is not own[-1]:
            return
        self.step += 1
        self._recorded.step(self.step, lr=optimizer.param_groups[0].get("lr"))

    def _optimizers(self) -> list[Optimizer]:
        """Return the optimizers that `prepare` has had and that train this model, in its order."""
        every = [each.optimizer for each in self._accelerator._optimizers]
        ids = {id(p) for p in self._recorded.model.parameters()}
        own = [o for o in every if any(id(p) in ids for g in o.param_groups for p in g["params"])]
        return own or every  # FSDP1 has other parameters

    def _mind_skips(self) -> None:
        """Have a step that a gradient scaler skips leave no loss to the next one."""
        scaler = self._accelerator.scaler
        if scaler is not None and self._scaler is not scaler:
            self._scaler = scaler
            self._methods.put("update", self._scaler_updated, on=scaler)

    def _scaler_updated(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        self._recorded.forget()

    def _end_training(self, plain: Callable[..., Any]) -> None:
        self._end("finished")  # before the trackers are
        plain()

    def _end(self, status: Status) -> None:
        self._recorded.end(status)
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        """Close a run that the program left open; Python keeps what it died of."""
        error = getattr(sys, "last_value", None)
        self._end("interrupted" if error is None else status_of(error))

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save(self, _models: Any, _weights: Any, folder: str) -> None:
        accelerator = self._accelerator
        on_each = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if on_each else accelerator.is_main_process:
            save_scaling_state(self._recorded.model, folder)
            write_json(Path(folder) / STEP_FILE, {"step": self.step})

    def _load(self, _models: Any, folder: str) -> None:
        """Load what is ours. Weights may come after it: a checkpoint comes in any order.

        A training that goes back to a checkpoint makes steps again that it had made: its run goes
        on as a new attempt.
        """
        if self._recorded.recorder is not None:
            self._end("interrupted")
            self._is_begun = False
        if find_ledgers(self._recorded.model):
            load_scaling_state(self._recorded.model, folder)
        path = Path(folder) / STEP_FILE
        if path.is_file():
            self.step = int(json.loads(path.read_text())["step"])
        self._resumes = True


class _Forward:
    """Opens the run in the first forward that trains; a copy of the model does not."""

    def __init__(self, attached: Attached) -> None:
        self._attached = weakref.ref(attached)

    def __call__(self, module: nn.Module, _args: Any) -> None:
        """Open the run, where this forward may be one of the training."""
        if torch.compiler.is_compiling():
            return
        attached = self._attached()
        if attached is not None and module.training and torch.is_grad_enabled():
            attached.begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Step:
    """Records each optimizer step for as long as the attachment lives."""

    def __init__(self, attached: Attached) -> None:
        self._attached = weakref.ref(attached)

    def __call__(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Tell of a step."""
        attached = self._attached()
        if attached is not None:
            attached.stepped(optimizer)


class _Nothing:
    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Do nothing."""


class _Trackers:
    """A function of a run's numbers: they go to an accelerator's trackers."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __call__(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log the numbers of a step's casts; loss and learning rate are the user's to log."""
        own = {name: value for name, value in numbers.items() if name.startswith("unclamp/")}
        self._accelerator.log(own, step=step)
