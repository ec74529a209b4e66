"""What experts in one parameter cost in FP8, next to plain layers of the same FLOPs.

The bank is a user's own: two products an expert, `unclamp.grouped_mm`, forward and backward. Plain
are linear layers with the same weights and the same tokens each, and torch's own grouped product.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp

EXPERTS, WIDTH, HIDDEN, TOKENS = 8, 512, 2048, 2048
ROUNDS, WARMUP = 9, 2


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


def run() -> dict[str, Any]:
    """Measure, and return milliseconds of a step and their ratio to plain layers' step."""
    torch.manual_seed(0)
    sizes = torch.randint(1, 2 * TOKENS // EXPERTS, (EXPERTS - 1,))
    offs = torch.cat([sizes.cumsum(0).clamp(max=TOKENS), torch.tensor([TOKENS])]).to(torch.int32)
    x, gradient = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    models = {"plain layers": Layers(), "torch grouped_mm": Bank(), "converted layers": Layers()}
    models |= {"converted bank": Bank(), "observed bank": Bank()}
    for name in ("converted layers", "converted bank"):
        unclamp.convert(models[name], unclamp.Recipe())
    unclamp.observe(models["observed bank"])
    steps = {name: _step(model, x, offs, gradient) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUP + ROUNDS):
        for name, step in steps.items():  # in turn, so that a busy machine slows all alike
            began = time.perf_counter()
            step()
            if number >= WARMUP:
                times[name].append((time.perf_counter() - began) * 1e3)
    plain = times["plain layers"]
    return {
        "shape": f"{EXPERTS} experts, {WIDTH} to {HIDDEN} and back, {TOKENS} tokens",
        "rows": [
            {
                "name": name,
                "ms": round(statistics.median(each), 1),
                "ratio": round(
                    statistics.median(a / b for a, b in zip(each, plain, strict=True)), 2
                ),
            }
            for name, each in times.items()
        ],
    }


def _step(model: nn.Module, x: Tensor, offs: Tensor, gradient: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        tokens = x.clone().requires_grad_()
        model(tokens, offs).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def text(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    rows = [f"  {r['name']:<18}{r['ms']:>8.1f} ms  {r['ratio']:.2f}x" for r in result["rows"]]
    return "\n".join([f"bank of experts ({result['shape']}), a step:", *rows])


if __name__ == "__main__":
    print(text(run()))
