"""Runs of an unchanged Transformer Engine model, and its recipes as ours.

    with record_transformer_engine(model, "runs/te") as recorder:
        for batch in loader:
            ...  # as before: fp8_autocast, backward, optimizer.step()
            recorder.step(loss=loss)

It reads the delayed scaling state that Transformer Engine keeps (`te_layouts` says where), adds no
hook, changes no module and waits for no device. What that state cannot tell is null in the log.
"""

import itertools
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from torch import nn

from unclamp.errors import RecipeError, RunLogError, UnclampWarning
from unclamp.integrations.te_casts import CastRows
from unclamp.integrations.te_layouts import VERSIONS, Found, Modules, is_shared
from unclamp.integrations.te_reading import Reader
from unclamp.integrations.te_recipes import recipe
from unclamp.runlog import Cadence, Columns, Every, Header, RunLogWriter, Status
from unclamp.telemetry.columns import Number, step_columns
from unclamp.telemetry.given import cadence, checked
from unclamp.telemetry.group import Name, group_name
from unclamp.telemetry.header import environment, git_commit
from unclamp.telemetry.rank import find_place
from unclamp.version import __version__
from unclamp.written import listed

__all__ = ["TransformerEngineRecorder", "recipe", "record_transformer_engine"]

MICROBATCHES = 8
NO_MODULE = (
    "expected a model with modules of Transformer Engine, but none has an fp8_meta: give the model "
    "that trains, with its transformer_engine.pytorch modules; for one that unclamp has converted "
    "use unclamp.Recorder"
)
AMAXES_ONLY = (
    "Recorded from the scaling state of Transformer Engine, which keeps one amax a tensor and "
    "update: whether a cast clamped is known, and how many elements were clamped is not."
)
REDUCED = (
    "On {ranks} ranks Transformer Engine reduces amaxes over a group, unless the recipe says "
    "reduce_amax=False: a row then tells of the largest of the group, and not whose it was, and "
    "the totals count it once (the event transformer_engine says which it is)."
)
STATELESS = (
    "{which} of {all} Transformer Engine {modules} no scaling state ({recipes}): current and "
    "block scaling take each scale from the tensor itself, so that nothing is clamped there, and "
    "there is nothing to read. Of a model with no other the log has the losses alone."
)
UNREAD = (
    "{names}: the state of transformer_engine.pytorch.ops and of custom recipes is not read. "
    "Supported are the modules of transformer_engine.pytorch {versions}."
)


def record_transformer_engine(
    model: nn.Module,
    run: str | Path,
    *,
    microbatches: int = MICROBATCHES,
    metadata: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    casts: Every | int = 1,
    overwrite: bool = False,
    resume: bool = False,
    flush_interval_s: float = 2.0,
) -> "TransformerEngineRecorder":
    """Return a recorder of a Transformer Engine model; call its `step` once an optimizer step.

    Args:
        model: The model that trains, as it is: with its fusions, in CUDA graphs or not.
        run: The run's folder, as for `unclamp.Recorder`.
        microbatches: Most passes of a step. Transformer Engine updates its scales at each, so so
            many amaxes of each tensor are copied at each step, and two more; where there were more
            updates, the step's casts are not in the log, and an event says so.
        metadata: Free JSON data for the header.
        notes: Sentences that a reader of the run must see beside its figures.
        casts: The steps whose casts are written.
        overwrite: Replace a run that is in the folder.
        resume: Go on with a run that is in the folder.
        flush_interval_s: At most so many seconds are lost when the process is killed.

    Raises:
        RunLogError: The model has no module of Transformer Engine; or the folder holds a run or
            something else.
    """
    return TransformerEngineRecorder(
        model,
        run,
        microbatches=microbatches,
        metadata=metadata,
        notes=notes,
        casts=casts,
        overwrite=overwrite,
        resume=resume,
        flush_interval_s=flush_interval_s,
    )


