"""What torchtitan's Trainer does in a training, heard from its own methods.

Its metrics processor hears of logged steps only: losses are added up in no others. One that says
that every step is logged gets them all, and has the host wait for the device in each; and a loss
that is not finite ends the training before it hears of it. So the Trainer's methods are followed:
`forward_backward_step` gives each micro-batch's loss, `torchtitan.distributed.utils.
clip_grad_norm_` the norm, and `train_step` and `train` say when a step and a training end. The sum
over ranks is made as torchtitan makes it, on the device.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torchtitan
import torchtitan.distributed.utils as titan
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer.base import BaseCheckpointManager
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.trainer import Trainer

from unclamp.errors import UnclampWarning, UnsupportedError
from unclamp.integrations.recorded import Framework, Recorded, Recording
from unclamp.nn import ScalingState, find_ledgers

STATE = "unclamp"
"""What our state is called among those that torchtitan's checkpoint manager keeps."""


class Steps:
    """Records a Trainer's steps.

    Args:
        trainer: The Trainer, before its training begins.
        parts: Its model: one, or the stages of a pipeline that this rank has.
        run: The run's folder; None: no run.
        recording: What is recorded, and how.

    Raises:
        UnsupportedError: Ranks hold parts of a layer that nobody could tell from whole ones.
    """

    def __init__(
        self, trainer: Trainer, parts: Sequence[nn.Module], run: str | None, recording: Recording
    ) -> None:
        _check(trainer)
        model = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
        self._trainer = trainer
        self._recorded = Recorded(model, run, recording=recording)
        self._state = _State(parts)
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None

    def add_state(self, states: dict[str, Any]) -> None:
        """Put scaling state among the states that are saved with the model, if there is any."""
        if self._state.has_any:
            states[STATE] = self._state

    def hear(self, manager: BaseCheckpointManager) -> None:
        """Follow the Trainer, and its checkpoint manager, from now on."""
        trainer = self._trainer
        self._hear_loads(manager)
        _follow(trainer, "train", self._train)
        _follow(trainer, "train_step", self._train_step)
        _follow(trainer, "forward_backward_step", self._micro)
        _follow(trainer.metrics_processor, "log_validation", self._validation)

    # ---- what the Trainer does ------------------------------------------------------------------

    def _train(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._recorded.closing():
            return own(*args, **kwargs)

    def _train_step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        self._recorded.begin(self._framework(), resumes=self._resumes(trainer.step))
        self._loss = self._norm = None
        lrs = trainer.lr_schedulers.get_metrics()
        try:
            with self._norms():
                made = own(*args, **kwargs)
        except DataloaderExhaustedError:
            raise
        except Exception:
            if self._norm is not None:  # the step was made, and its loss is not finite
                self._record(lrs)
            raise
        self._record(lrs)
        return made

    def _micro(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = own(*args, **kwargs)
        if self._has_loss():
            if self._loss is None:  # a CUDA graph writes the next one to the same memory
                self._loss = loss.detach().clone()
            else:
                self._loss.add_(loss.detach())
        return loss

    def _validation(self, own: Callable[..., Any], loss: float, step: int, *args: Any, **kw: Any):
        self._recorded.evaluation(step, {"loss": loss, **(kw.get("extra_metrics") or {})})
        return own(loss, step, *args, **kw)

    # ---- what is recorded of it -----------------------------------------------------------------

    def _record(self, lrs: dict[str, float]) -> None:
        """Record the step that was just made, under torchtitan's number and with its numbers."""
        dims = self._trainer.parallel_dims
        if self._loss is not None:
            mesh = dims.get_optional_mesh("loss") if dims.dp_cp_enabled else None
            self._recorded.micro(titan.dist_sum_tensor(self._loss, mesh))
        self._recorded.grad_norm(self._norm)
        several = lrs if len(set(lrs.values())) > 1 else {}
        lr = next(iter(lrs.values()), None)
        self._recorded.step(self._trainer.step, lr=lr, scalars=several)

    def _resumes(self, step: int) -> bool:
        """Whether a training that begins with a step goes on with a run.

        One that torchrun started again after a failure does, with a checkpoint or without.
        """
        return step > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def _has_loss(self) -> bool:
        """Whether this rank has the loss: in a pipeline those of the last stage do."""
        trainer = self._trainer
        return not trainer.parallel_dims.pp_enabled or trainer.pp_has_last_stage

    @contextmanager
    def _norms(self) -> Iterator[None]:
        """Note what the norm of all gradients was before they were clipped."""
        own = titan.clip_grad_norm_

        def clip(*args: Any, **kwargs: Any) -> Tensor:
            self._norm = own(*args, **kwargs)
            return self._norm

        titan.clip_grad_norm_ = clip
        try:
            yield
        finally:
            titan.clip_grad_norm_ = own

    def _framework(self) -> Framework:
        trainer = self._trainer
        several = trainer.num_pipeline_parallel_microbatches
        return Framework(
            name="torchtitan",
            version=torchtitan.__version__,
            accumulation=trainer.gradient_accumulation_steps * several,
            precision=trainer.config.training.mixed_precision_param,
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def _hear_loads(self, manager: BaseCheckpointManager) -> None:
        state = self._state

        def load(own: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
            is_loaded = own(*args, **kwargs)
            state.settle()
            self._recorded.check(resumes=self._resumes(self._trainer.step + 1))
            return is_loaded

        def read(own: Callable[..., Any], states: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return own(states, *args, **kwargs)
            except CheckpointException as error:  # a BaseException
                if STATE not in states or f"Missing key in checkpoint state_dict: {STATE}." not in (
                    str(error)
                ):
                    raise
            del states[STATE]
            warnings.warn(
                "the checkpoint has no scaling state, so the histories of scales start anew: the "
                "first tensor determines each scale, and losses differ a little from those of a "
                "training that was not interrupted.",
                UnclampWarning,
                stacklevel=2,
            )
            return own(states, *args, **kwargs)

        _follow(manager, "load", load)
        if hasattr(manager, "dcp_load"):
            _follow(manager, "dcp_load", read)


class _State:
    """Scaling state as torch.distributed.checkpoint's Stateful.

    It is read before the weights are loaded into the modules, and goes in after them.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._own = [ScalingState(part) for part in parts if find_ledgers(part)]
        self._read: dict[str, Any] = {}

    @property
    def has_any(self) -> bool:
        """Whether there is a layer with scaling state."""
        return bool(self._own)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts; their names are those in the whole model."""
        return {key: value for own in self._own for key, value in own.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was read, until the weights are loaded."""
        self._read = dict(state_dict)

    def settle(self) -> None:
        """Put in what was read since the last call."""
        read, self._read = self._read, {}
        for own in self._own if read else ():
            own.load_state_dict({k: v for k, v in read.items() if k in own.state_dict()})


def _follow(thing: Any, name: str, by: Callable[..., Any]) -> None:
    """Have a method of a thing called by a function of ours, which gets it first."""
    own = getattr(thing, name)
    setattr(thing, name, lambda *args, **kwargs: by(own, *args, **kwargs))


def _check(trainer: Trainer) -> None:
    dims = trainer.parallel_dims
    if dims.spmd_backend == "spmd_types" and dims.tp_enabled:
        raise UnsupportedError(
            "with --parallelism.spmd_backend spmd_types and tensor parallelism each rank has a "
            "part of a weight as a plain tensor, which nobody can tell from a whole one, so that "
            "its scales would not be agreed on: use --parallelism.spmd_backend partial_dtensor"
        )
