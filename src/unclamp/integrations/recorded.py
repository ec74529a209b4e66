"""A run that somebody else's loop drives: what the integrations of all trainers share.

No framework is imported here. A trainer's integration says what happens, in its trainer's terms,
and this does the rest: converting the model, opening the run (as a new attempt where the training
was resumed), adding up the losses of micro-batches, closing the run with the right status, and
keeping the scaling state beside a checkpoint.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.covered import CoverageReport
from unclamp.errors import (
    RunLogError,
    UnclampWarning,
    UnsupportedError,
    first_line,
    naming_arguments,
)
from unclamp.nn.convert import ConvertReport, State, convert, find_ledgers
from unclamp.nn.scaling_state import ScalingState
from unclamp.recipe import Recipe
from unclamp.runlog import Every, RunLog, Status
from unclamp.runlog.beginning import NUMBER
from unclamp.runlog.finder import is_run
from unclamp.telemetry import Recorder
from unclamp.telemetry.columns import Number
from unclamp.telemetry.group import Name
from unclamp.telemetry.rank import find_place
from unclamp.telemetry.recorder import EVERY_HUNDREDTH, EVERY_STEP
from unclamp.telemetry.sinks import NumbersFunction, Sink
from unclamp.written import listed

EVALUATION_EVENT = "evaluation"
"""Kind of the event with an evaluation's metrics."""
MOST_LINES = 6
"""Lines about what a conversion did not do."""
_NOT_DONE = ("  skipped", "  unmatched", "  only counted")
_TAKEN = ("step", "loss", "grad_norm", "lr", "group")


@dataclass(frozen=True, kw_only=True)
class Framework:
    """Who drives the training, for the run's header.

    Attributes:
        name: Such as "transformers".
        version: Of that package.
        accumulation: Micro-batches of an optimizer step; None where it is not known.
        precision: In the framework's own word, such as "bf16"; None likewise.
        world_size: Ranks of the training; None: what torch.distributed says.
        seed: Of the training; None where it is not known.
        tokens_per_step: Of all ranks and micro-batches, padding included; None likewise.
    """

    name: str
    version: str
    accumulation: int | None = None
    precision: str | None = None
    world_size: int | None = None
    seed: int | None = None
    tokens_per_step: int | None = None

    def metadata(self) -> dict[str, Any]:
        """Return it as JSON data, under the names that each integration uses."""
        known = {"seed": self.seed, "tokens_per_step": self.tokens_per_step}
        return {
            **{name: value for name, value in known.items() if value is not None},
            "framework": self.name,
            "framework_version": self.version,
            "world_size": self.world_size or find_place().world_size,
            "accumulation": self.accumulation,
            "precision": self.precision,
        }


@naming_arguments
@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a user asks of the run log; each field goes to `unclamp.Recorder` under its name."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    plain: bool = False
    casts: Every | int = EVERY_STEP
    inspect: Every | int | None = EVERY_HUNDREDTH
    sinks: Iterable[Sink | NumbersFunction] = ()
    overwrite: bool = False
    flush_interval_s: float = 2.0


