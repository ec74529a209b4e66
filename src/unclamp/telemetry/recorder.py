"""Record a training run: what each step lost and earned, into a run log.

The casts already keep their statistics; the recorder listens to the ledger's updates and hands
the whole model's statistics of a step to the writer's thread as one tensor. The foreground
neither waits for a disk nor for a device.
"""

import json
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from unclamp.errors import RecipeError, UnclampWarning
from unclamp.nn.convert import find_ledgers
from unclamp.nn.ledger import Ledger, SwitchListener
from unclamp.numerics.stats import Stat, merge_stats
from unclamp.runlog import Columns, Header, RunLogWriter, Status
from unclamp.scaling import Delayed, Guarded, Scaling, scaling_to_dict
from unclamp.telemetry.rank import find_place
from unclamp.version import __version__

Number = float | int | Tensor
SILENT_STEPS = 8
"""Recorded steps without an optimizer step after which the user is told."""


class Recorder:
    """Write loss, scalars and the statistics of every cast of a model to a run folder.

    Call `step` once per optimizer step, after `optimizer.step()`. A model without converted
    layers records its loss and scalars only. Use it as a context manager: the run is closed as
    finished, failed (an exception) or interrupted (Ctrl-C), and stays readable in any case.

    Args:
        model: The model whose casts to record; convert it before.
        path: The run's folder, new or empty.
        metadata: Free JSON data for the header.
        flush_interval_s: At most so many seconds of the run are lost when it is killed.

    Raises:
        RunLogError: The folder holds a run or something else.

    Example:
        >>> with unclamp.Recorder(model, "runs/first") as recorder:  # doctest: +SKIP
        ...     for batch in loader:
        ...         recorder.step(loss=train_step(model, batch))
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        flush_interval_s: float = 2.0,
    ) -> None:
        ledgers = find_ledgers(model)
        place = find_place()
        header = Header(
            unclamp_version=__version__,
            world_size=place.world_size,
            run_id=place.run_id,
            recipe=_recipe_data(ledgers),
            environment=_environment(model),
            git_commit=_git_commit(),
            metadata=dict(metadata or {}),
        )
        self._writer = RunLogWriter(
            path, header=header, rank=place.rank, flush_interval_s=flush_interval_s
        )
        self._updates: list[tuple[int, Tensor]] = []
        self._unsubscribe: list[Callable[[], None]] = []
        self._has_sites = bool(ledgers)
        self._silent_steps = 0
        self._next_step = 0
        self._began = self._last = time.perf_counter()
        first = 0
        for ledger in ledgers:
            self._writer.add("sites", _site_columns(ledger, first))
            self._unsubscribe.append(ledger.subscribe(self._listener(first)))
            self._unsubscribe.append(ledger.subscribe_to_switches(self._switch_listener(ledger)))
            first += len(ledger.sites)

    def step(
        self,
        step: int | None = None,
        *,
        loss: Number | None = None,
        grad_norm: Number | None = None,
        lr: Number | None = None,
        **scalars: Number,
    ) -> None:
        """Record an optimizer step that has just been made.

        Args:
            step: Its number; one more than the last one without it, 0 at first.
            loss: Training loss. A tensor is read on the writer's thread.
            grad_norm: Norm of all gradients.
            lr: Learning rate.
            **scalars: Whatever else to record under its name.
        """
        step = self._next_step if step is None else step
        self._next_step = step + 1
        now = time.perf_counter()
        timing = {"time_s": [now - self._began], "step_ms": [(now - self._last) * 1e3]}
        self._last = now
        given = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        values = {name: _detached(v) for name, v in (given | scalars).items() if v is not None}
        self._writer.add("steps", lambda: _step_columns(step, values, timing))
        updates, self._updates = self._updates, []
        if updates:
            self._writer.add("casts", lambda: _cast_columns(step, updates))
        self._mind_silence(heard=bool(updates))

    def event(self, kind: str, step: int | None = None, **data: Any) -> None:
        """Record that something happened, with JSON data; at the coming step by default."""
        at = self._next_step if step is None else step
        self._writer.add("events", {"step": [at], "kind": [kind], "data": [json.dumps(data)]})

    def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        self._writer.flush()

    def close(self, status: Status = "finished") -> None:
        """Stop listening, write what is left and close the run. Later calls do nothing."""
        while self._unsubscribe:
            self._unsubscribe.pop()()
        self._writer.close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _listener(self, first: int) -> Callable[[Tensor], None]:
        return lambda pending: self._updates.append((first, pending))

    def _switch_listener(self, ledger: Ledger) -> SwitchListener:
        def record(switched: Mapping[int, tuple[Scaling, Scaling]]) -> None:
            sites = [
                {
                    "fqn": ledger.sites[index].fqn,
                    "role": ledger.sites[index].role,
                    "before": _scaling_data(before),
                    "after": _scaling_data(after),
                }
                for index, (before, after) in switched.items()
            ]
            self.event("switch", sites=sites)

        return record

    def _mind_silence(self, *, heard: bool) -> None:
        if not self._has_sites or heard:
            self._silent_steps = 0
            return
        self._silent_steps += 1
        if self._silent_steps == SILENT_STEPS:
            warnings.warn(
                f"{SILENT_STEPS} recorded steps without an optimizer step of this model: scales "
                "are not updated and casts not recorded. unclamp follows torch.optim optimizers "
                "that hold the model's parameters, and counts casts whose backward ran.",
                UnclampWarning,
                stacklevel=3,
            )


def _scaling_data(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data; a reduce function by its name."""
    reduce = getattr(scaling, "reduce", None)
    if not callable(reduce) or not isinstance(scaling, Delayed | Guarded):
        return scaling_to_dict(scaling)
    name = getattr(reduce, "__name__", repr(reduce))
    return {**scaling_to_dict(replace(scaling, reduce="max")), "reduce": name}


