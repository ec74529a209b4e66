"""The events that a Trainer tells right, passed on; and what a run's header says of a trainer."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback

from unclamp.integrations.recorded import Framework


class Listener(Protocol):
    """Who hears of a training."""

    def begin(self) -> None:
        """Hear that it begins."""

    def stepped(self) -> None:
        """Hear that the optimizer has stepped."""

    def step_ended(self) -> None:
        """Hear that the step is over."""

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Hear of an evaluation."""


class Heard(TrainerCallback):
    """Passes on the events that Trainer does tell right."""

    def __init__(self, attached: Listener) -> None:
        self._attached = attached

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Pass it on."""
        self._attached.begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Pass it on."""
        self._attached.stepped()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Pass it on."""
        self._attached.step_ended()

    def on_evaluate(self, *_: Any, metrics: Mapping[str, Any] | None = None, **__: Any) -> None:
        """Pass it on."""
        self._attached.evaluated(metrics or {})


def framework_of(trainer: Trainer, inputs: Any = None) -> Framework:
    """Return what the header says of a trainer: the library's class that it is, or is made of.

    `inputs` is a micro-batch.
    """
    packages = {c: c.__module__.partition(".")[0] for c in type(trainer).__mro__}
    own = next(
        (c for c, package in packages.items() if package in ("trl", "transformers")), Trainer
    )
    package = sys.modules.get(packages.get(own, ""), transformers)
    return Framework(
        name=f"{package.__name__} {own.__name__}",
        version=getattr(package, "__version__", transformers.__version__),
        accumulation=trainer.args.gradient_accumulation_steps,
        precision=trainer.accelerator.mixed_precision,
        world_size=trainer.args.world_size,
        seed=trainer.args.seed,
        tokens_per_step=_tokens(trainer, inputs),
    )


def _tokens(trainer: Trainer, inputs: Any) -> int | None:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor):
        return None
    return ids.numel() * trainer.args.gradient_accumulation_steps * trainer.args.world_size
