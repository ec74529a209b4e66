"""Record a training run: what each step lost and earned, into a run log.

The casts already keep their statistics; the recorder listens to the ledger's updates and hands
the whole model's statistics of a step to the writer's thread as one tensor. The foreground
neither waits for a disk nor for a device.
"""

import atexit
import functools
import json
import os
import platform
import subprocess
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from unclamp.errors import RecipeError, UnclampWarning
from unclamp.formats import Format
from unclamp.nn.convert import find_ledgers
from unclamp.nn.ledger import Ledger, SwitchListener, Update
from unclamp.runlog import Columns, Header, RunLogWriter, Status
from unclamp.scaling import Delayed, Guarded, Scaling, scaling_to_dict
from unclamp.telemetry.cadence import Every
from unclamp.telemetry.columns import Number, cast_columns, site_columns, step_columns
from unclamp.telemetry.rank import find_place
from unclamp.telemetry.sinks import NumbersFunction, Sink, Sinks
from unclamp.version import __version__

EVERY_STEP = Every()
EVERY_HUNDREDTH = Every(100)
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
        casts: The steps whose casts are written. Every cast is counted whatever this says.
        inspect: The steps whose casts get a closer look as well (SQNR, exponents, range in use,
            headroom, age of the scale), at the price of a pass over each tensor; None for
            none. Of `or_clamped`'s additional steps, the casts that clamped. On a device other
            than the CPU `or_clamped` inspects every cast, since only the device knows.
        sinks: Where else the numbers go: `TensorBoard(...)`, `WandB(...)`, `MLflow(...)`, a
            function of step and numbers, or an object with the methods of
            `unclamp.telemetry.Sink`. One that fails is dropped with a warning.
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
        casts: Every = EVERY_STEP,
        inspect: Every | None = EVERY_HUNDREDTH,
        sinks: Iterable[Sink | NumbersFunction] = (),
        flush_interval_s: float = 2.0,
    ) -> None:
        place = find_place()
        self._sinks = Sinks(sinks, rank=place.rank)
        self._ledgers = ledgers = find_ledgers(model)
        self._model = weakref.ref(model)
        self._casts, self._inspect = casts, inspect
        header = Header(
            unclamp_version=__version__,
            world_size=place.world_size,
            run_id=place.run_id,
            recipe=_recipe_data(ledgers),
            environment=_environment(model),
            git_commit=_git_commit(),
            metadata=_metadata(ledgers, metadata),
        )
        self._writer = RunLogWriter(
            path, header=header, rank=place.rank, flush_interval_s=flush_interval_s
        )
        self._updates: list[tuple[int, Update]] = []
        self._unsubscribe: list[Callable[[], None]] = []
        self._formats: dict[int, Format] = {}
        self._silent_steps = 0
        self._is_first = True
        self._is_told_of_order = False
        self._next_step = 0
        self._began = self._last = time.perf_counter()
        first, pieces = 0, []
        for ledger in ledgers:
            pieces.append(site_columns(ledger, first))
            self._writer.add("sites", pieces[-1])
            self._formats |= {first + i: s.operand.format for i, s in enumerate(ledger.sites)}
            self._unsubscribe.append(ledger.subscribe(self._listener(first)))
            self._unsubscribe.append(ledger.subscribe_to_switches(self._switch_listener(ledger)))
            first += len(ledger.sites)
        self._sinks.start(header, *pieces)
        self._process = os.getpid()  # a fork inherits the exit hook, and must not end the sinks
        atexit.register(self.close, "interrupted")
        self._inspect_at(0)

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
        if not self._updates:  # in a CUDA graph no listener is called
            for ledger in self._ledgers:
                ledger.replayed()
        updates, self._updates = self._updates, []
        row = functools.cache(lambda: step_columns(step, values, timing))
        self._writer.add("steps", row)
        if updates or self._sinks:
            self._writer.add("casts", lambda: self._rows(step, updates, row))
        self._sinks.warn()
        self._inspect_at(step + 1)
        self._mind_order(heard=bool(updates))
        self._mind_silence(heard=bool(updates))

    def event(self, kind: str, step: int | None = None, **data: Any) -> None:
        """Record that something happened, with JSON data; at the coming step by default."""
        at = self._next_step if step is None else step
        text = json.dumps(data)

        def columns() -> Columns:
            self._sinks.event(at, kind, data)
            return {"step": [at], "kind": [kind], "data": [text]}

        self._writer.add("events", columns)

    def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        self._writer.flush()

    def close(self, status: Status = "finished") -> None:
        """Stop listening, write what is left and close the run. Later calls do nothing."""
        if os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        while self._unsubscribe:
            self._unsubscribe.pop()()
        for ledger in self._ledgers:
            ledger.inspect("never")
        self._writer.close(status)
        self._sinks.close(status)
        self._sinks.warn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _rows(
        self, step: int, updates: list[tuple[int, Update]], row: Callable[[], Columns]
    ) -> Columns:
        """Tell the sinks of a step and return its casts to write, on the writer's thread."""
        columns = cast_columns(step, updates, self._formats) if updates else {}
        self._sinks.step(step, row(), columns or None)
        if not columns:
            return columns
        is_due = self._casts.is_due(step) or (self._casts.or_clamped and columns["saturated"].any())
        return columns if is_due else {}

    def _inspect_at(self, step: int) -> None:
        """Have the casts of a coming step inspected if they are due."""
        if self._inspect is None:
            return
        fallback = "clamped" if self._inspect.or_clamped else "never"
        for ledger in self._ledgers:
            ledger.inspect("always" if self._inspect.is_due(step) else fallback)

    def _listener(self, first: int) -> Callable[[Update], None]:
        return lambda update: self._updates.append((first, update))

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

    def _mind_order(self, *, heard: bool) -> None:
        """Tell of casts that come a step late, or never, once."""
        model, is_first, self._is_first = self._model(), self._is_first, False
        if is_first and not self._ledgers and model is not None and find_ledgers(model):
            _warn(
                "the model was converted after its Recorder was made, which records no casts: "
                "make the Recorder after unclamp.convert."
            )
        if self._is_told_of_order:
            return
        if heard and any(ledger.has_pending for ledger in self._ledgers):
            self._is_told_of_order = True
            _warn(
                "Recorder.step was called between backward and optimizer.step, so that casts are "
                "recorded a step late: call it after optimizer.step()."
            )

    def _mind_silence(self, *, heard: bool) -> None:
        if not self._ledgers or heard:
            self._silent_steps = 0
            return
        self._silent_steps += 1
        if self._silent_steps == SILENT_STEPS:
            _warn(
                f"{SILENT_STEPS} recorded steps without an optimizer step of this model: scales "
                "are not updated and casts not recorded. unclamp follows torch.optim optimizers "
                "that hold the model's parameters, and counts casts whose backward ran."
            )


def _warn(message: str) -> None:
    """Warn where the user called `Recorder.step`."""
    warnings.warn(message, UnclampWarning, stacklevel=4)


def _scaling_data(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data; a reduce function by its name."""
    reduce = getattr(scaling, "reduce", None)
    if not callable(reduce) or not isinstance(scaling, Delayed | Guarded):
        return scaling_to_dict(scaling)
    name = getattr(reduce, "__name__", repr(reduce))
    return {**scaling_to_dict(replace(scaling, reduce="max")), "reduce": name}


def _detached(value: Number) -> Number:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _metadata(ledgers: list[Ledger], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the user's metadata; with `observed` where casts are only counted."""
    is_observed = any(ledger.observes for ledger in ledgers)
    return dict(given or {}) | ({"observed": True} if is_observed else {})


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
