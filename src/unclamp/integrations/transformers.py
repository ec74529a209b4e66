"""`attach`: a `transformers.Trainer`, or one of TRL's, trains in FP8 and records what it does.

Trainer's events tell neither the loss of a step nor the norm of its gradients, and its log hides
NaN. So `attach` stands in front of some methods of this one trainer: what they return is what
Trainer logs, and is recorded before anything is averaged or filtered. `detach` takes it away.

    train                           closes the run, with its status
    training_step                   a micro-batch's loss, as large as its share
    get_batch_samples               the batches of a step, for snapshots
    _get_grad_norm                  the norm before clipping
    save_model, in a checkpoint     the scaling state is put beside it
    _load_optimizer_and_scheduler   and brought back, after the weights
    _load_best_model                likewise
    call_model_init                 a model that is made anew is converted

A step of Trainer is recorded under the number of its log, `global_step` after it.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unclamp.errors import (
    ConvertError,
    ReplayError,
    UnclampWarning,
    UnsupportedError,
    naming_arguments,
)
from unclamp.explain import Explanation, Limits, Snapshots, Training, explain_spike
from unclamp.explain.training import Build, put_state, take_state
from unclamp.integrations.recorded import (
    Recorded,
    Recording,
    load_scaling_state,
    not_installed,
    save_scaling_state,
)
from unclamp.integrations.trainer_coverage import batch_coverage
from unclamp.integrations.trainer_hooks import Replaced, Said, learning_rate
from unclamp.nn import ConvertReport
from unclamp.recipe import Recipe

try:
    from transformers import Trainer

    from unclamp.integrations.trainer_callback import UnclampCallback
    from unclamp.integrations.trainer_events import Heard, framework_of
    from unclamp.integrations.trainer_replay import replay_step, training
except ModuleNotFoundError as error:
    raise not_installed(error, "hf") from error

__all__ = ["Attached", "UnclampCallback", "attach", "replay_step", "training"]

_MARK = "unclamp_attached"


@naming_arguments
def attach(
    trainer: Trainer,
    recipe: Recipe | None = None,
    run: str | Path | None = None,
    *,
    snapshots: bool | Mapping[str, Any] = False,
    build: Callable[[], Any] | None = None,
    skip: Sequence[str] = (),
    coverage: bool = True,
    recording: Recording | Mapping[str, Any] | None = None,
) -> "Attached":
    """Convert the model of a trainer, and have its trainings recorded; then call `trainer.train()`.

    Loss, norm and learning rate of each step are those of Trainer's own log with `logging_steps=1`,
    bit for bit, whatever `logging_steps`; NaN and Inf stay as they are. Of several ranks each
    records its own loss, whose mean Trainer logs. Evaluations become events, what TRL adds to its
    log (rewards, accuracies) scalars.

    Args:
        trainer: A `transformers.Trainer`, TRL's `SFTTrainer` or `DPOTrainer`, or one of your own.
            Its model is converted in place, so a PEFT model or an optimizer may be there already.
        recipe: None leaves the model as it is: plain, converted or observed before.
        run: The run's folder; None records nothing. A training that is resumed
            (`train(resume_from_checkpoint=...)`) goes on with the run in it.
        snapshots: Whether `unclamp.Snapshots` are taken, for `unclamp explain`; or a mapping of
            what to give it: `{"every": 5}`.
        build: A function without arguments, of a module or a script's top level, that makes this
            trainer and attaches it: with it `unclamp explain RUN` finds all it needs.
        skip: Globs of layers to leave alone.
        coverage: Print and record, of the first batch, which share of the FLOPs is in FP8.
        recording: What else `unclamp.Recorder` is to be given: `{"inspect": 10}`.

    Returns:
        The attachment: `report`, `explain()`, `detach()`.

    Raises:
        ConvertError: The trainer is none, or attached already; or as `unclamp.convert`.
        UnsupportedError: `torch.nn.DataParallel`, or snapshots that are explained on the spot.
        ReplayError: Snapshots without a run.
    """
    if not isinstance(trainer, Trainer):
        raise ConvertError(
            f"attach takes the trainer, a transformers.Trainer, and not {type(trainer).__name__}; "
            "for a model in a loop of your own there are unclamp.convert and unclamp.Recorder"
        )
    if getattr(trainer, _MARK, None) is not None:
        raise ConvertError(
            "this trainer is attached already: call detach() on what attach returned before"
        )
    if trainer.args.n_gpu > 1:
        raise UnsupportedError(
            f"this trainer is on {trainer.args.n_gpu} GPUs by torch.nn.DataParallel, which copies "
            "the model in each forward: start it with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    wanted = dict(snapshots) if isinstance(snapshots, Mapping) else {}
    if wanted.get("on_spike") == "explain":
        raise UnsupportedError(
            'on_spike="explain" goes back in the data, which a Trainer cannot: take snapshots, and '
            "call explain() of what attach returns, or `unclamp explain RUN`"
        )
    if snapshots is not False and run is None:
        raise ReplayError("snapshots go into the run's folder: name one, attach(..., run=...)")
    if not isinstance(recording, Recording):
        recording = Recording(**(recording or {}))
    model: Any = trainer.model
    # The scaling state has a file of its own, so that those of the weights are a plain model's.
    recorded = Recorded(model, run, recipe=recipe, skip=skip, state="apart", recording=recording)
    return Attached(
        trainer,
        recorded,
        again=None if recipe is None else functools.partial(_convert, recorded, recipe, skip),
        snapshots=None if snapshots is False else wanted,
        build=build,
        coverage=coverage,
    )


def _convert(recorded: Recorded, recipe: Recipe, skip: Sequence[str], model: nn.Module) -> None:
    recorded.convert(model, recipe, skip=skip)


class Attached:
    """A trainer that is attached; made by `attach`.

    Attributes:
        trainer: The trainer.
        report: What the conversion did; None where there was none.
    """

    def __init__(
        self,
        trainer: Trainer,
        recorded: Recorded,
        *,
        again: Callable[[nn.Module], None] | None,
        snapshots: dict[str, Any] | None,
        build: Build | None,
        coverage: bool,
    ) -> None:
        self.trainer: Any = trainer
        self._recorded, self._again = recorded, again
        self._asked, self._build, self._covers = snapshots, build, coverage
        self._snapshots: Snapshots | None = None
        self._said = Said(trainer)
        self._batches: Any = None
        self._loss: Tensor | None = None
        self._early: list[tuple[int, dict[str, Any]]] = []
        self._trains = self._resumes = self._has_warned = False
        self._is_begun = self._is_step_open = False
        self._callback = Heard(self)
        self._replaced = Replaced(trainer)
        for name in (
            *("train", "training_step", "get_batch_samples", "save_model", "call_model_init"),
            *("_load_optimizer_and_scheduler", "_load_best_model", "_get_grad_norm"),
        ):
            if hasattr(trainer, name):
                self._replaced.put(name, getattr(self, f"_{name.strip('_')}"))
        if not hasattr(trainer, "_get_grad_norm"):  # transformers 4
            self._replaced.put("clip_grad_norm_", self._get_grad_norm, on=trainer.accelerator)
        trainer.add_callback(self._callback)
        setattr(trainer, _MARK, self)
        setattr(trainer, "unclamp_training", self.training)  # noqa: B010

    @property
    def report(self) -> ConvertReport | None:
        """What the conversion did."""
        return self._recorded.report

    @property
    def run(self) -> Path | None:
        """The folder of the latest run, with its number; None before there is one."""
        return self._recorded.path

    def training(self) -> Training:
        """Return what the trainer trains, for `unclamp.explain_spike`."""
        return training(self.trainer)

    def explain(
        self,
        spike: int | None = None,
        *,
        at: int | None = None,
        limits: Limits = Limits(),
        on_progress: Callable[[Explanation], None] = lambda explanation: None,
    ) -> Explanation:
        """Say what caused a spike of the latest run, by replaying it with this trainer.

        Afterwards model, optimizer and learning rate are as they were.

        Args:
            spike: As `unclamp.explain_spike` takes it.
            at: Likewise.
            limits: Likewise.
            on_progress: Likewise.

        Raises:
            ReplayError: There is no run, or the training goes on; or as `unclamp.explain_spike`.
        """
        if self._trains or self.run is None:
            raise ReplayError("call explain() after trainer.train() of a run with snapshots=True")
        made = self.training()
        before = take_state(made)

        def given() -> Training:
            return made

        if self._build is not None:
            given = functools.wraps(self._build)(given)  # whose code is that of the snapshots
        try:
            return explain_spike(
                *(self.run, spike),
                at=at,
                build=given,
                step=replay_step,
                limits=limits,
                on_progress=on_progress,
            )
        finally:
            put_state(made, before)

    def detach(self) -> None:
        """Take away what `attach` has put in front of the trainer's methods; the model stays.

        Raises:
            ConvertError: The training goes on.
        """
        if self._trains:
            raise ConvertError("the trainer is training: call detach() after train()")
        self._replaced.restore()
        self.trainer.remove_callback(self._callback)
        setattr(self.trainer, _MARK, None)
        self.trainer.__dict__.pop("unclamp_training", None)

    # ---- in front of the trainer's methods: `plain` is what was there ------------------------

    def _train(self, plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
        checkpoint = named.get("resume_from_checkpoint", args[0] if args else None)
        trial = named.get("trial", args[1] if len(args) > 1 else None)
        if trial is not None:
            raise UnsupportedError(
                "an attached trainer records one training, and a search of hyperparameters is "
                "many: detach() for the search, and attach a trainer with what it found"
            )
        if self._trains:
            raise ConvertError("the trainer is training already")
        self._resumes = bool(checkpoint)
        self._recorded.check(resumes=self._resumes)
        self._trains = True
        self._early.clear()
        try:
            with self._recorded.closing(), self._closing_snapshots():
                return plain(*args, **named)
        finally:
            self._trains = self._is_step_open = False

    def _training_step(self, plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if not self._trains:
            return plain(*args, **named)
        if not self._is_step_open:
            self._open_step(args[1] if len(args) > 1 else named.get("inputs"))
        loss = plain(*args, **named)
        self._recorded.micro(loss)
        return loss

    def _get_batch_samples(self, plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
        batches, number = plain(*args, **named)
        if self._trains and self._asked is not None:
            self._batches = {"batches": [_plain(each) for each in batches], "items": number}
        return batches, number

    def _get_grad_norm(self, plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
        norm = plain(*args, **named)
        if self._trains:
            self._recorded.grad_norm(norm)
        return norm

    def _save_model(self, plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
        done = plain(*args, **named)
        folder = args[0] if args else named.get("output_dir")
        is_checkpoint = named.get("_internal_call", len(args) > 1 and args[1])
        if is_checkpoint and folder is not None and self.trainer.args.should_save:
            self._save_scaling_state(folder)
        return done

    def _save_scaling_state(self, folder: str) -> None:
        try:
            save_scaling_state(self.trainer.model, folder)
        except ConvertError as error:  # no reason to lose the training
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{folder}: {error}", UnclampWarning, stacklevel=2)

    def _load_optimizer_and_scheduler(
        self, plain: Callable[..., Any], checkpoint: str | None, *args: Any
    ) -> Any:
        done = plain(checkpoint, *args)
        if checkpoint is not None:
            load_scaling_state(self.trainer.model, checkpoint)
        return done

    def _load_best_model(self, plain: Callable[..., Any]) -> Any:
        done = plain()
        load_scaling_state(self.trainer.model, str(self.trainer.state.best_model_checkpoint))
        return done

    def _call_model_init(self, plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
        model = plain(*args, **named)
        self._recorded.model = model
        if self._again is not None:
            self._again(model)
        return model

    # ---- the steps of a training ---------------------------------------------------------------

    def begin(self) -> None:
        """Hear that Trainer begins; a second time where it begins anew with smaller batches."""
        if self._recorded.recorder is not None:
            self._close_snapshots()
            self._recorded.end("failed")
            self._resumes = True  # in the same folder, from its first step on
        self._is_begun = self._is_step_open = False

    def _open_step(self, inputs: Any) -> None:
        """Be before the first micro-batch of a step."""
        self._is_step_open = True
        if not self._is_begun:
            self._open_run(inputs)
        self._said.begin()
        if self._snapshots is not None:
            self._snapshots.before(self.trainer.state.global_step + 1, self._batches)
        self._batches = None

    def _open_run(self, inputs: Any) -> None:
        found = batch_coverage(self.trainer, inputs) if self._covers else None
        framework = framework_of(self.trainer, inputs)
        self._recorded.begin(framework, resumes=self._resumes, coverage=found)
        self._is_begun = True
        for step, metrics in self._early:
            self._recorded.evaluation(step, metrics)
        self._early.clear()
        recorder = self._recorded.recorder
        if self._asked is not None and recorder is not None:
            self._snapshots = Snapshots(
                self.training(),
                recorder.path,
                build=self._build,
                step=replay_step,
                recorder=recorder,
                **self._asked,
            )

    def stepped(self) -> None:
        """Hear that the optimizer has stepped, before the learning rate changes."""
        if not self._trains:
            return
        step = self.trainer.state.global_step + 1
        self._loss = self._recorded.loss
        self._recorded.step(step, lr=learning_rate(self.trainer), scalars=self._said.take())
        self._is_step_open = False

    def step_ended(self) -> None:
        """Hear that a step is over, with its scheduler and gradients."""
        if self._snapshots is not None and self._loss is not None:
            self._snapshots.after(self.trainer.state.global_step, self._loss)

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Hear of an evaluation; one before the first step waits for the run."""
        if self._trains and not self._is_begun:
            self._early.append((self.trainer.state.global_step, dict(metrics)))
        else:
            self._recorded.evaluation(self.trainer.state.global_step, metrics)

    @contextmanager
    def _closing_snapshots(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            try:
                self._close_snapshots()
            except Exception as second:  # the first is the one to see
                error.add_note(f"unclamp could not close the snapshots: {second}")
            raise
        self._close_snapshots()

    def _close_snapshots(self) -> None:
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is not None:
            snapshots.close()


def _plain(batch: Any) -> Any:
    """Return a batch as a plain dict, of which a snapshot can copy the tensors."""
    return dict(batch) if isinstance(batch, Mapping) else batch
