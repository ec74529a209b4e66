"""Record a training run: what each step lost and earned, into a run log.

The casts already keep their statistics; the recorder listens to the ledger's updates and hands
the whole model's statistics of a step to the writer's thread as one tensor. The foreground
neither waits for a disk nor for a device.
"""

import atexit
import functools
import itertools
import json
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

from torch import nn

from unclamp.covered import CoverageReport
from unclamp.errors import RunLogError, UnclampWarning, did_you_mean, naming_arguments
from unclamp.nn.attach import find_ledgers
from unclamp.nn.ledger import Ledger
from unclamp.nn.unmatched import any_in_fp8
from unclamp.nn.update import Inspection, SwitchListener, Update
from unclamp.runlog import COVERAGE_EVENT, OUTSIDE_EVENT, Columns, Every, RunLogWriter, Status
from unclamp.scaling import Scaling
from unclamp.telemetry.columns import Number, cast_columns, step_columns
from unclamp.telemetry.given import cadence, checked
from unclamp.telemetry.group import Name, group_name
from unclamp.telemetry.header import make_header, switch_data
from unclamp.telemetry.numbering import Numbering
from unclamp.telemetry.outside import Outside, outside_text, remembered
from unclamp.telemetry.rank import find_place
from unclamp.telemetry.sinks import NumbersFunction, Sink, Sinks
from unclamp.telemetry.sinks.feed import SinkFeed
from unclamp.telemetry.source import Source
from unclamp.telemetry.uncast import Uncast

Heard = tuple[list[int], Update]
"""An update, and the ids of the sites that it has rows of."""
EVERY_STEP = Every()
EVERY_HUNDREDTH = Every(100)
NOTHING_TO_COUNT = (
    "no layer of the model is in FP8, so that the run records no casts, and that nothing is "
    "clamped in it says nothing of FP8: make the Recorder after unclamp.convert or "
    "unclamp.observe; for a baseline without FP8 say Recorder(..., plain=True)"
)
SILENT_STEPS = 8
"""Recorded steps without an optimizer step after which the user is told."""


