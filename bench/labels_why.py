"""How few labels make gradients clamp, and what the clamp does. Plain torch, without our casts.

    .venv/bin/python -m bench.labels runs/labels --why --seeds 100

A model of `bench.labels` is trained in high precision, as arm `hp` is. Before some of its few-label
steps, and without taking a step:

- Overshoot against the number of labels: largest gradient of a layer's output over the largest of
  the 16 steps before, which is what delayed scaling with a history of 16 takes for the scale.
- The same batch once more with each layer's incoming gradient clamped to that history, by a hook:
  size and direction of the gradient of each weight against those without; alone, with only this
  layer's gradient clamped, and in the chain, where every layer clamps what the others left.
- What of it enters Adam's moments, after gradient clipping, and for how long.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unclamp.study.config import StudyConfig
from unclamp.study.data import Batch, Batches, read_text
from unclamp.study.labels import with_few_labels
from unclamp.study.models import build_model

HISTORY = 16
COUNTS = (8, 16, 32, 64, 128, 256)
AT = (120, 220)
BATCHES = 8
WRITES = ("o_proj", "down_proj")
"""Layers that write to the residual stream."""


@dataclass
class Watched:
    """A training in high precision, and the largest gradients at its layers' outputs."""

    model: nn.Module
    layers: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    history: dict[str, deque[float]] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)

    def gradients(self, batch: Batch) -> float:
        """Compute the gradients of a batch anew; return the loss."""
        self.seen.clear()
        self.model.zero_grad()
        loss = self.model(input_ids=batch[0], labels=batch[1], use_cache=False).loss
        loss.backward()
        return loss.item()

    def limits(self) -> dict[str, float]:
        """Return the largest gradient of each layer over its history."""
        return {name: max(values) for name, values in self.history.items()}

    def weight_gradients(self) -> dict[str, Tensor]:
        """Return a copy of the gradient of each layer's weight."""
        found = {}
        for name, layer in self.layers.items():
            gradient = layer.get_parameter("weight").grad
            assert gradient is not None
            found[name] = gradient.clone()
        return found


def watched(study: StudyConfig, seed: int) -> Watched:
    """Return a fresh training, whose layers note the largest gradient of their outputs."""
    torch.manual_seed(seed)
    model = build_model(study.model)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    settings = study.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    made = Watched(model=model, layers=layers, optimizer=optimizer)
    made.history = {name: deque(maxlen=HISTORY) for name in layers}
    for name, layer in layers.items():
        layer.register_full_backward_pre_hook(_noting(made, name))
    return made


def _noting(made: Watched, name: str):
    def note(module: nn.Module, gradients: Any) -> None:
        made.seen[name] = gradients[0].abs().max().item()

    return note


