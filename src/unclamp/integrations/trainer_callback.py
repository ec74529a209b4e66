"""A callback for those who cannot call `attach`, and what it has to refuse.

Trainer tells a callback neither a step's loss nor the norm of its gradients. Its log has both if it
is written at every step and hides nothing; nobody tells a callback of an exception, or from which
checkpoint a training goes on.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback

from unclamp.errors import UnclampWarning, UnsupportedError, naming_arguments
from unclamp.integrations.recorded import Framework, Recorded, Recording
from unclamp.recipe import Recipe

INSTEAD = "unclamp.integrations.transformers.attach(trainer, recipe, run) has no such limit"

LOST = (
    "the loss of step {step} is {loss}: Trainer logs each loss as a difference of sums, so that "
    "its log says NaN from now on, whatever the losses are. Later steps are recorded without one; "
    f"{INSTEAD}"
)


class UnclampCallback(TrainerCallback):
    """Convert the model of a trainer and record it, as far as a callback can.

    Use `attach` where you have the trainer: this cannot close the run as failed after an exception
    (it ends as interrupted, with the process), keep the scaling state in checkpoints, or take
    snapshots. A step is recorded from Trainer's log, so that this has to be written at every step.

    Args:
        recipe: None leaves the model as it is.
        run: The run's folder; None records nothing.
        skip: As `attach`.
        recording: As `attach`.

    Raises:
        UnsupportedError: When the training begins: it is resumed, or `logging_strategy` is not
            "steps", `logging_steps` not 1, `logging_nan_inf_filter` not False, and there is a run.
    """

    @naming_arguments
    def __init__(
        self,
        recipe: Recipe | None = None,
        run: str | Path | None = None,
        *,
        skip: Sequence[str] = (),
        recording: Recording | Mapping[str, Any] | None = None,
    ) -> None:
        self._recipe, self._run, self._skip = recipe, run, skip
        made = recording if isinstance(recording, Recording) else Recording(**(recording or {}))
        self._recording = made
        self._recorded: Recorded | None = None
        self._last = 0
        self._is_lost = False

    def on_init_end(self, args: Any, *_: Any, model: nn.Module | None = None, **__: Any) -> None:
        """Convert before the optimizer is made."""
        if model is not None and self._recorded is None:
            self._recorded = self._made(model)

    def on_train_begin(
        self, args: Any, state: Any, *_: Any, model: nn.Module | None = None, **__: Any
    ) -> None:
        """Refuse what cannot be right; convert, if that was not done; open the run."""
        assert model is not None
        if self._run is not None:
            _check(args, state)
        if self._recorded is None or self._recorded.model is not model:
            self._recorded = self._made(model)
        self._last, self._is_lost = state.global_step, False
        framework = Framework(
            name="transformers callback",
            version=transformers.__version__,
            accumulation=args.gradient_accumulation_steps,
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
            world_size=args.world_size,
        )
        self._recorded.begin(framework, resumes=False)

    def on_log(
        self, args: Any, state: Any, *_: Any, logs: Mapping[str, Any] | None = None, **__: Any
    ) -> None:
        """Record the step that Trainer has just logged."""
        if self._recorded is None or not logs or "loss" not in logs or "learning_rate" not in logs:
            return
        if state.global_step <= self._last:
            return
        self._last = state.global_step
        self._take(logs["loss"])
        self._recorded.grad_norm(logs.get("grad_norm"))
        self._recorded.step(state.global_step, lr=logs["learning_rate"])

    def on_evaluate(
        self, args: Any, state: Any, *_: Any, metrics: Mapping[str, Any] | None = None, **__: Any
    ) -> None:
        """Record an evaluation as an event."""
        if self._recorded is not None:
            self._recorded.evaluation(state.global_step, metrics or {})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the run; after an exception nobody says so."""
        if self._recorded is not None:
            self._recorded.end("finished")

    def _take(self, loss: float) -> None:
        """Take a loss that was logged; NaN after NaN or Inf is left over from that (`LOST`)."""
        assert self._recorded is not None
        if not self._is_lost or not math.isnan(loss):
            self._recorded.micro(loss)
        if not self._is_lost and not math.isfinite(loss):
            self._is_lost = True
            warnings.warn(LOST.format(step=self._last, loss=loss), UnclampWarning, stacklevel=2)

    def _made(self, model: nn.Module) -> Recorded:
        return Recorded(
            model, self._run, recipe=self._recipe, skip=self._skip, recording=self._recording
        )


def _check(args: Any, state: Any) -> None:
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UnsupportedError(
            f"transformers {transformers.__version__} rounds the loss that it logs: {INSTEAD}"
        )
    strategy = getattr(args.logging_strategy, "value", args.logging_strategy)
    wrong = {
        f"logging_strategy={strategy!r}": strategy != "steps",
        f"logging_steps={args.logging_steps:g}": args.logging_steps != 1,
        "logging_nan_inf_filter=True": bool(args.logging_nan_inf_filter),
    }
    if any(wrong.values()):
        raise UnsupportedError(
            "UnclampCallback gets a step's loss from Trainer's log, which has it only with "
            'logging_strategy="steps", logging_steps=1 and logging_nan_inf_filter=False; these '
            f"arguments say {', '.join(name for name, is_wrong in wrong.items() if is_wrong)}: "
            f"{INSTEAD}"
        )
    if state.global_step:
        raise UnsupportedError(
            "nobody tells a callback from which checkpoint a training goes on, so UnclampCallback "
            f"cannot bring the scaling state back: {INSTEAD}"
        )
