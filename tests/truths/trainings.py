"""Tiny trainings with planted causes of a spike, whose truth is known by construction.

A *path* is a branch of linear layers, with ReLU between them. Its first layer reads a dense
direction of the input, which is small there; at the spike's step a few tokens lie far out along
it, and the path's hidden channel 0 becomes an outlier. Each further layer hands the channel on,
and casts it: one such layer is one clamped cast, two are two casts in series. The outputs of paths
lie side by side in the target: parallel causes. A *decoy* is a path whose result is multiplied by
zero: it clamps as much, and harms nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import unclamp
from unclamp.explain import Explanation, Limits, Snapshots, Training, explain_spike
from unclamp.names import SiteName

WIDTH = 32
TOKENS = 64
SPIKE = 34
STEPS = SPIKE + 5
LR = 1e-4
GAIN = 8.0
"""The direction is small in the input, so that only hidden channels have outliers."""

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is planted.

    `paths` holds a tuple of gains a path: one for each cast in series after the first layer, by
    which the outlier grows on its way. `parts` are the sizes of the paths' outputs, `decoys` how
    many paths lead nowhere, `other` a cause that is not clamping.
    """

    paths: tuple[tuple[float, ...], ...] = ((1.0,),)
    parts: tuple[float, ...] = ()
    decoys: int = 1
    size: float = 64.0
    other: str = ""
    seed: int = 0
    dropout: float = 0.0
    scaling: unclamp.Delayed | unclamp.Static = field(default_factory=unclamp.Delayed)
    deterministic: bool = True

    @property
    def culprits(self) -> list[SiteName]:
        """The planted sites."""
        return [
            SiteName(f"paths.{i}.{k + 1}", "input")
            for i, gains in enumerate(self.paths)
            for k in range(len(gains))
        ]

    @property
    def spike(self) -> int:
        return SPIKE

    @property
    def recipe(self) -> unclamp.Recipe:
        return unclamp.Recipe.uniform(self.scaling)

    def build(self, recipe: unclamp.Recipe | None = None) -> Training:
        torch.manual_seed(self.seed)
        model = Paths(self)
        unclamp.convert(model, recipe or self.recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
        return Training(model=model, optimizer=optimizer, scheduler=scheduler)

    def step(self, training: Training, batch: Batch) -> Tensor:
        if not self.deterministic:
            batch = (batch[0] + 0.01 * torch.randn(WIDTH, generator=NOISE), *batch[1:])
        return step(training, batch)

    def batches(self) -> Iterator[Batch]:
        return (batch(self, number) for number in range(STEPS))


NOISE = torch.Generator()
"""A generator that no snapshot knows of."""


class Paths(nn.Module):
    """Paths side by side; outputs `[tokens, paths, WIDTH]`, zero for decoys."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        gains = [*case.paths, *[(1.0,)] * case.decoys]
        self.parts = list(case.parts or [1.0] * len(case.paths)) + [0.0] * case.decoys
        self.paths = nn.ModuleList()
        self.drop = nn.Dropout(case.dropout)
        for gain in gains:
            layers: list[nn.Module] = []
            for k in range(len(gain) + 1):
                layer = nn.Linear(WIDTH, WIDTH, bias=False)
                noise = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
                noise[0], noise[:, 0] = 0, 0
                if k == 0:
                    noise[0] = GAIN * direction()
                else:
                    noise[0, 0] = gain[k - 1]
                layer.weight = nn.Parameter(noise)
                layers += [layer] if k == 0 else [nn.ReLU(), layer]
            # Named by place, so that the k-th layer of the i-th path is paths.i.k.
            named = {str(k): layer for k, layer in enumerate(layers[::2])}
            self.paths.append(Branch(named))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.paths, self.parts, strict=True)
        return torch.stack([self.drop(path(x)) * part for path, part in pairs], 1)


class Branch(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.children()):
            x = layer(x if k == 0 else x.relu())
        return x


def direction() -> Tensor:
    return torch.ones(WIDTH) / WIDTH**0.5


def step(training: Training, batch: Batch) -> Tensor:
    x, target, rate = batch
    for group in training.optimizer.param_groups:
        group["lr"] = LR * float(rate)
    training.optimizer.zero_grad()
    loss = (training.model(x) - target).square().mean()
    loss.backward()
    training.optimizer.step()
    training.scheduler.step()
    return loss


@lru_cache(maxsize=4)
def teacher(case: Case) -> Paths:
    with torch.random.fork_rng():
        return Paths(case).eval()


def batch(case: Case, number: int) -> Batch:
    """Return inputs, targets (the teacher's outputs and noise of 1) and a factor for the rate."""
    generator = torch.Generator().manual_seed(1000 * case.seed + number)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    along = direction()
    x -= 0.9 * (x @ along)[:, None] * along
    if number == SPIKE:
        x[:4] += case.size / GAIN * along
    with torch.no_grad():
        target = teacher(case)(x)
    target += torch.randn(target.shape, generator=generator)
    if number == SPIKE and case.other == "bad batch":
        target = target.flip(0) + 3
    is_fast = number == SPIKE - 1 and case.other == "learning rate"
    return x, target, torch.tensor(5000.0 if is_fast else 1.0)


class AnyCase(Protocol):
    """A case of any model."""

    @property
    def recipe(self) -> unclamp.Recipe: ...
    @property
    def culprits(self) -> list[SiteName]: ...
    @property
    def scaling(self) -> unclamp.Delayed | unclamp.Static: ...
    @property
    def spike(self) -> int: ...
    def build(self, recipe: unclamp.Recipe | None = None) -> Training: ...
    def step(self, training: Training, batch: Any) -> Tensor: ...
    def batches(self) -> Iterator[Any]: ...


def record(
    case: AnyCase,
    run: Path,
    *,
    group_of: Callable[[int], str | int | None] = lambda n: None,
    **settings: object,
) -> list[float]:
    """Train a case into a run folder with snapshots; return its losses."""
    training = case.build()
    losses: list[float] = []
    functions = {"build": partial(case.build), "step": case.step}
    with (
        unclamp.Recorder(training.model, run) as recorder,
        Snapshots(
            training,
            run,
            recorder=recorder,
            **{"every": 5, "keep": 3, "after": 3, **functions, **settings},  # pyright: ignore
        ) as snapshots,
    ):
        for n, one in snapshots.follow(case.batches()):
            loss = case.step(training, one)
            recorder.step(n, loss=loss, group=group_of(n))
            snapshots.after(n, loss, group=group_of(n))
            losses.append(loss.item())
    return losses


def losses_with(case: AnyCase, unclamped: list[SiteName]) -> list[float]:
    """Train a case from its start with sites un-clamped by the recipe: the truth, by no replay."""
    recipe = case.recipe
    scaling = case.scaling
    free = (
        unclamp.Dynamic()
        if isinstance(scaling, unclamp.Static)
        else unclamp.Guarded(history_len=scaling.history_len, margin=scaling.margin)
    )
    for fqn in dict.fromkeys(site.fqn for site in unclamped):
        roles = {site.role: free for site in unclamped if site.fqn == fqn}
        recipe = recipe.override(f"^{fqn}", **roles)  # pyright: ignore
    training = case.build(recipe)
    return [case.step(training, one).item() for one in case.batches()]


def explain(case: AnyCase, run: Path, **limits: Any) -> Explanation:
    """Explain the spike of a recorded case, within limits as those of `Limits`."""
    return explain_spike(run, build=partial(case.build), step=case.step, limits=Limits(**limits))


@contextlib.contextmanager
def counting_steps() -> Iterator[list[int]]:
    """Count the steps that are done in this context, by the forwards of `Paths`."""
    done = [0]

    def hear(module: nn.Module, *_: object) -> None:
        done[0] += isinstance(module, Paths)

    handle = nn.modules.module.register_module_forward_hook(hear)
    try:
        yield done
    finally:
        handle.remove()


def default_build() -> Training:
    """The default case, for a command that finds it by name."""
    return Case().build()


def many_build() -> Training:
    """A case with five culprits, likewise."""
    return Case(paths=((1.0, 1.0), (1.0, 1.0), (1.0,)), decoys=4).build()