def _detached(value: Number) -> Number:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _step_columns(step: int, values: dict[str, Number], timing: dict[str, list[float]]) -> Columns:
    numbers = {name: float(value) for name, value in values.items()}
    known = {name: [numbers.pop(name, None)] for name in ("loss", "grad_norm", "lr")}
    return {"step": [step], **known, **timing, "scalars": [list(numbers.items())]}


def _cast_columns(step: int, updates: list[tuple[int, Tensor]]) -> Columns:
    """Return the rows of one step; several updates since the last step are merged."""
    merged: dict[int, Tensor] = {}
    for first, stats in updates:
        if first in merged:
            merge_stats(merged[first], stats)
        else:
            merged[first] = stats
    parts = []
    for first, stats in merged.items():
        table = stats.cpu().numpy()
        rows = np.flatnonzero(table[:, Stat.CASTS] > 0)
        parts.append(np.column_stack([rows + first, table[rows]]))
    sites, table = np.split(np.concatenate(parts), [1], axis=1)
    square, removed = table[:, Stat.SQUARE], table[:, Stat.SATURATED_SQUARE]
    counts = {
        field.name.lower(): table[:, field].astype(np.int64)
        for field in (
            Stat.ELEMENTS,
            Stat.SATURATED,
            Stat.UNDERFLOWED,
            Stat.NONFINITE,
            Stat.RECAST,
        )
    }
    return {
        "step": np.full(len(table), step),
        "site": sites[:, 0].astype(np.int32),
        "amax": np.maximum(table[:, Stat.AMAX], 0).astype(np.float32),
        "scale": (1 / table[:, Stat.SCALE_INV]).astype(np.float32),
        **counts,
        "saturated_error": np.divide(removed, square, out=np.zeros_like(square), where=square > 0),
        "microsteps": table[:, Stat.CASTS].astype(np.int32),
    }


def _site_columns(ledger: Ledger, first: int) -> Columns:
    scalings = [site.operand.scaling for site in ledger.sites]
    return {
        "site": list(range(first, first + len(ledger.sites))),
        "fqn": [site.fqn for site in ledger.sites],
        "role": [site.role for site in ledger.sites],
        "format": [site.operand.format.name for site in ledger.sites],
        "scaling": [scaling.kind for scaling in scalings],
        "history_len": [getattr(s, "history_len", None) for s in scalings],
        "granularity": [str(s.granularity) for s in scalings],
        "format_max": [site.operand.format.max for site in ledger.sites],
    }


def _recipe_data(ledgers: list[Ledger]) -> dict[str, Any] | None:
    """Return the recipe as plain data; None without one, or where a function is part of it."""
    recipe = ledgers[0].recipe if ledgers else None
    try:
        return None if recipe is None else recipe.to_dict()
    except RecipeError:
        return None


def _environment(model: nn.Module) -> dict[str, Any]:
    device = next((p.device.type for p in model.parameters()), "cpu")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """Return the commit of the folder the training runs in, None outside of one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
