"""Tiny trainings with planted causes of a spike, whose truth is known by construction.

A *path* is a branch of linear layers. Its first layer reads a dense direction of the input, so
that the input itself has no outlier; at the spike's step a few tokens lie far out along it, and
the path's hidden channel 0 becomes an outlier of `size`. Each further layer of the path hands the
channel on, and casts it: one layer further is one clamped cast, two are two casts in series. Paths
add up: parallel causes. A *decoy* is a path whose result is multiplied by zero.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import unclamp
from unclamp.explain import Training

WIDTH = 32
TOKENS = 64
SPIKE = 30
GAIN = 8.0
"""The direction is small in the input, so that only hidden channels have outliers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is planted.

    `paths` holds a tuple of gains a path: one for each cast in series after the first layer, and
    the outlier's size grows by it. `parts` are the paths' shares of the output, `decoys` how many
    paths lead nowhere, `other` a cause that is not clamping.
    """

    paths: tuple[tuple[float, ...], ...] = ((1.0,),)
    parts: tuple[float, ...] = ()
    decoys: int = 1
    size: float = 64.0
    other: str = ""
    seed: int = 0
    dropout: float = 0.0
    scaling: unclamp.Delayed | unclamp.Static = field(default_factory=unclamp.Delayed)

    @property
    def culprits(self) -> list[tuple[str, str]]:
        """The planted sites."""
        return [
            (f"paths.{i}.{k + 1}", "input")
            for i, gains in enumerate(self.paths)
            for k in range(len(gains))
        ]


class Paths(nn.Module):
    """Paths that add up, and decoys that add nothing; a residual-free sum over 4 outputs each."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        self.direction = torch.ones(WIDTH) / WIDTH**0.5
        lengths = [len(gains) for gains in case.paths] + [1] * case.decoys
        self.paths = nn.ModuleList(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n + 1)))
            for n in lengths
        )
        self.drop = nn.Dropout(case.dropout)
        parts = list(case.parts or [1.0] * len(case.paths)) + [0.0] * case.decoys
        self.parts = parts
        gains = [*case.paths, *[(1.0,)] * case.decoys]
        with torch.no_grad():
            for path, gain in zip(self.paths, gains, strict=True):
                assert isinstance(path, nn.Sequential)
                for k, layer in enumerate(path):
                    noise = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
                    noise[0] = 0
                    noise[:, 0] = 0
                    layer.weight.copy_(noise)
                    if k == 0:
                        layer.weight[0] = GAIN * self.direction
                    else:
                        layer.weight[0, 0] = gain[k - 1]

    def forward(self, x: Tensor) -> Tensor:
        outputs = [
            self.drop(path(x)) * part for path, part in zip(self.paths, self.parts, strict=True)
        ]
        return torch.stack(outputs, 1)


def build(case: Case) -> Training:
    torch.manual_seed(case.seed)
    model = Paths(case)
    unclamp.convert(model, unclamp.Recipe.uniform(case.scaling))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    return Training(model=model, optimizer=optimizer, scheduler=scheduler)


def step(training: Training, batch: tuple[Tensor, ...]) -> Tensor:
    x, target, rate = batch
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-4 * float(rate)
    training.optimizer.zero_grad()
    loss = (training.model(x) - target).square().mean()
    loss.backward()
    training.optimizer.step()
    assert training.scheduler is not None
    training.scheduler.step()
    return loss


def batch(case: Case, number: int) -> tuple[Tensor, ...]:
    """Return inputs, targets (the teacher's outputs and noise of 1) and a factor for the rate."""
    generator = torch.Generator().manual_seed(1000 * case.seed + number)
    teacher = Paths(case)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    direction = teacher.direction
    x -= 0.9 * (x @ direction)[:, None] * direction
    spikes = number == SPIKE
    if spikes:
        x[:4] += case.size / GAIN * direction
    with torch.no_grad():
        teacher.drop.p = 0.0
        target = teacher(x)
    target += torch.randn(target.shape, generator=generator)
    rate = 1.0
    if spikes and case.other == "bad batch":
        target = target.flip(0) + 3
    if number == SPIKE - 1 and case.other == "learning rate":
        rate = 3000.0
    return x, target, torch.tensor(rate)