class TransformerEngineRecorder:
    """What `record_transformer_engine` returns; a context manager, as `unclamp.Recorder` is."""

    def __init__(
        self,
        model: nn.Module,
        run: str | Path,
        *,
        microbatches: int = MICROBATCHES,
        metadata: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        casts: Every | int = 1,
        overwrite: bool = False,
        resume: bool = False,
        flush_interval_s: float = 2.0,
    ) -> None:
        if microbatches < 1:
            raise RunLogError(f"expected at least 1 for microbatches, got {microbatches}")
        self._casts = cadence(casts, "casts")
        self._reader = Reader(most=microbatches + 2)
        self._modules = Modules.of(model)
        found = self._modules.find()
        if not self._modules.by_name and not self._modules.operations:
            raise RunLogError(NO_MODULE)
        place = find_place()
        header = Header(
            unclamp_version=__version__,
            world_size=place.world_size,
            run_id=place.run_id,
            recipe=_recipe_data(found),
            environment=environment(model),
            git_commit=git_commit(),
            metadata={"framework": "Transformer Engine", "framework_version": _version(),
                      "reads": f"delayed scaling state of {VERSIONS}", **(metadata or {})},
            cadence=Cadence(casts=self._casts, inspect=None),
            counts="casts",
            notes=[*notes, AMAXES_ONLY, *_reduced(), *_unread(self._modules.operations)],
        )  # fmt: skip
        self._writer = RunLogWriter(
            run,
            header=header,
            rank=place.rank,
            flush_interval_s=flush_interval_s,
            overwrite=overwrite,
            resume=resume,
        )
        ids = itertools.count(self._writer.first_site + place.rank, place.world_size)
        self._rows = CastRows(ids, microbatches=microbatches)
        for copied in self._reader.read(found.states, whole=True):
            self._rows.begin(copied)
        self._asks_for_step, self._next_step = resume, 0
        self._has_told = False
        self._began = self._last = time.perf_counter()

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
        """Record an optimizer step that has just been made, as `unclamp.Recorder.step` does.

        Raises:
            RunLogError: As there; nothing is recorded.
        """
        kind = group_name(group)
        given = {"loss": loss, "grad_norm": grad_norm, "lr": lr} | scalars
        values = {n: checked(n, v) for n, v in given.items() if v is not None}
        if step is None and self._asks_for_step:
            raise RunLogError(
                "a recorder with resume=True does not know where the training goes on: call "
                "step(number, loss=...) with the number of the step, at least the first time"
            )
        step = self._next_step if step is None else step
        if step < 0:
            raise RunLogError(f"expected the number of a step, 0 or above, got {step}")
        self._next_step, self._asks_for_step = step + 1, False
        now = time.perf_counter()
        timing = {"time_s": [now - self._began], "step_ms": [(now - self._last) * 1e3]}
        self._last = now
        self._writer.add("steps", cache(lambda: step_columns(step, values, timing, kind)))
        found = self._modules.find()
        copies = self._reader.read(found.states)
        self._writer.add("casts", lambda: self._due(step, self._rows.casts(step, copies)))
        self._writer.add("sites", self._rows.new_sites)
        self._writer.add("events", self._rows.events)
        self._tell(found)

    def event(self, kind: str, step: int | None = None, **data: Any) -> None:
        """Record that something happened, with JSON data; at the coming step by default.

        Raises:
            RunLogError: The data are not JSON data; NaN and Inf are none.
        """
        at = self._next_step if step is None else step
        try:
            text = json.dumps(data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RunLogError(f"expected JSON data for the event {kind!r}: {error}") from error
        self._writer.add("events", {"step": [at], "kind": [kind], "data": [text]})

    def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        self._writer.flush()
        self._warn()

    def close(self, status: Status = "finished") -> None:
        """Write what is left and close the run. Later calls do nothing.

        Raises:
            RunLogError: There is no such status.
        """
        self._writer.close(status)
        self._warn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _due(self, step: int, columns: Columns) -> Columns:
        is_due = self._casts.is_due(step) or (
            self._casts.or_clamped and any(columns.get("clamped", ()))
        )
        return columns if is_due else {}

    def _tell(self, found: Found) -> None:
        """Say once what of the model is not read, as soon as its first FP8 forward has shown it."""
        self._warn()
        if self._has_told or not (found.states or found.stateless or found.unread):
            return
        self._has_told = True
        self.event("transformer_engine", modules=len(self._modules.by_name), **_layouts(found))
        for said in _unread(found.unread):
            warnings.warn(said, UnclampWarning, stacklevel=3)
        if found.stateless:
            has = "module keeps" if len(found.stateless) == 1 else "modules keep"
            warnings.warn(
                STATELESS.format(
                    which=f"{len(found.stateless):,}",
                    all=f"{len(self._modules.by_name):,}",
                    modules=has,
                    recipes=", ".join(sorted(set(found.stateless.values()))),
                ),
                UnclampWarning,
                stacklevel=3,
            )

    def _warn(self) -> None:
        for said in self._rows.take_warnings():
            warnings.warn(said, UnclampWarning, stacklevel=4)


def _recipe_data(found: Found) -> dict[str, Any] | None:
    """Return the recipe of the model's states as ours; None before the first FP8 forward."""
    known = next((state.recipe for state in found.states if state.recipe is not None), None)
    if known is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnclampWarning)
            return recipe(known).to_dict()
    except RecipeError:  # a function is part of it, or nothing of it maps
        return None


def _layouts(found: Found) -> dict[str, Any]:
    """Return what was found of the model, for the log."""
    first = found.states[0] if found.states else None
    return {
        "states": len(found.states),
        "columns": sum(state.scale.numel() for state in found.states),
        "history_len": None if first is None else len(first.history),
        "updates": None if first is None else f"{first.timing} a pass",
        "recipe": None if first is None else str(first.recipe)[:400],
        "stateless": sorted(set(found.stateless.values())),
        "unread": found.unread,
        "reduced": first is not None and is_shared(first),
    }


def _reduced() -> list[str]:
    """Say what several ranks come to; whether they reduce is not known before the first pass."""
    ranks = find_place().world_size
    return [REDUCED.format(ranks=ranks)] if ranks > 1 else []


def _unread(names: Sequence[str]) -> list[str]:
    return [UNREAD.format(names=listed(names, most=5), versions=VERSIONS)] if names else []


def _version() -> str | None:
    """Return the version of Transformer Engine, if it is loaded."""
    return getattr(sys.modules.get("transformer_engine"), "__version__", None)