class Recorded:
    """A training's model and run.

    The order of calls: `begin` before the first step's forward; `micro` for each micro-batch,
    `grad_norm` and `step` for each optimizer step, after the optimizer's own; `end`, or all of it
    inside of `closing`. After `end`, `begin` opens the next run. Without a folder nothing is
    recorded, and every call is allowed.

    Args:
        model: The model that trains, without wrappers.
        run: The run's folder; None: no run.
        recipe: Converts the model now. None leaves it: plain, observed or converted already.
        skip: As `unclamp.convert` takes it.
        state: Likewise.
        recording: What is recorded, and how.

    Attributes:
        report: What the conversion did; None where there was none.
        recorder: The open run; None outside of a training.
        path: The folder of the latest run, with its number.

    Raises:
        RecipeError, ConvertError: As `unclamp.convert`.
    """

    def __init__(
        self,
        model: nn.Module,
        run: str | Path | None,
        *,
        recipe: Recipe | None = None,
        skip: Sequence[str] = (),
        state: State | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.model = model
        self.report: ConvertReport | None = None
        self.recorder: Recorder | None = None
        self.path: Path | None = None
        self._run = run
        self._state: State | None = state
        self._recording = recording or Recording()
        self._loss: Tensor | None = None
        self._grad_norm: Number | None = None
        if recipe is not None:
            self.convert(model, recipe, skip=skip)

    @property
    def loss(self) -> Tensor | None:
        """Sum of the losses since the last step; None: there was none."""
        return self._loss

    def convert(self, model: nn.Module, recipe: Recipe, *, skip: Sequence[str] = ()) -> None:
        """Convert a model, take it for the one that trains, and print what was done.

        Raises:
            RecipeError, ConvertError: As `unclamp.convert`.
        """
        self.model = model
        self.report = convert(model, recipe, skip=skip, state=self._state)
        say(_shortly(self.report))

    def check(self, *, resumes: bool) -> None:
        """Refuse a folder that holds another run, before a trainer spends time on its start.

        Raises:
            RunLogError: The training is not resumed, and the folder holds a run; or it is, and the
                folder is to get a new number.
        """
        if resumes and NUMBER in str(self._run):
            raise RunLogError(
                f"{self._run} is a new folder each time, and this training is resumed: name the "
                "folder of the run that it goes on with"
            )
        is_free = self._run is None or resumes or self._replaces()
        if not is_free and find_place().rank == 0 and is_run(Path(self._run or "")):
            raise RunLogError(
                f"{self._run} already holds a run, and this training begins anew: resume it from "
                "its last checkpoint, and the run goes on; or name a new folder; or replace the "
                'run by overwrite=True (of attach: recording={"overwrite": True}); or have the '
                'folders numbered with {n}, "runs/name-{n}"'
            )

    def begin(
        self, framework: Framework, *, resumes: bool, coverage: CoverageReport | None = None
    ) -> None:
        """Open the run, unless it is open; with an empty sum of losses.

        Args:
            framework: Who drives the training.
            resumes: Whether it goes on from a checkpoint: then a run in the folder goes on too.
            coverage: Of a batch, if it is known. It is printed on rank 0.

        Raises:
            RunLogError: As `check`, and as `unclamp.Recorder`.
        """
        if self.recorder is not None:
            return
        self.forget()
        if coverage is not None:
            say(coverage.sentence())
        if self._run is None:
            return
        self.check(resumes=resumes)
        asked = self._recording
        self.recorder = Recorder(
            self.model,
            self._run,
            metadata={**framework.metadata(), **asked.metadata},
            notes=asked.notes,
            plain=asked.plain,
            casts=asked.casts,
            inspect=asked.inspect,
            coverage=coverage,
            sinks=asked.sinks,
            overwrite=not resumes and self._replaces(),
            resume=resumes,
            flush_interval_s=asked.flush_interval_s,
        )
        self.path = self.recorder.path

    def _replaces(self) -> bool:
        """Whether a run in the folder may go: as asked, or since it ended before its first step."""
        if self._recording.overwrite or self._run is None or not is_run(Path(self._run)):
            return self._recording.overwrite
        if find_place().world_size > 1:
            return False
        with RunLog.open(self._run) as log:
            is_over = log.header.status != "running"
            return is_over and not log.sql("SELECT 1 FROM steps LIMIT 1").num_rows

    def micro(self, loss: Number) -> None:
        """Add a micro-batch's loss, as large as its share of the step's. It waits for no device.

        The sum is float32's on the loss's device, in the order of calls; NaN and Inf stay.
        """
        if not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss))
        if self._loss is None:
            self._loss = torch.zeros((), device=loss.device)
        self._loss.add_(loss.detach().reshape(()))

    def grad_norm(self, norm: Number | None) -> None:
        """Note the norm of all gradients before they are clipped."""
        self._grad_norm = norm.detach() if isinstance(norm, Tensor) else norm

    def step(
        self,
        step: int,
        *,
        lr: Number | None = None,
        group: Name = None,
        scalars: Mapping[str, Number] = MappingProxyType({}),
    ) -> None:
        """Record the optimizer step that was just made, and forget its loss and norm.

        Args:
            step: The number that the trainer's own log gives it.
            lr: The learning rate that it was made with.
            group: The kind of its batch.
            scalars: What else to record, by name.
        """
        if self.recorder is not None:
            own = {"loss": self._loss, "grad_norm": self._grad_norm, "lr": lr}
            others = {name: value for name, value in scalars.items() if name not in _TAKEN}
            self.recorder.step(step, group=group, **own, **others)
        self.forget()

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record an evaluation as an event; what is no JSON data in it becomes a text."""
        if self.recorder is not None:
            self.recorder.event(EVALUATION_EVENT, step, metrics=_json(metrics))

    def end(self, status: Status = "finished") -> None:
        """Close the run, if one is open."""
        recorder, self.recorder = self.recorder, None
        self.forget()
        if recorder is not None:
            recorder.close(status)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the run as finished, failed or interrupted; what is raised is what was raised."""
        try:
            yield
        except BaseException as error:
            try:
                self.end(status_of(error))
            except Exception as second:  # the first is the one to see
                error.add_note(f"unclamp could not close the run: {second}")
            raise
        self.end("finished")

    def forget(self) -> None:
        """Forget losses and norm of a step that is not made: one that a gradient scaler skips."""
        self._loss = self._grad_norm = None


