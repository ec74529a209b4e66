"""torchtitan's own Trainer on a CPU, with tiny data of its own: about ten lines of shims.

To be imported in a process of its own, before anything else of torchtitan: what a Trainer does to a
process (no garbage collection, autograd in one thread) is not undone.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trained import STATE_FILE, Trained

import unclamp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what all these packages import
    import torchtitan.tools.utils as titan_utils

    titan_utils.device_type = "cpu"  # others import it, and the next, by value
    titan_utils.device_module = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        set_device=lambda device: None,
        get_device_name=lambda device: "A100",  # whose peak it knows
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_properties=lambda device: SimpleNamespace(total_memory=1 << 34),
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        memory_stats=lambda device: {},
        synchronize=lambda: None,
    )
    import torchtitan.distributed.fsdp as titan_fsdp
    import torchtitan.distributed.utils as titan_distributed
    import torchtitan.trainer
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry as llama_registry
    from torchtitan.models.qwen3 import model_registry as qwen_registry
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

titan_utils.get_local_device = lambda: torch.device("cpu")
titan_distributed.set_pg_timeouts = lambda **kwargs: None
torchtitan.trainer.time = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
    sleep=lambda seconds: None, perf_counter=time.perf_counter
)
_undivided = titan_fsdp.disable_fsdp_gradient_division


def _undivided_by_gloo(model: Any) -> None:
    _undivided(model)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no PREMUL_SUM


titan_fsdp.disable_fsdp_gradient_division = _undivided_by_gloo
for text in (
    "DTensor (random|manual_seed)",
    "In CPU autocast, but the target dtype",
    "To get the last learning rate",
):
    warnings.filterwarnings("ignore", message=text)

VOCABULARY = 2048
EXPERTS = 4


class NoTokenizer(BaseTokenizer):
    """Text is made by nobody here."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Batches(BaseDataLoader):
    """Token ids from a seed; a rank's batch is its part of the same global sequence of batches."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True  # as a validator asks for

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self.world, self.rank = dp_world_size, dp_rank
        self.shape = (local_batch_size, seq_len + 1)
        self.given = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            number = self.given * self.world + self.rank
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(64, self.shape, generator=generator)
            self.given += 1
            yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.given = state_dict["given"]


def without_flex(spec: ModelSpec) -> ModelSpec:
    """Have scaled dot products in place of FlexAttention, whose backward needs a GPU."""
    for _, _, parent, name in list(spec.model.traverse(FlexAttention.Config)):
        setattr(parent, str(name), ScaledDotProductAttention.Config())
    return spec


def configuration(spec: ModelSpec, folder: str, **changes: Any) -> Trainer.Config:
    """Return what a training of a model on tiny data is; `changes` by dotted name, `a__b`."""
    config: Any = Trainer.Config(
        model_spec=without_flex(spec),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()),
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=Batches.Config(),
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=2, seq_len=16, steps=3, disable_cuda_graphs=True),
        metrics=MetricsProcessor.Config(log_freq=10, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
        parallelism=ParallelismConfig(),
        activation_checkpoint=None,
    )
    config.debug.seed = 1
    for name, value in changes.items():
        *path, last = name.split("__")
        at: Any = config
        for part in path:
            at = getattr(at, part)
        setattr(at, last, value)
    return config


def train(
    config: Trainer.Config, *, poisoned_step: int | None = None, keeps: bool = True
) -> Trained:
    """Train as torchtitan's own `main` does; what it ends with is kept in the dump folder."""
    logged, validated = [], []
    own_log, own_validation = MetricsProcessor.log, MetricsProcessor.log_validation

    def log(self: Any, step: int, loss: float, largest: float, norm: float, **kwargs: Any) -> None:
        rate = next(v for k, v in kwargs["extra_metrics"].items() if k.startswith("lr"))
        logged.append((step, loss, norm, rate))
        own_log(self, step, loss, largest, norm, **kwargs)

    def log_validation(self: Any, loss: float, step: int, **kwargs: Any) -> None:
        validated.append((step, loss))
        own_validation(self, loss, step, **kwargs)

    MetricsProcessor.log = log  # pyright: ignore[reportAttributeAccessIssue]
    MetricsProcessor.log_validation = log_validation  # pyright: ignore[reportAttributeAccessIssue]
    trainer: Any = config.build()
    if poisoned_step is not None:
        _poison(trainer, poisoned_step)
    error = ""
    try:
        trainer.train()
    except Exception as raised:
        error = str(raised)
    finally:
        trainer.close()
        MetricsProcessor.log, MetricsProcessor.log_validation = own_log, own_validation
    if keeps:
        folder = Path(config.dump_folder)
        folder.mkdir(exist_ok=True)
        torch.save(_state(trainer), folder / STATE_FILE.format(rank=dist.get_rank()))
    (model,) = trainer.model_parts
    ledgers = unclamp.nn.find_ledgers(model)
    return Trained(
        logged=logged,
        validated=validated,
        converted=[product.fqn for ledger in ledgers for product in ledger.layers],
        updates=[ledger.updates for ledger in ledgers],
        error=error,
    )


def _poison(trainer: Any, step: int) -> None:
    own = trainer.fwd_bwd_fn

    def run(*args: Any) -> Tensor:
        loss = own(*args)
        return loss * float("nan") if trainer.step == step else loss

    trainer.fwd_bwd_fn = run


def _state(trainer: Any) -> dict[str, Tensor]:
    (model,) = trainer.model_parts
    optimizer = {f"optimizer.{k}": v for k, v in trainer.optimizers.state_dict().items()}
    every = model.state_dict() | optimizer
    if unclamp.nn.find_ledgers(model):
        every |= unclamp.ScalingState(model).state_dict()
    return {k: _whole(v) for k, v in every.items() if isinstance(v, Tensor)}


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def llama(folder: Path, *, layers: int | None = None, **changes: Any) -> Trainer.Config:
    """Return a training of torchtitan's llama3 debug model, or of its first layers."""
    spec: Any = llama_registry("debugmodel")
    if layers is not None:
        del spec.model.layers[layers:]
    return configuration(spec, str(folder), **changes)


def moe(folder: Path, **changes: Any) -> Trainer.Config:
    """Return a training of a layer of torchtitan's qwen3 debug model, with four experts."""
    spec: Any = qwen_registry("debugmodel_moe")
    del spec.model.layers[1:]
    moe: Any = spec.model.layers[0].moe
    experts, dispatcher = moe.routed_experts.inner_experts, moe.routed_experts.token_dispatcher
    for part in (moe, experts, dispatcher, moe.router):
        part.num_experts = EXPERTS
    moe.router.gate.out_features = EXPERTS
    moe.router.top_k = dispatcher.top_k = 2
    experts.hidden_dim = 32
    return configuration(spec, str(folder), **changes)