@contextmanager
def clamped(made: Watched, limits: Mapping[str, float]) -> Iterator[None]:
    """Clamp the gradients of these layers' outputs to their limits."""

    def clamping(limit: float):
        return lambda module, gradients: (gradients[0].clamp(-limit, limit),)

    hooks = [
        made.layers[name].register_full_backward_pre_hook(clamping(limit))
        for name, limit in limits.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def moments(
    study: StudyConfig, seed: int, *, at: Sequence[int] = AT
) -> Iterator[tuple[int, Watched, Batches]]:
    """Train, and yield before each of these steps; what is done there must leave weights alone."""
    made = watched(study, seed)
    tokens = np.frombuffer(read_text((), seq_len=study.data.seq_len), dtype=np.uint8)
    shape = {"batch_size": study.data.batch_size, "seq_len": study.data.seq_len}
    batches = Batches(tokens, **shape, seed=seed)
    few = set(study.labels.few_label_steps(study.steps))
    for step in range(max(at) + 1):
        if step in at:
            yield step, made, batches
        batch = batches.batch(step)
        if step in few:
            batch = _few(study, batch)
        for group in made.optimizer.param_groups:
            group["lr"] = study.optimizer.lr * min(1.0, (step + 1) / study.optimizer.warmup_steps)
        made.gradients(batch)
        for name, amax in made.seen.items():
            made.history[name].append(amax)
        nn.utils.clip_grad_norm_(made.model.parameters(), study.optimizer.grad_clip)
        made.optimizer.step()


def _few(study: StudyConfig, batch: Batch) -> Batch:
    return with_few_labels(batch, labels=study.labels.labels, question=study.labels.question)


def _mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def overshoots(made: Watched, batches: Batches) -> dict[int, tuple[float, float, float, float]]:
    """Return by label count: overshoot of all layers, of those that write, of all at most, norm.

    The last is the norm of all gradients over that of the same batches wholly labelled. Labels are
    the text's own bytes, so that there is nothing but their number between one row and the next.
    """
    limits = made.limits()
    found = {}
    for labels in COUNTS:
        ratios: dict[str, list[float]] = {name: [] for name in limits}
        norms = []
        for n in range(BATCHES):
            batch = batches.batch(1_000_000 + n)
            made.gradients(batch)
            whole = _norm(made.model)
            made.gradients(with_few_labels(batch, labels=labels))
            norms.append(_norm(made.model) / whole)
            for name in limits:
                ratios[name].append(made.seen[name] / limits[name])
        each = {name: _mean(values) for name, values in ratios.items()}
        writes = [value for name, value in each.items() if name.endswith(WRITES)]
        top = max(max(values) for values in ratios.values())
        found[labels] = (_mean(list(each.values())), _mean(writes), top, _mean(norms))
    return found


def _norm(model: nn.Module) -> float:
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What clamping did to the gradient of one weight: its size over the true one, and cosine."""

    name: str
    norm: float
    cosine: float


def _effects(own: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> list[Effect]:
    return [
        Effect(
            name=name,
            norm=(own[name].norm() / true[name].norm()).item(),
            cosine=torch.cosine_similarity(own[name].flatten(), true[name].flatten(), dim=0).item(),
        )
        for name in own
    ]


def clamp_effects(made: Watched, batch: Batch) -> tuple[list[Effect], list[Effect]]:
    """Return the effects on each weight's gradient: alone, and in the chain."""
    made.gradients(batch)
    true, limits = made.weight_gradients(), made.limits()
    alone = {}
    for name, limit in limits.items():
        with clamped(made, {name: limit}):
            made.gradients(batch)
        alone[name] = made.weight_gradients()[name]
    with clamped(made, limits):
        made.gradients(batch)
    return _effects(alone, true), _effects(made.weight_gradients(), true)


@dataclass(frozen=True, kw_only=True)
class Entering:
    """What a step with clamped gradients puts into Adam's moments, of a group of parameters.

    Attributes:
        norm: Of the gradient after gradient clipping, over that of a step without clamping.
        cosine: Between the two.
        first: Share of exp_avg after the step that is this batch's, norms: clamped, not clamped.
        second: The same of exp_avg_sq, sums.
    """

    norm: float
    cosine: float
    first: tuple[float, float]
    second: tuple[float, float]


def entering(study: StudyConfig, made: Watched, batch: Batch) -> dict[str, Entering]:
    """Compute what a step would put into the moments, without taking it."""
    given = []
    for limits in (made.limits(), {}):
        with clamped(made, limits):
            made.gradients(batch)
        nn.utils.clip_grad_norm_(made.model.parameters(), study.optimizer.grad_clip)
        gradients = {}
        for name, weight in made.model.named_parameters():
            assert weight.grad is not None
            gradients[name] = weight.grad.clone()
        given.append(gradients)
    state = {name: made.optimizer.state[w] for name, w in made.model.named_parameters()}
    layers = {f"{name}.weight" for name in made.layers}
    writes = {name for name in layers if name.removesuffix(".weight").endswith(WRITES)}
    groups = {
        "o_proj, down_proj": writes,
        "the other layers in FP8": layers - writes,
        "not in FP8": given[0].keys() - layers,
    }
    return {group: _entering(given, state, names, study) for group, names in groups.items()}


def _entering(
    given: list[dict[str, Tensor]],
    state: Mapping[str, Mapping[str, Tensor]],
    names: Collection[str],
    study: StudyConfig,
) -> Entering:
    kept, squares_kept = study.optimizer.betas
    own, true = (torch.cat([each[name].flatten() for name in names]) for each in given)
    mean = torch.cat([state[name]["exp_avg"].flatten() for name in names])
    square = torch.cat([state[name]["exp_avg_sq"].flatten() for name in names])

    def first(gradient: Tensor) -> float:
        new = (1 - kept) * gradient
        return (new.norm() / (kept * mean + new).norm()).item()

    def second(gradient: Tensor) -> float:
        new = (1 - squares_kept) * gradient.square().sum()
        return (new / (squares_kept * square.sum() + new)).item()

    return Entering(
        norm=(own.norm() / true.norm()).item(),
        cosine=torch.cosine_similarity(own, true, dim=0).item(),
        first=(first(own), first(true)),
        second=(second(own), second(true)),
    )


def why(study: StudyConfig, seed: int, *, at: Sequence[int] = AT) -> None:
    """Print the tables of a seed, before each of these few-label steps."""
    for step, made, batches in moments(study, seed, at=at):
        print(f"\nseed {seed}, before step {step}")
        print("| labels | overshoot | of o_proj and down_proj | largest | norm of all gradients |")
        print("|---|---|---|---|---|")
        found = overshoots(made, batches)
        for labels, (every, writes, top, norm) in found.items():
            print(f"| {labels} | {every:.2f} | {writes:.2f} | {top:.1f} | {norm:.2f} |")
        for place, what in ((0, "overshoot"), (1, "of those that write"), (3, "norm")):
            logs = [math.log(found[n][place]) for n in COUNTS]
            slope = np.polyfit(np.log(COUNTS), logs, 1)[0]
            print(f"{what} goes as labels ** {slope:.2f}")
        batch = _few(study, batches.batch(step))
        for how, effects in zip(("alone", "in the chain"), clamp_effects(made, batch), strict=True):
            for group, is_in in (("o_proj, down_proj", True), ("the others", False)):
                some = [e for e in effects if e.name.endswith(WRITES) is is_in]
                print(
                    f"clamped {how}, {group}: norm {_mean([e.norm for e in some]):.3f} "
                    f"({min(e.norm for e in some):.3f} to {max(e.norm for e in some):.3f}), cosine "
                    f"{np.mean([e.cosine for e in some]):.3f} "
                    f"({min(e.cosine for e in some):.3f} to {max(e.cosine for e in some):.3f})"
                )
        made.gradients(batch)
        few = _norm(made.model)
        # The mean over few labels times their share of 508 is the sum over them by all labels.
        share = study.labels.labels / (batch[1].shape[0] * (batch[1].shape[1] - 1))
        top = max(made.seen[name] / limit for name, limit in made.limits().items())
        print(
            f"overshoot, largest: {top:.1f}; normalised by the labels of a whole batch "
            f"{top * share:.2f}"
        )
        made.gradients(batches.batch(step))
        print(f"norm of all gradients: {few:.2f} with few labels, {_norm(made.model):.2f} with all")
        for group, put in entering(study, made, batch).items():
            first, second = put.first, put.second
            print(
                f"into Adam, clamped over not, {group}: norm {put.norm:.3f}, cosine "
                f"{put.cosine:.3f}; share of exp_avg {first[0]:.2f} (not clamped "
                f"{first[1]:.2f}), of exp_avg_sq {second[0]:.2f} (not clamped {second[1]:.2f})",
                flush=True,
            )
    for beta in study.optimizer.betas:
        print(f"half-life with beta {beta}: {math.log(0.5) / math.log(beta):.1f} steps")