def status_of(error: BaseException) -> Status:
    """Return how a run ended that an exception ended."""
    return "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"


def not_installed(error: ModuleNotFoundError, extra: str) -> UnsupportedError:
    """Return what a user is told who imports an integration without its package."""
    if error.name is None:  # raised by hand, as transformers does: only its text says what lacks
        return UnsupportedError(f'{first_line(error)}: pip install "unclamp[{extra}]"')
    return UnsupportedError(f'{error.name} is not installed: pip install "unclamp[{extra}]"')


def say(text: str) -> None:
    """Print a text on rank 0."""
    if find_place().rank == 0:
        print(f"unclamp: {text}", flush=True)


def _shortly(report: ConvertReport) -> str:
    """Return how many layers were converted, and what was not."""
    first, *lines = str(report).splitlines()
    told = [line for line in lines if line.startswith(_NOT_DONE)]
    more = [f"  and {len(told) - MOST_LINES:,} more"] if len(told) > MOST_LINES else []
    return "\n".join([first, *told[:MOST_LINES], *more])


def _json(value: Any) -> Any:
    """Return JSON data: NaN and Inf as the texts "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, Tensor):
        return _json(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)


# ---- beside a checkpoint -----------------------------------------------------------------------

SCALING_STATE_FILE = "unclamp_scaling_state.pt"
"""In a trainer's checkpoint folder: the scaling state, without which histories start anew."""


def save_scaling_state(model: nn.Module, folder: str | Path) -> None:
    """Put a model's scaling state into a checkpoint's folder; nothing if it has none.

    Where ranks hold the same, one of them calls it for each folder.

    Raises:
        ConvertError: Ranks hold parts of it; the message names what saves it then.
        OSError: The disk refuses.
    """
    if find_ledgers(model):
        ScalingState(model).save(Path(folder) / SCALING_STATE_FILE)


def warn_of_missing(layers: Sequence[str], checkpoint: str) -> None:
    """Warn of layers whose scaling state is not in the checkpoint that a training goes on from."""
    if layers:
        warnings.warn(
            f"{checkpoint} has no scaling state of {listed(layers, most=5)}, so that histories of "
            "scales start anew there: was the model converted as the one that saved it?",
            UnclampWarning,
            stacklevel=4,
        )


def load_scaling_state(model: nn.Module, folder: str | Path) -> None:
    """Bring a model's scaling state back from a checkpoint's folder, after its weights.

    It warns where the folder has none and the model would, and of layers that it has none of.

    Raises:
        ConvertError: The file is of another model, or cannot be read.
    """
    path = Path(folder) / SCALING_STATE_FILE
    if not find_ledgers(model):
        return
    if path.is_file():
        warn_of_missing(ScalingState(model).load(path), str(path))
    else:
        warnings.warn(
            f"{folder} has no {SCALING_STATE_FILE}, so the histories of scales start anew: the "
            "first tensor determines each scale, and losses differ a little from those of a "
            "training that was not interrupted.",
            UnclampWarning,
            stacklevel=3,
        )
