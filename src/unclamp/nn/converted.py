"""What every converted module has, whatever its layer: its operands, its saved state, its names.

`Converted` is put in front of the class that a module has (`nn.kinds`); the rest of the class
stays, whatever FSDP, a parametrization or a library made of it.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from unclamp.names import ROLES
from unclamp.nn.operands import Operands
from unclamp.nn.parts import fit, is_sharded
from unclamp.nn.saved import (
    STATE_PREFIX,
    UPDATES,
    Spread,
    mesh_of,
    off_mesh,
    on_mesh,
    to_fill,
    wants_to_fill,
)
from unclamp.nn.sharded import part_shape, spread_in_forward
from unclamp.scaling import describe


class Converted(nn.Module):
    """A module whose matrix product goes through FP8. Made by `unclamp.convert`, not by hand.

    Parameters, their names and the state_dict keys of the weights are those of the plain module.
    The scaling state adds keys that start with `unclamp_`, plain floating-point tensors, so that
    arithmetic over a state_dict's values works; a checkpoint without them loads, strictly too,
    and the next tensor seeds the scale.
    """

    sites: Operands
    weight: Tensor
    is_turned = False
    """Whether the product sees the weight turned."""

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """Return the shape of a module's weight as the product has it: outputs by inputs."""
        raise NotImplementedError

    @classmethod
    def product_shape(cls, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a weight as the product has it."""
        return tuple(reversed(shape)) if cls.is_turned else tuple(shape)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a weight that tensor parallelism splits has rows of its part."""
        super().register_parameter(name, param)
        if name == "weight" and "sites" in self.__dict__ and is_sharded(param):
            part: Any = param
            fit(self.sites, self.product_shape(part.to_local().shape))

    def extra_repr(self) -> str:
        """Add to what the layer shows: scalings, formats, GEMMs that are special, smoothing."""
        operands = {role: self.sites.operand(role) for role in ROLES}
        roles = ", ".join(
            f"{role}={describe(operand.scaling)}"
            + (f":{operand.format.name}" if operand.scaling.casts else "")
            for role, operand in operands.items()
        )
        modes = "".join(f", {g}={m}" for g, m in self.sites.modes.items() if m != "float32")
        smooth = ", smooth" if self.sites.smooth else ""
        smooth += ", only observed" if self.sites.ledger.observes else ""
        shown = [super().extra_repr(), f"{roles}{modes}{smooth}"]
        return ", ".join(text for text in shown if text)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.sites.ledger.move_to(self.weight.device)
        self.sites.belong_to(self)
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        own = self.__dict__.get("sites")
        if own is not None:
            own.belong_to(self)

    # ---- saved state -----------------------------------------------------------------------

    def scaling_state(self) -> dict[str, Tensor]:
        """Return the scaling state by its name in a state_dict; none where it only observes."""
        return {name: read() for name, read in self._state_readers().items()}

    def _state_readers(self) -> dict[str, Callable[[], Tensor]]:
        """Return what makes each tensor of the scaling state, by name: one may be asked for."""
        sites = self.__dict__.get("sites")
        if sites is None or sites.ledger.observes:  # the checkpoint is that of the plain model
            return {}
        if not sites.is_saved:
            return {}
        ledger, spread = sites.ledger, self._spread()
        readers: dict[str, Callable[[], Tensor]] = {}

        def reader(read: Callable[[int], Tensor], index: int) -> Callable[[], Tensor]:
            return lambda: spread.saved(read(index), ledger.sites[index])

        for role, index in sites.indices.items():
            readers[f"{STATE_PREFIX}{role}_amax_history"] = reader(ledger.history_of, index)
            readers[f"{STATE_PREFIX}{role}_scale"] = reader(ledger.scale_of, index)
        readers[f"{STATE_PREFIX}{UPDATES}"] = lambda: on_mesh(
            torch.tensor(ledger.count(), dtype=torch.float64), spread.mesh
        )
        return readers

    def _spread(self) -> Spread:
        """Return how the layer lies on ranks, and have its blocks be those of this rank."""
        mesh, weight, ledger = mesh_of(self), self._parameters.get("weight"), self.sites.ledger
        if mesh is None or weight is None:
            return Spread(mesh=mesh)
        if not ledger.sites[self.sites.indices["weight"]].grids:
            return Spread(mesh=mesh)
        spec = spread_in_forward(weight, ledger.clock.model or self)
        if spec is None or not any(p.is_shard() for p in spec.placements):
            return Spread(mesh=mesh)
        fit(self.sites, self.product_shape(part_shape(weight, spec)))
        shape = self.product_shape(weight.shape)
        return Spread(mesh=mesh, spec=spec, shape=shape, is_turned=self.is_turned)

    def __getattr__(self, name: str) -> Any:
        """Find scaling state by its key: torch's distributed checkpoints look each key up."""
        if name.startswith(STATE_PREFIX):
            read = self._state_readers().get(name)
            if read is not None:
                return read()
        return super().__getattr__(name)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Return the module's buffers; scaling state is shown to one caller only (`nn.saved`)."""
        buffers = super().named_buffers(prefix, recurse, remove_duplicate)
        if not wants_to_fill(sys._getframe(1)):
            return buffers
        return itertools.chain(buffers, to_fill(self.scaling_state(), self.weight.device))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if ".modules_to_save." in prefix:  # PEFT's copy of a layer, for the file of an adapter
            return
        for name, value in self.scaling_state().items():
            destination[f"{prefix}{name}"] = value
            for ignored in self.sites.ignored:
                ignored.add(f"{prefix}{name}")

    def _restore(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Take the state over of which a state_dict speaks.

        One that speaks of some operands only leaves the others as they are. One with the weight
        alone is that of a plain model, of which no scale here need be right.
        """
        ledger, own = self.sites.ledger, f"{prefix}{STATE_PREFIX}"
        values = {key: off_mesh(v) for key, v in state_dict.items() if key.startswith(own)}
        self._spread()  # what a part is of follows from how the layer lies now
        known = {key.removeprefix(own): v for key, v in values.items() if v is not None}
        ledger.evaluated.reloaded(frozenset([self.sites.number]))
        for role, index in self.sites.indices.items():
            history, scale = known.get(f"{role}_amax_history"), known.get(f"{role}_scale")
            is_other = role == "weight" and f"{prefix}weight" in state_dict
            if is_other or not (known and history is scale is None):
                ledger.restore(index, history, scale)
        ledger.restored(self.sites.number, float(known[UPDATES]) if UPDATES in known else None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = f"{prefix}{STATE_PREFIX}"
        # A state_dict that does not speak of this layer, such as an adapter's, changes nothing.
        if f"{prefix}weight" in state_dict or any(key.startswith(own) for key in state_dict):
            self._restore(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.sites.ledger.move_to(self.weight.device)  # assign=True may bring another device
        if f"{prefix}weight" in state_dict:
            self.sites.note(self.weight)
            self.sites.note_origin(self.weight)
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(own)]
