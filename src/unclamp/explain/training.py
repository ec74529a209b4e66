"""What a training is made of, and its whole state before a step: taken, and put back.

A *training* is what a build function returns: model, optimizer, and what else keeps state. Its
state holds weights, scaling state, optimizer, scheduler and the random generators of Python,
NumPy and torch, as copies on the CPU. Where states go to is `store`'s matter, and when they are
taken is that of `snapshots`.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from unclamp.errors import ReplayError
from unclamp.explain.shards import has_parts, joined, joined_optimizer, kept
from unclamp.nn import ScalingState, find_ledgers
from unclamp.nn.saved import is_state_key
from unclamp.numerics import merge_stats

State = dict[str, Any]


class Stateful(Protocol):
    """Anything that can tell its state and take it back, such as a scheduler."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state back."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The objects of a training.

    Attributes:
        model: The model, converted.
        optimizer: Its optimizer.
        scheduler: What sets learning rates and keeps state, or None.
        others: What else keeps state from step to step, such as a gradient scaler, an average
            of the weights or a data loader, by name.
        settings: What a step needs to know besides, such as where gradients are clipped.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any = None
    others: Mapping[str, Stateful] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


Build = Callable[..., Any]
"""Makes the training anew, or a trainer that has one (`as_training`); its weights and states do not
matter, they are replaced."""
Step = Callable[[Training, Any], Any]
"""Does one optimizer step on a batch and returns its loss, a number or a tensor of one."""


def as_training(made: Any) -> Training:
    """Return what a build function made: a training, or a trainer that knows its own.

    Raises:
        ReplayError: It is neither.
    """
    if isinstance(made, Training):
        return made
    own = getattr(made, "unclamp_training", None)
    if callable(own):
        return as_training(own())
    raise ReplayError(
        "expected the build function to return an unclamp.Training, or a trainer that an "
        f"integration has attached to, got {type(made).__name__}"
    )


class Batch(NamedTuple):
    """A batch as it was before its step: a copy on the CPU, and where its tensors were."""

    tree: Any
    devices: tuple[str, ...]

    @classmethod
    def of(cls, batch: Any) -> "Batch":
        """Keep a batch; later changes to it in place change nothing here."""
        devices: list[str] = []

        def keep(tensor: Tensor) -> Tensor:
            devices.append(str(tensor.device))
            return tensor.detach().to("cpu", copy=True)

        return cls(map_tensors(batch, keep), tuple(devices))

    def fresh(self) -> Any:
        """Return a copy that a step may change, on the devices where it was."""
        devices = iter(self.devices)
        return map_tensors(self.tree, lambda tensor: tensor.to(next(devices), copy=True))


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the tree with its tensors changed and its arrays copied, in order.

    Dicts, lists and tuples are rebuilt as their plain kinds; a named tuple, or anything else, is
    left as it is.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def take_state(training: Training) -> State:
    """Return the training's state in copies on the CPU; nothing of the training changes."""
    model = training.model
    saved = model.state_dict()
    loose = {name: b for name, b in model.named_buffers() if name not in saved}
    state = {
        "model": saved,
        "scaling": _scaling_beside(model, saved),
        "buffers": loose,
        "optimizer": training.optimizer.state_dict(),
        "scheduler": None if training.scheduler is None else training.scheduler.state_dict(),
        "others": {name: other.state_dict() for name, other in training.others.items()},
        "pending": [
            {"stats": ledger.pending, "block_amax": ledger.block_amax}
            if ledger.has_pending
            else None
            for ledger in find_ledgers(model)
        ],
        "random": random_state(),
    }

    def keep(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    return map_tensors(state, lambda tensor: kept(tensor, keep))


@torch.no_grad()
def put_state(training: Training, state: State) -> None:
    """Bring a training to a state, random generators included; gradients are dropped.

    Raises:
        ReplayError: The training has other parameters or parts than the one of the state.
    """
    # What is loaded may be taken over without a copy, and the next step would write into it.
    state = map_tensors(state, torch.clone)
    model = training.model
    try:
        model.load_state_dict(joined(state["model"], model.state_dict(), "the model's state"))
        if beside := state.get("scaling"):
            scaling = ScalingState(model)
            scaling.load_state_dict(joined(beside, scaling.state_dict(), "the scaling state"))
        optimizer = training.optimizer
        optimizer.load_state_dict(joined_optimizer(state["optimizer"], optimizer.param_groups))
    except (RuntimeError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:200]
        raise ReplayError(
            "expected the build function to make the model and optimizer of the snapshot, but "
            f"its state does not fit: {first}"
        ) from error
    buffers = dict(model.named_buffers())
    for name, value in joined(state["buffers"], buffers, "the buffers").items():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
    _put_parts(training, state)
    for parameter in model.parameters():
        parameter.grad = None
    for ledger in find_ledgers(model):
        ledger.shared.unseeded = None  # ranks agree on first scales again, where there are none
    for ledger, pending in zip(find_ledgers(model), state["pending"], strict=False):
        if pending is not None and pending["stats"].shape == ledger.pending.shape:
            merge_stats(ledger.pending, pending["stats"].to(ledger.pending.device))
            if pending["block_amax"].shape == ledger.block_amax.shape:
                ledger.block_amax.copy_(pending["block_amax"])
    put_random_state(state["random"])


def _scaling_beside(model: nn.Module, saved: Mapping[str, Any]) -> State:
    """Return the scaling state where a model's own state does not hold all of it."""
    if not find_ledgers(model):
        return {}
    state = ScalingState(model).state_dict()
    return {} if sum(map(is_state_key, saved)) == len(state) else state


def _put_parts(training: Training, state: State) -> None:
    has_scheduler = state["scheduler"] is not None
    if has_scheduler != (training.scheduler is not None) or set(state["others"]) != set(
        training.others
    ):
        here = [*training.others, *(["scheduler"] if training.scheduler is not None else [])]
        there = [*state["others"], *(["scheduler"] if has_scheduler else [])]
        raise ReplayError(
            f"expected a training with the parts of the snapshot, {there}, got {here}: build it as "
            "the run did"
        )
    if training.scheduler is not None:
        training.scheduler.load_state_dict(state["scheduler"])
    for name, other in training.others.items():
        kept_state = state["others"][name]
        is_plain = not has_parts(kept_state)
        like = None if is_plain else other.state_dict()
        other.load_state_dict(kept_state if is_plain else joined(kept_state, like, name))


# ---- random generators -----------------------------------------------------------------------


def random_state() -> State:
    """Return the states of all random generators a step may draw from."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if has_cuda else [],
    }


def put_random_state(state: State) -> None:
    """Set all random generators."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Leave the random generators as they were found."""
    before = random_state()
    try:
        yield
    finally:
        put_random_state(before)


def size_bytes(tree: Any) -> int:
    """Return the bytes of all tensors and arrays in a tree."""
    total = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(tree, add)
    return total
