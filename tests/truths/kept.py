"""A small converted model, and trainings of it, for tests of what is kept with a model."""

import torch
from torch import Tensor, nn
from torch.optim import SGD

from unclamp import Delayed, Recipe, convert


def fresh(recipe: Recipe | None = None, *, history_len: int = 4) -> nn.Sequential:
    """Return a converted model of two layers, of 6 to 8 to 4 features."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    convert(model, recipe or Recipe.uniform(Delayed(history_len=history_len)))
    return model


def train(model: nn.Module, steps: int, seed: int = 1, lr: float = 0.05) -> list[Tensor]:
    """Train for some steps, and return the output of each."""
    torch.manual_seed(seed)
    optimizer = SGD(model.parameters(), lr=lr)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(torch.randn(5, 6) * 3)
        y.square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def drive(model: nn.Module, *amaxes: float) -> None:
    """Take a step for each amax of the first layer's input, without a change of the weights."""
    optimizer = SGD(model.parameters(), lr=0.0)
    for amax in amaxes:
        model(torch.full((2, 6), amax)).sum().backward()
        optimizer.step()


def state_keys(model: nn.Module) -> list[str]:
    """Return the keys of scales and histories; the count of updates is kept beside them."""
    return [key for key in model.state_dict() if key.endswith(("_scale", "_amax_history"))]
