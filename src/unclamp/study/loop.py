"""Train one arm with one seed, and record it. Deterministic: the same run twice, bit for bit."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.analysis.steering import Rule
from unclamp.autopilot import Autopilot
from unclamp.errors import UnclampWarning
from unclamp.explain.snapshots import Snapshots
from unclamp.explain.training import Training
from unclamp.recipe import Recipe
from unclamp.study.config import StudyConfig
from unclamp.study.data import Batch, Batches, read_text
from unclamp.study.labels import with_few_labels
from unclamp.study.marks import MARKS, PLANTED, Mark
from unclamp.study.models import (
    build_model,
    bytes_note,
    convert_arm,
    is_on_bytes,
    tokenize,
)
from unclamp.study.outlier import plant_batch
from unclamp.study.planting import plant, planting_of
from unclamp.telemetry import Every, Recorder


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run of a study: everything a worker needs, and nothing else."""

    config: StudyConfig
    scenario: str
    arm: str
    seed: int
    recipe: Recipe | None
    path: Path
    rule: Rule | None = None

    @property
    def backtest(self) -> Path:
        """Return the file that says how the rule did on logs, where there is a rule."""
        return self.path.parent / "backtest.json"

    @property
    def label(self) -> str:
        """Return the run's name for people."""
        return f"{self.scenario} / {self.arm} / seed {self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the run's numbers, as plain data."""
        config = self.config
        return {
            "scenario": self.scenario,
            "arm": self.arm,
            "seed": self.seed,
            "steps": config.steps,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            f"{self.mark.word.replace('-', '_')}_steps": self.marked_steps,
            "model": asdict(config.model) | {"skip": list(config.model.skip)},
            **({} if self.rule is None else {"autopilot": str(self.rule)}),
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what `build` makes the run's training of, as plain data."""
        return {
            "config": self.config.to_dict(),
            "scenario": self.scenario,
            "seed": self.seed,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
        }

    @property
    def mark(self) -> Mark:
        """Return how the marked steps are named; a scenario without any has none planted."""
        return MARKS.get(self.scenario, PLANTED)

    @property
    def marked_steps(self) -> list[int]:
        """Return the steps whose batch differs from the others."""
        return self.config.marked_steps(self.scenario)


INSPECT = Every(20, or_clamped=True)
"""Runs are short, and what clamped is what the report is about."""


class Stopped(Exception):
    """The run was asked to stop between two steps."""


def train(
    plan: RunPlan,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train and record one run; return "finished" or "interrupted".

    Args:
        plan: What to train.
        on_step: Called with the step and its loss after each step.
        should_stop: Asked before each step; True ends the run as interrupted.
    """
    config = plan.config
    training = _make_training(config, plan.scenario, plan.seed, plan.recipe)
    model = training.model
    batches = batches_of(config, model, plan.seed)
    recorder = Recorder(
        model,
        plan.path,
        metadata=plan.identity,
        notes=[bytes_note(config.model)] if is_on_bytes(config.model) else [],
        inspect=INSPECT,
        plain=plan.recipe is None,
    )
    what = planting_of(model).what if plan.scenario == "outlier" else plan.mark.what
    with recorder:
        for step in plan.marked_steps:
            recorder.event(plan.mark.word, step, what=what)
        try:
            _train_steps(plan, training, batches, recorder, on_step, should_stop)
        except Stopped:
            recorder.close("interrupted")
            return "interrupted"
    return "finished"


def batches_of(config: StudyConfig, model: nn.Module, seed: int) -> Batches:
    """Return the batches of a run, planted ones as they are before planting."""
    data = config.data
    tokens = tokenize(config.model, model, read_text(data.text, seq_len=data.seq_len))
    return Batches(tokens, batch_size=data.batch_size, seq_len=data.seq_len, seed=seed)


def build(
    *, config: dict[str, Any], scenario: str, seed: int, recipe: dict[str, Any] | None
) -> Training:
    """Make a run's training anew from `RunPlan.arguments`, for a replay."""
    plan = None if recipe is None else Recipe.from_dict(recipe)
    return _make_training(StudyConfig.from_dict(config), scenario, seed, plan)


def _make_training(
    config: StudyConfig, scenario: str, seed: int, recipe: Recipe | None
) -> Training:
    torch.manual_seed(seed)
    model = build_model(config.model)
    if scenario == "outlier":
        plant(model, seed=seed)
    if recipe is not None:
        convert_arm(model, recipe, config.model)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    warmup = max(1, settings.warmup_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warmup))
    model.train()
    return Training(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        settings={"grad_clip": settings.grad_clip},
    )


def do_step(training: Training, batch: Batch) -> Tensor:
    """Do one optimizer step; return its loss."""
    return _do_step(training, batch)[0]


def _do_step(training: Training, batch: Batch) -> tuple[Tensor, Tensor]:
    """Do one optimizer step; return loss and gradient norm."""
    model, optimizer = training.model, training.optimizer
    loss = model(input_ids=batch[0], labels=batch[1], use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), training.settings["grad_clip"])
    optimizer.step()
    training.scheduler.step()
    return loss, norm


def _train_steps(
    plan: RunPlan,
    training: Training,
    batches: Batches,
    recorder: Recorder,
    on_step: Callable[[int, float], None],
    should_stop: Callable[[], bool],
) -> None:
    with contextlib.ExitStack() as stack:
        snapshots = stack.enter_context(
            Snapshots(
                training,
                plan.path,
                build=build,
                step=do_step,
                arguments=plan.arguments,
                recorder=recorder,
            )
        )
        pilot = None if plan.rule is None else stack.enter_context(_pilot(plan, training, recorder))
        for step in range(plan.config.steps):
            if should_stop():
                raise Stopped
            batch = _batch(plan, training.model, batches, step)
            snapshots.before(step, batch)
            lr = training.optimizer.param_groups[0]["lr"]
            loss, norm = _do_step(training, batch)
            group = plan.mark.group if step in plan.marked_steps else None
            scalars = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": batch[0].numel()}
            recorder.step(step, group=group, **scalars)
            if pilot is not None:
                pilot.step(step)
            snapshots.after(step, loss)
            on_step(step, loss.item())


def _pilot(plan: RunPlan, training: Training, recorder: Recorder) -> Autopilot:
    with warnings.catch_warnings():
        # A study compares rules, those that are not good too; their file says how they did.
        warnings.simplefilter("ignore", UnclampWarning)
        return Autopilot(training.model, recorder, rule=plan.rule, backtest=plan.backtest)


def _batch(plan: RunPlan, model: nn.Module, batches: Batches, step: int) -> Batch:
    batch = batches.batch(step)
    if step not in plan.marked_steps:
        return batch
    if plan.scenario == "labels":
        few = plan.config.labels
        return with_few_labels(batch, labels=few.labels, question=few.question)
    pairs = planting_of(model).pairs(plan.marked_steps.index(step))
    share = plan.config.outlier.share
    return plant_batch(batch, seed=plan.seed, step=step, share=share, pairs=pairs)
