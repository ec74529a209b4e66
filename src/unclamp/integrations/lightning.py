"""PyTorch Lightning: a callback that converts the module and records every optimizer step.

`UnclampCallback` works with `lightning.pytorch` and with `pytorch_lightning`; whichever of them is
imported already is what it is a callback of. `Fp8Precision` is a plugin that converts, for those
who look for FP8 there. For Fabric see `FabricRecorder`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from unclamp.errors import UnsupportedError
from unclamp.integrations.fabric import FabricRecorder
from unclamp.integrations.lightning_precision import Fp8Precision
from unclamp.integrations.norms import grad_norm as norm_of
from unclamp.integrations.norms import together, unscaled
from unclamp.integrations.recorded import Framework, Recorded, Recording, status_of
from unclamp.integrations.scaled import Scaled
from unclamp.nn.convert import State
from unclamp.recipe import Recipe

__all__ = ["FabricRecorder", "Fp8Precision", "UnclampCallback"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """Return the classes of callbacks of the packages that are in use, or else of one there is."""
    names = [name for name in PACKAGES if name in sys.modules]
    if not names:
        names = [n for n in PACKAGES if importlib.util.find_spec(n.partition(".")[0])][:1]
    if not names:
        raise UnsupportedError(
            "unclamp.integrations.lightning needs PyTorch Lightning, which is not installed: "
            'pip install "unclamp[lightning]"'
        )
    return tuple(importlib.import_module(name).Callback for name in names)


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    class _Base(Callback):
        pass
else:
    _Base = type("_Base", _bases(), {})


class UnclampCallback(_Base):
    """Convert a LightningModule, record every optimizer step, keep the scales in checkpoints.

    The module is converted in `setup`, before the strategy wraps it and optimizers are made; or,
    where it has a `configure_model`, right after the strategy has set it up. A step is recorded
    under the number that Lightning's loggers give it. With `fast_dev_run` no run is written.

    Args:
        recipe: What to convert the module by; None leaves it as it is: plain, observed, or
            converted by you.
        run: The run's folder; None records nothing. A training that is resumed (`ckpt_path=`)
            goes on with the run that is in it.
        skip: Globs of modules to leave alone, by their names in the LightningModule.
        state: "apart": checkpoints have the keys of a plain module, and scaling state is in the
            callback's own part. "model": it is among the module's keys, too.
        loss: Name of what to record as the loss, among what `training_step` returns or logs; for
            manual optimisation, where it need not return any. By default what it returns.
        scalars: Names of what the module logs, to be recorded beside the loss of the step that
            they are logged in.
        grad_norm: Whether to compute the norm of all gradients, before clipping, at the price of
            a pass over them. In manual optimisation it is the norm at the optimizer's step.
        **recording: As `unclamp.Recorder` takes it: metadata, notes, plain, casts, inspect, sinks,
            overwrite, flush_interval_s.

    Attributes:
        report: What the conversion did; None before it, and without a recipe.
        recorder: The open `unclamp.Recorder`; None outside of a training.

    Raises:
        RunLogError: The training begins anew, and the folder holds a run.

    Example:
        >>> trainer = Trainer(
        ...     callbacks=[UnclampCallback(unclamp.Recipe(), "runs/first")]
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        run: str | Path | None = None,
        *,
        skip: Sequence[str] = (),
        state: State = "apart",
        loss: str | None = None,
        scalars: Sequence[str] = (),
        grad_norm: bool = True,
        **recording: Any,
    ) -> None:
        super().__init__()
        self._scaled = Scaled(recipe, skip=skip, state=state)
        self._run = run
        self._recording = Recording(**recording)
        self._loss, self._scalars, self._wants_norm = loss, tuple(scalars), grad_norm
        self._recorded: Recorded | None = None
        self._norms: dict[int, Tensor] = {}
        self._lr: Any = None
        self._steps = 0
        self._metrics: Mapping[str, Any] = {}
        self._logged: dict[str, Any] = {}
        self._has_loss = False

    @property
    def report(self) -> Any:
        """What the conversion did; None before it."""
        return self._scaled.report

    @property
    def recorder(self) -> Any:
        """The open recorder; None outside of a training."""
        return None if self._recorded is None else self._recorded.recorder

    @property
    def _metrics_wanted(self) -> bool:
        return bool(self._loss or self._scalars)

    # ---- converting ----------------------------------------------------------------------------

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Convert the module, unless `configure_model` has yet to make its layers."""
        if not _makes_layers_later(pl_module):
            self._scaled.take(pl_module)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Convert what is not converted yet, and refuse a folder that holds another run."""
        self._scaled.take(pl_module)
        is_trial = bool(getattr(trainer, "fast_dev_run", False))
        run = None if is_trial else self._run
        self._recorded = Recorded(pl_module, run, recording=self._recording)
        self._recorded.check(resumes=_resumes(trainer))

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Convert what is not converted yet, and remember what was logged before."""
        self._scaled.take(pl_module)
        self._metrics = dict(trainer.callback_metrics)

    def on_test_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Convert what is not converted yet."""
        self._scaled.take(pl_module)

    def on_predict_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Convert what is not converted yet."""
        self._scaled.take(pl_module)

    # ---- recording -----------------------------------------------------------------------------

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Open the run."""
        self._steps = trainer.global_step
        self._forget()
        if self._recorded is not None:
            self._recorded.begin(_framework(trainer), resumes=_resumes(trainer))

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Remember what was logged before, which Lightning goes on to tell."""
        if self._metrics_wanted:
            self._metrics = dict(trainer.callback_metrics)

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: Optimizer
    ) -> None:
        """Note learning rate and norm: gradients are unscaled by now, and not yet clipped."""
        if self.recorder is None:
            return
        if self._lr is None:
            lr = optimizer.param_groups[0].get("lr")
            self._lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
        if self._wants_norm and (norm := norm_of(optimizer)) is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._norms[id(optimizer)] = unscaled(norm, optimizer, scaler)

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch's loss; record the step if the optimizer has made one."""
        recorded = self._recorded
        if recorded is None or self.recorder is None:
            return
        logged = _new(trainer.callback_metrics, self._metrics) if self._metrics_wanted else {}
        self._logged |= {name: logged[name] for name in self._scalars if name in logged}
        if (loss := self._loss_in(trainer, outputs, logged)) is not None:
            recorded.micro(loss)
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        recorded.grad_norm(together(self._norms.values()))
        recorded.step(_step(trainer), lr=self._lr, scalars=self._logged)
        self._forget()

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Record what the validation has logged, but nothing of a sanity check."""
        before, self._metrics = self._metrics, {}
        if self._recorded is not None and not trainer.sanity_checking:
            now = trainer.callback_metrics
            self._recorded.evaluation(_step(trainer), _new(now, before))

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Close the run as finished."""
        self._end("finished")

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Close the run as failed, or as interrupted by Ctrl-C or a signal."""
        self._end(status_of(exception))

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Close the run where Lightning has ended the training in a way of its own."""
        self._end("interrupted")

    # ---- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the scaling state, for the callback's part of a checkpoint."""
        return self._scaled.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring the scaling state back; Lightning has loaded the weights before."""
        self._scaled.load_state_dict(state_dict)

    def on_load_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Warn of a checkpoint without scaling state."""
        self._scaled.mind(
            has_part=self.state_key in checkpoint["callbacks"],
            keys=checkpoint.get("state_dict", ()),
        )

    # ---- inside --------------------------------------------------------------------------------

    def _loss_in(self, trainer: "Trainer", outputs: Any, logged: Mapping[str, Any]) -> Any:
        """Return the batch's share of the step's loss; None where nobody says it."""
        returned = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
        if self._loss is None:
            return returned.get("loss")
        found = returned.get(self._loss, logged.get(self._loss))
        if found is None and self._has_loss:
            return None  # a batch in which it is not logged, as one of a GAN
        self._has_loss = True
        if found is None:
            raise UnsupportedError(
                f"UnclampCallback(loss={self._loss!r}): training_step neither returns nor "
                f"logs it; it has logged {sorted(logged)}"
            )
        # Lightning has divided what it trains by, and nothing else.
        is_divided = self._loss == "loss" and "loss" in returned
        if is_divided or not trainer.lightning_module.automatic_optimization:
            return found
        return found / trainer.accumulate_grad_batches

    def _forget(self) -> None:
        self._norms, self._lr, self._logged = {}, None, {}

    def _end(self, status: Any) -> None:
        self._forget()
        if self._recorded is not None:
            self._recorded.end(status)


def _new(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was logged since: Lightning tells the last value of a name again and again.

    A value that is logged is a new tensor, and what is told of it are views; those of `before` are
    held, so that no other has their memory.
    """
    return {
        name: value
        for name, value in metrics.items()
        if name not in before or value.data_ptr() != before[name].data_ptr()
    }


def _makes_layers_later(module: nn.Module) -> bool:
    own = getattr(type(module), "configure_model", None)
    return own is not None and not own.__module__.startswith(("lightning.", "pytorch_lightning."))


def _resumes(trainer: "Trainer") -> bool:
    return trainer.ckpt_path is not None or trainer.global_step > 0


def _step(trainer: "Trainer") -> int:
    """Return the number that Lightning's loggers give to the present step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _framework(trainer: "Trainer") -> Framework:
    package = type(trainer).__module__.partition(".")[0]
    known = importlib.import_module("lightning" if package == "lightning" else package)
    version = getattr(known, "__version__", "unknown")
    return Framework(
        name=package,
        version=version,
        accumulation=trainer.accumulate_grad_batches,
        precision=str(trainer.precision),
        world_size=trainer.world_size,
    )
