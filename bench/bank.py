"""What experts in one parameter cost in FP8, next to plain layers of the same FLOPs.

The bank is a user's own: two products an expert, `unclamp.grouped_mm`, forward and backward. Plain
are linear layers with the same weights and the same tokens each, and torch's own grouped product.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from bench.timing import compare

EXPERTS, WIDTH, HIDDEN, TOKENS = 8, 512, 2048, 2048
ROUNDS = 9
CONVERTED = "converted bank"


class Bank(nn.Module):
    """Experts of two products each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each token's expert's output."""
        x = F.relu(unclamp.grouped_mm(x, self.up.mT, offs))
        return unclamp.grouped_mm(x, self.down.mT, offs)


class Layers(nn.Module):
    """The same experts as linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(EXPERTS))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each token's expert's output."""
        bounds = itertools.pairwise([0, *offs.tolist()])
        groups = [x[start:stop] for start, stop in bounds]
        return torch.cat([
            down(F.relu(up(group)))
            for group, up, down in zip(groups, self.up, self.down, strict=True)
        ])  # fmt: skip


def measure() -> dict[str, dict[str, float]]:
    """Time a step of each, and print its ratio to plain layers'."""
    torch.manual_seed(0)
    offs = torch.randint(1, TOKENS, (EXPERTS - 1,)).sort().values
    offs = torch.cat([offs, torch.tensor([TOKENS])]).to(torch.int32)
    x, gradient = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    models = {"plain layers": Layers(), "plain bank, torch's grouped_mm": Bank()}
    models |= {"converted layers": Layers(), CONVERTED: Bank(), "observed bank": Bank()}
    unclamp.convert(models["converted layers"], unclamp.Recipe())
    unclamp.convert(models[CONVERTED], unclamp.Recipe())
    unclamp.observe(models["observed bank"])
    return compare(
        f"{EXPERTS} experts, {WIDTH} to {HIDDEN} and back, {TOKENS} tokens, forward and backward",
        {name: _step(model, x, offs, gradient) for name, model in models.items()},
        target={CONVERTED: 1.20},
        rounds=ROUNDS,
    )


def _step(model: nn.Module, x: Tensor, offs: Tensor, gradient: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        tokens = x.clone().requires_grad_()
        model(tokens, offs).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.bank", description=__doc__).parse_args()
    measure()
