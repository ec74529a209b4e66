"""The scaling state of a model by itself: what a checkpoint has to hold beside the weights.

A trainer's checkpoint often holds weights alone (`save_pretrained`, an adapter's file, a
safetensors file for others). `ScalingState` is the rest of what a resume needs, in the shape that
every tool takes: an object with `state_dict` and `load_state_dict`.

**Keys** are those of `model.state_dict()`, without what wrappers put in: DDP's "module.", the
"_orig_mod." of a compiled model, PEFT's "base_layer." (`nn.named`). What is loaded may have it.

**Values** are plain tensors wherever all ranks have the same, so that files need no DeviceMesh. The
blocks of a weight that tensor parallelism splits are DTensors, for torch's distributed checkpoints.
"""

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from unclamp.errors import ConvertError
from unclamp.files import write_atomically
from unclamp.names import joined
from unclamp.nn.adapted import Adapted, keys_of
from unclamp.nn.named import ADAPTED, PRIVATE, named_modules
from unclamp.nn.products import products_in
from unclamp.nn.saved import as_plain, is_part, is_state_key

PUT_IN = frozenset({*PRIVATE, ADAPTED, "module"})
"""What a wrapper that is not here may have put into the names that it saved."""
ADAPTED_MODEL = ["base_model", "model"]
"""What PEFT puts before all of them."""
SHOWN = 5


class ScalingState:
    """The scaling state of a converted or observed model, to save and load beside its weights.

    It holds all that a training needs, beside weights and optimizer, to go on bit for bit: amax
    histories, scales, and the number of updates; of layers in adapters and of what is only
    observed too. It is a `Stateful` of torch's distributed checkpoints
    (`dcp.save({"scaling": state})`), what `accelerator.register_for_checkpointing` takes, and a
    state that a callback can return. It lives as long as the model: it reads and writes the model's
    own state.

    Args:
        model: A model with converted or observed layers, wrapped or not.

    Raises:
        ConvertError: `model` has none.

    Example:
        >>> import torch, unclamp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = unclamp.convert(model, unclamp.Recipe(), state="apart")
        >>> state = unclamp.ScalingState(model)
        >>> sorted(state.state_dict())[:2]
        ['0.unclamp_grad_output_amax_history', '0.unclamp_grad_output_scale']
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module) or not _modules(model):
            what = "one without" if isinstance(model, nn.Module) else repr(model)
            raise ConvertError(
                f"expected a model with converted or observed layers for ScalingState, got {what}: "
                "call unclamp.convert first"
            )
        self._model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the scaling state, by the keys that they have in a state_dict.

        Floating point, on the model's device. What all ranks have alike is a plain tensor, what
        tensor parallelism splits a DTensor.
        """
        return {
            joined(fqn, name): as_plain(value)
            for fqn, module in _modules(self._model).items()
            for name, value in module.scaling_state(every=True).items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Take scaling state over, as that of the weights which the model has now.

        So load the weights before. What `state_dict` does not speak of stays. A state that was
        saved under another recipe serves as far as it fits, as in `model.load_state_dict`.

        Returns:
            The names of the layers with scaling state that `state_dict` does not speak of.

        Raises:
            ConvertError: A key is of no layer of the model, or no scaling state at all. Nothing is
                changed.
        """
        names = _Names(self._model)
        found: dict[Adapted, dict[str, Any]] = {}
        unknown = []
        for key, value in state_dict.items():
            fqn, _, name = key.rpartition(".")
            module = names.find(fqn)
            if module is None or not isinstance(value, Tensor) or name not in keys_of(module):
                unknown.append(key)
            else:
                found.setdefault(module, {})[name] = value
        if unknown:
            raise ConvertError(_unknown_text(unknown, len(state_dict), names.plain))
        for module, values in found.items():
            module.load_scaling_state(values)
        every = names.plain.items()
        return [fqn for fqn, m in every if m not in found and m.scaling_state(every=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scaling state to one file, which appears whole or not at all.

        `torch.load(path, weights_only=True)` reads it. Where several ranks hold the same state one
        of them has to save, and all may.

        Raises:
            ConvertError: Ranks hold parts of it.
            OSError: The disk refuses.
        """
        state = self.state_dict()
        parts = [key for key, value in state.items() if is_part(value)]
        if parts:
            raise ConvertError(
                f"expected scaling state that each rank has all of, got parts of {_few(parts)}: "
                "tensor parallelism splits it. Save it with torch.distributed.checkpoint: "
                'dcp.save({"scaling": unclamp.ScalingState(model)}, checkpoint_id=folder)'
            )
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(Path(path), buffer.getbuffer())

    def load(self, path: str | os.PathLike[str]) -> list[str]:
        """Take over what `save` wrote; after the weights, on every rank.

        Returns:
            As `load_state_dict`.

        Raises:
            ConvertError: The file holds something else, or keys of layers that are not here.
            OSError: It cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ConvertError(
                f"expected a file of unclamp.ScalingState.save at {os.fspath(path)}, got one that "
                f"cannot be read: {str(error).partition(chr(10))[0]}"
            ) from error
        if not isinstance(state, dict):
            raise ConvertError(
                f"expected a file of unclamp.ScalingState.save at {os.fspath(path)}, got one of "
                f"{type(state).__name__}"
            )
        return self.load_state_dict(state)


def _modules(model: nn.Module) -> dict[str, Adapted]:
    """Return the modules that have scaling state, by their names without wrappers."""
    return {str(fqn): each for fqn, each in named_modules(model) if _has_state(each)}


def _has_state(module: nn.Module) -> TypeGuard[Adapted]:
    """Whether a module has scaling state."""
    return isinstance(module, Adapted) and bool(products_in(module))


class _Names:
    """Finds modules by their names, with wrappers or without."""

    def __init__(self, model: nn.Module) -> None:
        every = model.named_modules(remove_duplicate=False)
        self.plain = _modules(model)
        self._spelled = {fqn: module for fqn, module in every if _has_state(module)}
        self._bare: dict[str, Adapted | None] = {}
        for fqn, module in (self._spelled | self.plain).items():
            is_free = self._bare.get(_bare(fqn), module) is module
            self._bare[_bare(fqn)] = module if is_free else None  # two of a name: neither is meant

    def find(self, fqn: str) -> Adapted | None:
        """Return the module of a name; None where there is none."""
        for names, name in ((self.plain, fqn), (self._spelled, fqn), (self._bare, _bare(fqn))):
            if (found := names.get(name)) is not None:
                return found
        return None


def _bare(fqn: str) -> str:
    """Return a name without anything that a wrapper may have put into it."""
    parts = [part for part in fqn.split(".") if part not in PUT_IN]
    return ".".join(parts[2:] if parts[:2] == ADAPTED_MODEL else parts)


def _few(keys: Iterable[str]) -> str:
    every = list(keys)
    more = f" and {len(every) - SHOWN:,} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def _unknown_text(unknown: list[str], count: int, known: Iterable[str]) -> str:
    others = [key for key in unknown if not is_state_key(key)]
    if others:
        why = "these are no scaling state: load weights with model.load_state_dict"
    else:
        why = "convert the model as the one was that saved it; its converted layers are " + _few(
            repr(fqn) for fqn in known
        )
    return (
        f"expected scaling state of this model's layers, got {len(unknown):,} of {count:,} keys "
        f"that it does not know: {_few(others or unknown)}; {why}"
    )
