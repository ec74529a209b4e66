"""A student beside its teacher: a regression in which single tokens make channels overflow.

Two residual blocks of LayerNorm and SwiGLU; channel 0 of each squares its input. The student
begins as the teacher with 2 % of noise. At every sixtieth step one token is large in that channel,
and what the blocks make of it decides the loss of the step.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.nn import convert
from unclamp.recipe import Recipe
from unclamp.telemetry import Every, Recorder

WIDTH, HIDDEN, BATCH = 128, 256, 512
STEPS, RARE_EVERY, RARE_VALUE = 800, 60, 30.0
RARE_STEPS = tuple(range(RARE_EVERY - 1, STEPS, RARE_EVERY))
INSPECT = Every(20, or_clamped=True)


class Teacher(nn.Module):
    """Two residual blocks of LayerNorm and SwiGLU; channel 0 of each squares its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(2))
        with torch.no_grad():
            for gate, up in zip(self.gates, self.ups, strict=True):
                for layer in (gate, up):
                    weight = layer.get_parameter("weight")
                    weight[0].zero_()
                    weight[0, 0] = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after both blocks."""
        for norm, gate, up, down in zip(self.norms, self.gates, self.ups, self.downs, strict=True):
            y = norm(x)
            x = x + down(F.silu(gate(y)) * up(y))
        return x


def student_of(recipe: Recipe, seed: int) -> tuple[Teacher, nn.Module]:
    """Return a teacher, and its converted student; seeds what `steps` draws as well."""
    torch.manual_seed(seed)
    teacher = Teacher()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    convert(student, recipe)
    return teacher, student


def steps(teacher: nn.Module, student: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Train the student; yield each step and its loss, after its update."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(STEPS):
        x = torch.randn(BATCH, WIDTH)
        if step in RARE_STEPS:
            x[0, 0] = RARE_VALUE
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step, loss.detach()


def train(recipe: Recipe, *, seed: int, path: Path) -> None:
    """Train a student and record it."""
    teacher, student = student_of(recipe, seed)
    with Recorder(student, path, inspect=INSPECT) as recorder:
        for step in RARE_STEPS:
            recorder.event("planted", step, what="one token that is large in one channel")
        for step, loss in steps(teacher, student):
            group = "planted" if step in RARE_STEPS else None
            recorder.step(step, loss=loss, group=group, tokens=BATCH)