class Recorder:
    """Write loss, scalars and the statistics of every cast of a model to a run folder.

    Call `step` once per optimizer step, after `optimizer.step()`; with several optimizers, after
    all of them. Of a model without converted layers it records loss and scalars only, warns, and
    notes in the header that no layer was in FP8; for a baseline that is meant so, say `plain=True`.
    Use it as a context manager: the run is closed as finished, failed (an exception) or interrupted
    (Ctrl-C), and stays readable in any case. Its `next_step` is the number of the coming step.

    Args:
        model: The model whose casts to record; convert it before.
        path: The run's folder, new or empty. With "{n}" in it, "runs/first-{n}", the first free
            number from 1 on takes its place; the attribute `path` is the real folder.
        metadata: Free JSON data for the header.
        notes: Sentences that a reader of the run must see beside its figures.
        plain: The model is meant to have no layer in FP8.
        casts: The steps whose casts are written, and those that `inspect` names. Optimizer steps
            that nobody records are counted into the next one that is.
        inspect: The steps whose casts get a closer look as well (SQNR, exponents, range in use,
            headroom, age of the scale), at the price of a pass over each tensor; None for
            none. In the steps between, `or_clamped` inspects only the casts that clamped. On a
            device other than the CPU it inspects every cast, since only the device knows. On a
            CPU what a clamped gradient does to the weight's is measured between them as well,
            where at most an eighth of the tokens clamped, and what clamped inputs and weights
            did to the loss (`price_clamp`), unless it is None.
        price_rounding: Whether inspected steps also tell what rounding did to the loss. In such a
            step each product keeps its operands themselves until backward, beside their codes.
        coverage: What `unclamp.coverage` found of a batch; by default what `convert` or `observe`
            found of its `example`. The log and the page show it; a module that runs and did not
            in its step is named, in a warning and in the log.
        sinks: Where else the numbers go: `TensorBoard(...)`, `WandB(...)`, `MLflow(...)`, a
            function of step and numbers, or an object with the methods of
            `unclamp.telemetry.Sink`. One that fails is dropped with a warning.
        overwrite: Replace a run that is in the folder: only a run, and none that another process
            still writes. One that this process records and has not closed is closed first.
        resume: Go on with a run that is in the folder and has ended, however it did, in a new
            attempt: what it had recorded from the new first step on counts no more. A new or
            empty folder begins a run, so a script that torchrun starts again says it always.
            `step` is then to be told its number at first.
        flush_interval_s: At most so many seconds of the run are lost when it is killed.

    Raises:
        RunLogError: The folder holds a run or something else; or the model has layers in FP8, and
            should be `plain`.

    Example:
        >>> with unclamp.Recorder(model, "runs/first") as recorder:  # doctest: +SKIP
        ...     for batch in loader:
        ...         recorder.step(loss=train_step(model, batch))
    """

    @naming_arguments
    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        plain: bool = False,
        casts: Every | int = EVERY_STEP,
        inspect: Every | int | None = EVERY_HUNDREDTH,
        price_rounding: bool = False,
        coverage: CoverageReport | None = None,
        sinks: Iterable[Sink | NumbersFunction] = (),
        overwrite: bool = False,
        resume: bool = False,
        flush_interval_s: float = 2.0,
    ) -> None:
        self._casts = cadence(casts, "casts")
        self._inspect = None if inspect is None else cadence(inspect, "inspect")
        self._whole: Inspection = "priced" if price_rounding else "always"
        place = find_place()
        self._sinks = Sinks(sinks, rank=place.rank)
        self._feed = SinkFeed()
        ledgers = find_ledgers(model)
        self._model = weakref.ref(model)
        header = make_header(
            model,
            ledgers,
            place,
            metadata=metadata,
            notes=notes,
            plain=plain,
            casts=self._casts,
            inspect=self._inspect,
        )
        if not (plain or any_in_fp8(ledgers)):
            # One more: `naming_arguments` stands between.
            warnings.warn(NOTHING_TO_COUNT, UnclampWarning, stacklevel=3)
        self._writer = RunLogWriter(
            path,
            header=header,
            rank=place.rank,
            flush_interval_s=flush_interval_s,
            overwrite=overwrite,
            resume=resume,
            before_replacing=lambda: _close_recorder_of(path),
        )
        _OPEN[self.path.resolve()] = self
        self._sources = [Source(ledger, self._note_commits) for ledger in ledgers]
        self._uncast = Uncast()
        coverage = remembered(model, ledgers) if coverage is None else coverage
        self._outside = Outside(model, ledgers, coverage)
        # No other rank counts in the same numbers: an id is one of its run.
        free_ids = itertools.count(self._writer.first_site + place.rank, place.world_size)
        self._numbering = Numbering(self._sources, free_ids)
        self._asks_for_step = resume
        self._silent_steps = 0
        self._is_first = True
        self._is_told_of_order = False
        self.next_step = 0
        self._latest: tuple[int, str | None] = (-1, None)
        self._began = self._last = time.perf_counter()
        pieces = self._numbering.number()
        if place.world_size == 1:  # else it is said which of them others have too, once known
            self._write_sites()
        self._switches = [
            ledger.subscribe_to_switches(self._switch_listener(ledger)) for ledger in ledgers
        ]
        self._sinks.start(header, *pieces)
        self._process = os.getpid()  # a fork inherits the exit hook, and must not end the sinks
        atexit.register(self.close, "interrupted")
        self._inspect_at(0)
        if coverage is not None:
            self.event(COVERAGE_EVENT, **coverage.summary())

    @property
    def path(self) -> Path:
        """The run's folder, with its number."""
        return self._writer.path

    def step(
        self,
        step: int | None = None,
        *,
        loss: Number | None = None,
        grad_norm: Number | None = None,
        lr: Number | None = None,
        group: Name = None,
        **scalars: Number,
    ) -> None:
        """Record an optimizer step that has just been made.

        Where no optimizer of the model was seen so far and nobody calls `unclamp.step`, this
        updates the scales too, if the weights have changed since the last call: they have not
        where a gradient scaler skipped the step.

        Args:
            step: Its number; one more than the last one without it, 0 at first.
            loss: Training loss. A tensor is read on the writer's thread.
            grad_norm: Norm of all gradients.
            lr: Learning rate.
            group: The kind of the step's batch, under any name, such as "answers" or 3. Where kinds
                differ in their usual loss, each loss is then judged among its own kind. It
                belongs to the whole step: call a step whose microsteps were of two kinds by a
                name of its own.
            **scalars: Whatever else to record under its name. `loss_scale` says what the loss was
                multiplied by before its backward: `scaler.get_scale()` before `scaler.update()`.
                Prices of casts are divided by it.

        Raises:
            RunLogError: Something is neither a number nor a tensor of one, the group is no name,
                or the step is negative; nothing is recorded.
        """
        kind = group_name(group)
        given = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        values = {n: checked(n, v) for n, v in (given | scalars).items() if v is not None}
        if step is None and self._asks_for_step:
            raise RunLogError(
                "a Recorder with resume=True does not know where the training goes on: call "
                "step(number, loss=...) with the number of the step, at least the first time"
            )
        step = self.next_step if step is None else step
        if step < 0:
            raise RunLogError(f"expected the number of a step, 0 or above, got {step}")
        self.next_step, self._asks_for_step = step + 1, False
        self._latest = (step, kind)
        now = time.perf_counter()
        timing = {"time_s": [now - self._began], "step_ms": [(now - self._last) * 1e3]}
        self._last = now
        self._numbering.number()
        self._write_sites()
        updates = [heard for source in self._sources if (heard := source.take()) is not None]
        row = functools.cache(lambda: step_columns(step, values, timing, kind))
        self._writer.add("steps", row)
        if self._writer.failure is not None and self._sinks:  # the sinks go on without the log
            self._feed.put(lambda: self._tell_sinks(step, updates, row))
        elif updates or self._sinks:
            scale = values.get("loss_scale", 1.0)
            self._writer.add("casts", lambda: self._rows(step, updates, row, scale))
        if updates and (look := self._uncast.look(self._sources)) is not None:
            self._writer.add("events", lambda: self._uncast.columns(step, look))
        self._warn_of_threads()
        if outside := self._outside.take():
            self.event(OUTSIDE_EVENT, step, modules=outside)
            _warn(outside_text(outside))
        self._inspect_at(step + 1)
        self._mind_order(heard=bool(updates))
        self._mind_silence(heard=bool(updates))

    def group_of(self, step: int) -> str | None:
        """Return the group that a step was recorded with if it is the latest; None otherwise."""
        latest, group = self._latest
        return group if latest == step else None

    def event(self, kind: str, step: int | None = None, **data: Any) -> None:
        """Record that something happened, with JSON data; at the coming step by default.

        Raises:
            RunLogError: The data are not JSON data; NaN and Inf are none.
        """
        at = self.next_step if step is None else step
        try:
            text = json.dumps(data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RunLogError(f"expected JSON data for the event {kind!r}: {error}") from error

        def columns() -> Columns:
            if self._sinks:
                self._feed.put(lambda: self._sinks.event(at, kind, data))
            return {"step": [at], "kind": [kind], "data": [text]}

        self._writer.add("events", columns)

    def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        self._writer.flush()

    def close(self, status: Status = "finished") -> None:
        """Stop listening, write what is left and close the run. Later calls do nothing.

        Raises:
            RunLogError: There is no such status.
        """
        if os.getpid() != self._process:
            return
        if status not in get_args(Status):
            hint = did_you_mean(status, get_args(Status))
            raise RunLogError(f"status must be one of {get_args(Status)}, got {status!r}{hint}")
        self._outside.close()
        for source in self._sources:
            source.close()
        while self._switches:
            self._switches.pop()()
        self._write_sites()
        self._writer.close(status)
        self._feed.close()
        self._sinks.close(status)
        atexit.unregister(self.close)  # not before: after Ctrl-C in here the exit closes the rest
        self._warn_of_threads()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _write_sites(self) -> None:
        for rows in self._numbering.take(self._model()):
            self._writer.add("sites", rows)

    def _rows(
        self, step: int, updates: list[Heard], row: Callable[[], Columns], scale: Number
    ) -> Columns:
        """Return a step's casts to write, on the writer's thread, and have the sinks told."""
        formats, columns = self._numbering.formats, {}
        if updates:
            columns = cast_columns(step, updates, formats, loss_scale=float(scale))
        self._uncast.saw(columns.get("site", ()))
        if self._sinks:
            self._feed.put(lambda: self._sinks.step(step, row(), columns or None))
        if not columns:
            return columns
        is_due = self._casts.is_due(step) or (self._casts.or_clamped and columns["saturated"].any())
        is_inspected = self._inspect is not None and self._inspect.is_due(step)
        return columns if is_due or is_inspected else {}

    def _warn_of_threads(self) -> None:
        """Warn of what the threads of the log and the sinks have found."""
        self._sinks.warn()
        self._feed.warn()
        if (news := self._uncast.take_warning()) is not None:
            _warn(news)

    def _tell_sinks(self, step: int, updates: list[Heard], row: Callable[[], Columns]) -> None:
        columns = cast_columns(step, updates, self._numbering.formats) if updates else None
        self._sinks.step(step, row(), columns)

    def _inspect_at(self, step: int) -> None:
        """Have the casts of a coming step inspected if they are due."""
        if self._inspect is None:
            return
        between: Inspection = "clamped" if self._inspect.or_clamped else "gradients"
        is_due = self._inspect.is_due(step)
        for source in self._sources:
            source.inspect(self._whole if is_due else between, between=between)

    def _switch_listener(self, ledger: Ledger) -> SwitchListener:
        def record(switched: Mapping[int, tuple[Scaling, Scaling]]) -> None:
            if (model := self._model()) is not None:
                find_ledgers(model)  # who switched a part of it may have named sites within that
            self.event("switch", sites=switch_data(ledger, switched))

        return record

    def _note_commits(self) -> None:
        for source in self._sources:
            source.note_commits()

    def _mind_order(self, *, heard: bool) -> None:
        """Tell of casts that come a step late, or never, once."""
        model, is_first, self._is_first = self._model(), self._is_first, False
        if is_first and not self._sources and model is not None and find_ledgers(model):
            _warn(
                "the model was converted after its Recorder was made, which records no casts: "
                "make the Recorder after unclamp.convert."
            )
        if self._is_told_of_order:
            return
        if heard and any(source.has_later_commits() for source in self._sources):
            self._is_told_of_order = True
            _warn(
                "Recorder.step was called between backward and optimizer.step, so that casts are "
                "recorded a step late: call it after optimizer.step()."
            )

    def _mind_silence(self, *, heard: bool) -> None:
        if not self._sources or heard:
            self._silent_steps = 0
            return
        self._silent_steps += 1
        if self._silent_steps != SILENT_STEPS:
            return
        if any(source.is_in_model for source in self._sources):
            _warn(
                f"{SILENT_STEPS} recorded steps without an optimizer step of this model: scales "
                "are not updated and casts not recorded. unclamp follows torch.optim optimizers "
                "that hold the model's parameters, and counts casts whose backward ran. Of other "
                "steps tell it by unclamp.step(model)."
            )
        elif (model := self._model()) is not None and find_ledgers(model):
            _warn(
                "the model was reverted and converted again after its Recorder was made, which "
                "records no casts from then on: make another Recorder after unclamp.convert."
            )


_OPEN: "weakref.WeakValueDictionary[Path, Recorder]" = weakref.WeakValueDictionary()
"""The last recorder of each folder in this process."""


def _close_recorder_of(path: str | Path) -> None:
    """Close what a notebook's cell left open that is run again."""
    recorder = _OPEN.get(Path(path).resolve())
    if recorder is not None:
        recorder.close("interrupted")


def _warn(message: str) -> None:
    """Warn where the user called `Recorder.step`."""
    warnings.warn(message, UnclampWarning, stacklevel=4)
