"""Tiny trainings in which a clamp does its harm many steps later, whose truth training anew tells.

A *rare* token has nothing in its input but one channel that all other tokens lack: what a clamp
does to the weights of that channel shows only when such tokens come again, at the spike. At the
*harm*, some steps before, they come for the first time, and with a term of the loss that is linear
in the output, an advantage as in policy gradients. Its gradients cancel unless one is clamped.

- "grad_output": one token's gradient is large, eight others' are an eighth of it against it.
  Clamped, all are alike, and the rest bends the channel's weights, for as long as momentum lasts.
- "weight": a row of weights jumps, by one large and eight smaller ones against it; what comes
  through it to the layer before cancels, unless the large one is clamped.
- "optimizer": one large gradient makes Adam's second moment, and so later steps small. Clamped, it
  leaves them large, and rare tokens that come again and again move the weights far.

With another cause of the spike, the rare tokens do not come again, so that what the clamp bent is
not read; or the same is done to a branch that leads nowhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import unclamp
from unclamp.explain import Training
from unclamp.names import SiteName

WIDTH = 32
TOKENS = 64
SPIKE = 60
STEPS = SPIKE + 5
RARE = 3.0
"""A rare token's only channel: as large as ordinary channels get, so that no input clamps."""
AGAINST = 32
"""So many rare tokens have a gradient against that of the first, each of a part of its size."""
NOISE = 0.3
USUAL = 1.2e-3
"""About the largest gradient of an ordinary batch: the mean square of the noise is over all."""

Through = Literal["grad_output", "weight", "optimizer"]
Batch = dict[str, Tensor]

RATES: dict[Through, dict[int, float]] = {
    "grad_output": {2: 0.4, 4: 0.2, 6: 0.15, 8: 0.15, 12: 0.1, 16: 0.1},
    "weight": {2: 0.4, 4: 0.3, 6: 0.2, 8: 0.15, 12: 0.15, 16: 0.1},
    "optimizer": {4: 0.03, 6: 0.015, 8: 0.01, 12: 0.007, 16: 0.005},
}
"""Learning rates by delay: the fewer steps the harm has, the larger."""


