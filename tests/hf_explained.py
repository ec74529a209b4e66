"""A training of transformers' Trainer with one example unlike all others, and how it is made."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unclamp
from hf_training import Trainer, arguments
from unclamp.integrations.transformers import attach

SPIKE = 41
"""The step, as Trainer counts, whose batch has the example."""
STEPS = 50
BATCH = 16
RUN = "run"


class Net(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch, as Trainer wants it."""
        return {"loss": (self.layers(x) - y).square().mean()}


def examples() -> Any:
    """Return inputs and what a teacher makes of them; one input is large."""
    teacher, generator = Net().layers, torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * 2 * BATCH, 16, generator=generator)
    x[(SPIKE - 1) * 2 * BATCH + 3] *= 20
    with torch.no_grad():
        y = teacher(x) + 0.1 * torch.randn(x.shape, generator=generator)
    return [{"x": each, "y": target} for each, target in zip(x, y, strict=True)]


def made(recipe: unclamp.Recipe, run: Path | str | None, **asked: Any) -> Any:
    """Return a trainer that is attached, and what attach returned."""
    changes = {
        **{"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-4},
        **{"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"},
        **{"max_grad_norm": 100.0, "weight_decay": 0.01},
    }
    trainer = Trainer(model=Net(), args=arguments(Path(RUN), **changes), train_dataset=examples())
    return trainer, attach(trainer, recipe, run, **asked)


def build() -> Any:
    """Make the trainer as the run did."""
    recipe = unclamp.Recipe.uniform(unclamp.Delayed())
    return made(recipe, RUN, snapshots={"every": 5}, build=build)[0]
