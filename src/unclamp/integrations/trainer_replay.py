"""What a Trainer trains as a `Training`, and one optimizer step of it: for snapshots and replays.

A trainer that has not trained yet is made ready by its own `train`, which is stopped where the
first step would begin: so model, optimizer and scheduler are wrapped and made exactly as Trainer
does, whatever its version and settings.
"""

import contextlib
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import TrainerCallback

from unclamp.errors import ReplayError
from unclamp.explain import Training


def training(trainer: Any) -> Training:
    """Return a trainer's model, optimizer and scheduler, for `unclamp.explain_spike`.

    A trainer that has not trained is made ready for it. Its step is `replay_step`.

    Raises:
        ReplayError: It cannot be made ready.
    """
    if not isinstance(trainer.optimizer, AcceleratedOptimizer):
        _make_ready(trainer)
    scaler = trainer.accelerator.scaler
    return Training(
        model=trainer.model_wrapped,
        optimizer=trainer.optimizer,
        scheduler=_Schedule(trainer),
        others={} if scaler is None else {"scaler": scaler},
        settings={"trainer": trainer},
    )


def replay_step(training: Training, batch: Any) -> Tensor:
    """Do one optimizer step of a trainer, as it does: forward, loss, backward, clip, step.

    Args:
        training: Made by `training`.
        batch: `{"batches": [...], "items": n}`: the micro-batches as the collator made them, and
            what Trainer divides their losses by, or None.

    Returns:
        The loss of the step, as Trainer logs it.
    """
    trainer: Any = training.settings["trainer"]
    model, accelerator = training.model, trainer.accelerator
    batches = batch["batches"]
    trainer.current_gradient_accumulation_steps = len(batches)
    total = torch.zeros((), device=trainer.args.device)
    for n, inputs in enumerate(batches, start=1):
        is_last = n == len(batches)
        accelerator.gradient_state._set_sync_gradients(is_last)
        waits = contextlib.nullcontext() if is_last else accelerator.no_sync(model)
        with waits:
            total += trainer.training_step(model, inputs, batch["items"])
    _clip(trainer, model)
    training.optimizer.step()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    if not (accelerator.optimizer_step_was_skipped or isinstance(trainer.lr_scheduler, plateau)):
        trainer.lr_scheduler.step()
    model.zero_grad()
    return total


def _clip(trainer: Any, model: Any) -> None:
    """Clip as Trainer does: by its own method where it has one, for gradients on several meshes."""
    most = trainer.args.max_grad_norm
    if most is None or most <= 0:
        return
    clip = getattr(trainer, "_clip_grad_norm", None)
    if clip is not None:
        clip(model)
    else:
        trainer.accelerator.clip_grad_norm_(model.parameters(), most)


class _Ready(Exception):
    """A trainer is ready for its first step."""


class _Stop(TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise _Ready


def _make_ready(trainer: Any) -> None:
    callbacks = trainer.callback_handler.callbacks
    stop = _Stop()
    callbacks.insert(0, stop)  # so that nobody else hears of a training that is none
    try:
        type(trainer).train(trainer)
    except _Ready:
        return
    finally:
        callbacks.remove(stop)
        trainer.is_in_train = False
    raise ReplayError("the trainer had nothing to train, so that no step of it can be replayed")


class _Schedule:
    """A trainer's scheduler, with the number of steps that it was made for.

    That decides the learning rates, and a build function may make a trainer for another number.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state and the steps of its training."""
        trainer = self._trainer
        return {"steps": trainer.state.max_steps, "state": trainer.lr_scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back; the learning rates themselves are in the optimizer's."""
        trainer = self._trainer
        if trainer.state.max_steps != state["steps"]:
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            trainer.state.max_steps = state["steps"]
            trainer.lr_scheduler = None
            trainer.create_scheduler(num_training_steps=state["steps"])
            for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self._trainer.lr_scheduler.load_state_dict(state["state"])