@dataclass(frozen=True, kw_only=True)
class DelayCase:
    """What is planted: a path of harm, and how many steps later it shows.

    `other` is a cause that is not clamping, and `harmed` the branch whose weights are bent: the
    real one, or one whose output is multiplied by zero.
    """

    through: Through = "grad_output"
    delay: int = 8
    other: str = ""
    harmed: Literal["real", "decoy"] = "real"
    seed: int = 0
    dropout: float = 0.0
    scaling: unclamp.Delayed | unclamp.Static = field(default_factory=unclamp.Delayed)

    @property
    def harm(self) -> int:
        return SPIKE - self.delay

    @property
    def culprits(self) -> list[SiteName]:
        """The planted sites."""
        return [] if self.other else self.suspects

    @property
    def suspects(self) -> list[SiteName]:
        """The sites that clamp at the harm, whether that matters at the spike or not."""
        role = "weight" if self.through == "weight" else "grad_output"
        return [SiteName(f"{self.harmed}.out", role)]

    @property
    def involved(self) -> list[SiteName]:
        """The planted sites, and one that clamps what the first clamp has spoilt, which protects.

        The smallest set that mends the spike is that of the planted ones alone.
        """
        if self.other or self.through != "weight":
            return self.culprits
        return [*self.culprits, SiteName(f"{self.harmed}.before", "grad_output")]

    @property
    def spike(self) -> int:
        return SPIKE

    @property
    def recipe(self) -> unclamp.Recipe:
        return unclamp.Recipe.uniform(self.scaling)

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        rate = RATES[self.through][self.delay]
        model = Branches(self)
        unclamp.convert(model, recipe or self.recipe)
        if self.through == "optimizer":
            optimizer: Any = torch.optim.Adam(model.parameters(), lr=rate)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        return Training(model=model, optimizer=optimizer)

    def step(self, training: Training, batch: Batch) -> Tensor:
        return step(training, batch)

    def batches(self) -> Iterator[Batch]:
        teacher = Branches(self)
        return (self.batch(teacher, number) for number in range(STEPS))

    def batch(self, teacher: "Branches", number: int) -> Batch:
        """Return inputs, targets, the linear term, what jumps and a factor for the rate."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        x[:, 0] = 0
        rare = self._rare(number)
        x[:rare] = 0
        x[:rare, 0] = RARE
        target = teacher.real(x).detach()
        target += NOISE * torch.randn(target.shape, generator=generator)
        term = torch.zeros(TOKENS, WIDTH)
        jump = torch.zeros(WIDTH)
        self._harm(number, term, jump)
        is_late = number == SPIKE - 1
        if number == SPIKE and self.other == "bad batch":
            target = target.flip(0) + 1
        rate = 200.0 if is_late and self.other == "learning rate" else 1.0
        return {"x": x, "target": target, "term": term, "jump": jump, "rate": torch.tensor(rate)}

    def _rare(self, number: int) -> int:
        """Return how many tokens are rare: the first ones."""
        if number == SPIKE and not self.other:
            return TOKENS
        if number == self.harm:
            return 1 + AGAINST
        return 2 if self.through == "optimizer" and self.harm < number < SPIKE else 0

    def _harm(self, number: int, term: Tensor, jump: Tensor) -> None:
        if self.through == "optimizer":
            if number == self.harm:
                term[0] = 64 * USUAL
            elif self.harm < number < SPIKE:
                term[:2] = 0.8 * USUAL
        elif number == self.harm and self.through == "grad_output":
            term[0] = AGAINST * 8 * USUAL
            term[1 : 1 + AGAINST] = -8 * USUAL
        elif number == self.harm:
            jump[:3], jump[3:27] = 4.0, -0.5
            term[: 1 + AGAINST, :27] = 0.5 * USUAL


class Branch(nn.Module):
    """One layer or two, in which the rare channel, and hidden channel 0, say nothing yet."""

    def __init__(self, generator: torch.Generator, *, depth: int) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)]
        for layer in layers:
            noise = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            noise[:, 0] = 0
            layer.weight = nn.Parameter(noise)
        if depth > 1:
            with torch.no_grad():
                layers[0].weight[0] = 0
            self.before = layers[0]
        self.out = layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.before(x) if hasattr(self, "before") else x)


class Branches(nn.Module):
    """One branch that counts and one that leads nowhere, which the linear term may be about."""

    def __init__(self, case: DelayCase) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        depth = 2 if case.through == "weight" else 1
        self.real, self.decoy = (Branch(generator, depth=depth) for _ in range(2))
        self.drop = nn.Dropout(case.dropout)
        self.harmed = case.harmed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and that of the branch that is harmed."""
        real, decoy = self.drop(self.real(x)), self.decoy(x)
        return real + 0.0 * decoy, decoy if self.harmed == "decoy" else real


def step(training: Training, batch: Batch) -> Tensor:
    model: Any = training.model
    with torch.no_grad():
        getattr(model, model.harmed).out.weight[:, 0] += batch["jump"]
    lr = training.optimizer.defaults["lr"]
    for group in training.optimizer.param_groups:
        group["lr"] = lr * float(batch["rate"])
    training.optimizer.zero_grad()
    out, harmed = model(batch["x"])
    loss = (out - batch["target"]).square().mean()
    (loss + (batch["term"] * harmed).sum()).backward()
    training.optimizer.step()
    return loss


@dataclass(frozen=True, kw_only=True)
class TrainCase(DelayCase):
    """One far clamp behind two spikes: a long one, in which some tokens are rare, and that of all.

    In the long one nothing is learnt, so that the weights stay as bent as they are.
    """

    through: Through = "grad_output"
    delay: int = 16
    seed: int = 11
    long: range = range(50, 58)
    rare_then: int = 24

    def batch(self, teacher: Branches, number: int) -> Batch:
        faster = 3.0 if number >= self.harm else 1.0
        rate = 0.0 if number in self.long else faster
        return {**super().batch(teacher, number), "rate": torch.tensor(rate)}

    def _rare(self, number: int) -> int:
        return self.rare_then if number in self.long else super()._rare(number)


@dataclass(frozen=True, kw_only=True)
class ShiftCase(DelayCase):
    """A far clamp behind a spike on top of a loss that rose for good, 72 steps earlier."""

    through: Through = "grad_output"
    delay: int = 12
    seed: int = 3
    before: int = 40
    risen: int = 28

    @property
    def spike(self) -> int:
        return SPIKE + self.before

    def batches(self) -> Iterator[Batch]:
        teacher = Branches(self)
        for number in range(self.before + STEPS):
            batch = self.batch(teacher, number - self.before)
            if number >= self.risen:
                generator = torch.Generator().manual_seed(number)
                batch["target"] += NOISE * torch.randn(TOKENS, WIDTH, generator=generator)
            yield batch
