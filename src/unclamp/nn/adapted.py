"""What every converted module has, whatever its products: their saved state, their device.

An adaptor is put in front of the class that a module has (`nn.kinds`); the rest of the class
stays, whatever FSDP, a parametrization or a library made of it. `nn.converted` is the adaptor of a
layer that is one product.

The scaling state of a product with a name has keys `unclamp_{name}_{role}_scale` and so on. That
of products which differ in a last number (`nn.products.stacks`) lies in one tensor, a row a
product: where rows have histories of other lengths the short ones are filled up with zeros, which
no loader reads.
"""

import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.names import ROLES, Role
from unclamp.nn.named import is_copied_by
from unclamp.nn.noted import is_other
from unclamp.nn.operands import Operands
from unclamp.nn.parts import fit, is_sharded
from unclamp.nn.products import Matrix, products_in, stacks
from unclamp.nn.saved import (
    STATE_PREFIX,
    UPDATES,
    Spread,
    asked_to_load,
    like,
    mesh_of,
    off_mesh,
    on_mesh,
    to_fill,
    version_of,
    wants_to_fill,
)
from unclamp.nn.sharded import part_shape, spread_in_forward
from unclamp.scaling import describe


class Adapted(nn.Module):
    """A module whose matrix products go through FP8. Made by `unclamp.convert`, not by hand.

    Parameters, their names and the state_dict keys of the weights are those of the plain module.
    The scaling state adds keys that start with `unclamp_`, plain floating-point tensors, so that
    arithmetic over a state_dict's values works; a checkpoint without them loads, strictly too,
    and the next tensor seeds the scale.
    """

    sites: Any
    is_turned = False
    """Whether the product sees the weight turned."""
    only_observes = ""
    """Why such a module is never converted, and only observed; "" where it is."""

    @classmethod
    def matrices(cls, module: nn.Module) -> dict[str, Matrix]:
        """Return the second operand of each of a plain module's products, by name within it."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Return why a plain module of its kind is left alone; None if it is not."""
        return None

    @classmethod
    def product_shape(cls, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a weight as the product has it."""
        return tuple(reversed(shape)) if cls.is_turned else tuple(shape)

    @property
    def products(self) -> Mapping[str, Operands]:
        """The products, by their names within the module."""
        return products_in(self)

    def weight_of(self, product: str) -> Tensor | None:
        """Return the parameter in which a product's second operand lies; None: it has none."""
        name = self.products[product].weight_name
        return None if name is None else getattr(self, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a weight that tensor parallelism splits has rows of its part."""
        super().register_parameter(name, param)
        for own in products_in(self).values() if is_sharded(param) else ():
            if own.weight_name == name and param is not None and param.ndim == 2:
                part: Any = param
                fit(own, self.product_shape(part.to_local().shape))

    def extra_repr(self) -> str:
        """Add to what the module shows: scalings, formats, GEMMs that are special, smoothing."""
        shown = [super().extra_repr()]
        for stack, names in stacks(self.products).items():
            said = _described(self.products[names[0]])
            shown.append(f"{stack}: {said}" if stack else said)
        return ", ".join(text for text in shown if text)

    @property
    def _device(self) -> torch.device | None:
        """Where its weights lie; None where it has none."""
        own = (self.weight_of(name) for name in self.products)
        weight = next((w for w in own if w is not None), None)
        return None if weight is None else weight.device

    def _move(self) -> None:
        """Have the scaling state lie where the weights do."""
        device, own = self._device, next(iter(self.products.values()), None)
        if device is not None and own is not None:
            own.ledger.move_to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._move()
        for own in self.products.values():
            own.belong_to(self)
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        is_adapters = is_copied_by("peft", sys._getframe(1))
        for own in products_in(self).values():
            own.belong_to(self)
            own.is_saved &= not is_adapters

    # ---- saved state -----------------------------------------------------------------------

    def scaling_state(self, *, every: bool = False) -> dict[str, Tensor]:
        """Return the scaling state by its name in a state_dict; none where it only observes.

        Args:
            every: Also of products whose state is no part of a state_dict.
        """
        return {name: read() for name, read in self._state_readers(every=every).items()}

    def load_scaling_state(self, values: Mapping[str, Any]) -> None:
        """Take over scaling state, of any product, by its name in a state_dict.

        It is that of the weights that are here. Of what it does not speak stays.
        """
        own = self.scaling_state(every=True)
        fitting = {name: like(value, own.get(name)) for name, value in values.items()}
        self._restore(fitting, every=True)
        for name, product in self.products.items():
            weight = self.weight_of(name)
            if weight is not None:
                product.note(weight)
                product.note_origin(weight)

    def _state_readers(self, *, every: bool = False) -> dict[str, Callable[[], Tensor]]:
        """Return what makes each tensor of the scaling state, by name: one may be asked for."""
        # The checkpoint of what is only observed is that of the plain model.
        products = {name: own for name, own in products_in(self).items() if every or own.has_state}
        readers: dict[str, Callable[[], Tensor]] = {}
        for stack, names in stacks(products).items():
            members = [products[name] for name in names]
            for role in ROLES:
                if names == [stack]:
                    shelves = [(stack, members[0])]
                elif _are_alike(members, role):
                    shelves = [(stack, members)]
                else:  # as after a switch of some to scales of blocks
                    shelves = list(zip(map(_alone, names), members, strict=True))
                for name, own in shelves:
                    start = f"{_prefix_of(name)}{role}"
                    readers[f"{start}_amax_history"] = self._reader(own, role, "history_of")
                    readers[f"{start}_scale"] = self._reader(own, role, "scale_of")
        if products:
            ledger = next(iter(products.values())).ledger
            readers[f"{STATE_PREFIX}{UPDATES}"] = lambda: on_mesh(
                torch.tensor(ledger.count(), dtype=torch.float64), mesh_of(self)
            )
        return readers

    def _reader(
        self, of: Operands | Sequence[Operands], role: Role, what: str
    ) -> Callable[[], Tensor]:
        """Return what reads the histories or scales of one role, of one product or of a stack."""

        def value(own: Operands, spread: Spread) -> Tensor:
            index = own.indices[role]
            return spread.saved(getattr(own.ledger, what)(index), own.ledger.sites[index])

        if isinstance(of, Operands):
            return lambda: value(of, self._spread(of))
        return lambda: on_mesh(_stacked([value(own, Spread()) for own in of]), mesh_of(self))

    def _spread(self, own: Operands) -> Spread:
        """Return how a product lies on ranks, and have its blocks be those of this rank."""
        mesh, weight, ledger = mesh_of(self), own.parameter_in(self), own.ledger
        if mesh is None or weight is None or weight.ndim != 2:
            return Spread(mesh=mesh)
        if not ledger.sites[own.indices["weight"]].grids:
            return Spread(mesh=mesh)
        spec = spread_in_forward(weight, ledger.clock.model or self)
        if spec is None or not any(p.is_shard() for p in spec.placements):
            return Spread(mesh=mesh)
        fit(own, self.product_shape(part_shape(weight, spec)))
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
        given = asked_to_load(sys._getframe(1))
        if given is not None:
            for name, own in self.products.items():
                weight = self.weight_of(name)
                own.version_asked = None if weight is None else version_of(weight)
        if given is None or not wants_to_fill(given):
            return buffers
        device = self._device or torch.device("cpu")
        return itertools.chain(buffers, to_fill(self.scaling_state(), device))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if ".modules_to_save." in prefix:  # PEFT's copy of a layer, for the file of an adapter
            return
        own = next(iter(self.products.values()), None)
        for name, value in self.scaling_state().items():
            destination[f"{prefix}{name}"] = value
            for ignored in () if own is None else own.ignored:
                ignored.add(f"{prefix}{name}")

    def _restore(
        self, values: Mapping[str, Any], new: Collection[str] = (), *, every: bool = False
    ) -> None:
        """Take over what a state_dict says of the scaling state; it has new weights of products.

        One that speaks of some operands only leaves the others as they are. One with the weight
        alone is that of a plain model, of which no scale here need be right, unless the state came
        before it.
        """
        for own in self.products.values():
            self._spread(own)  # what a part is of follows from how the layer lies now
        known = {key: here for key, v in values.items() if (here := off_mesh(v)) is not None}
        if not (known or new):
            return
        numbers = frozenset(own.number for own in self.products.values())
        updates = known.get(f"{STATE_PREFIX}{UPDATES}")
        saved = [name for name, own in self.products.items() if every or not own.only_observed]
        for stack, names in stacks(saved).items():
            for row, name in enumerate(names):
                own = self.products[name]
                own.ledger.evaluated.reloaded(numbers)
                said: dict[int, tuple[Tensor | None, Tensor | None]] = {}
                for role, index in own.indices.items():
                    history, scale = (
                        known.get(f"{_prefix_of(stack)}{role}_{what}")
                        if names == [stack]
                        else _row_of(known, name, f"{role}_{what}", row, len(names))
                        for what in ("amax_history", "scale")
                    )
                    if not history is scale is None:
                        said[index] = history, scale
                for index in _forgotten(own, said) if name in new else ():
                    own.ledger.restore(index, None, None)
                for index, (history, scale) in said.items():
                    own.ledger.restore(index, history, scale)
                if name not in new:
                    own.ledger.loading.state_came(own.number, said)
                own.ledger.restored(own.number, None if updates is None else float(updates))

    def _is_new(self, product: str, weight: Any) -> bool:
        """Whether what is to be loaded as a product's weight is another one.

        torch's distributed checkpoints give the model's own where they have none to load, and
        where they have written into it.
        """
        own, there = self.products[product], self.weight_of(product)
        asked, own.version_asked = own.version_asked, None
        return weight is not there or (asked is not None and version_of(weight) != asked)

    def _is_written(self, product: str) -> bool:
        """Whether something else than an optimizer or a load wrote a product's weight."""
        own, weight = self.products[product], self.weight_of(product)
        return weight is not None and is_other(own.noted, weight)

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
        start = f"{prefix}{STATE_PREFIX}"
        given = {
            name: state_dict[f"{prefix}{own.weight_name}"]
            for name, own in self.products.items()
            if own.weight_name is not None and f"{prefix}{own.weight_name}" in state_dict
        }
        new = [name for name, weight in given.items() if self._is_new(name, weight)]
        kept = [name for name in given if name not in new and not self._is_written(name)]
        said = {
            key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(start)
        }
        # A state_dict that does not speak of this layer, such as an adapter's, changes nothing.
        self._restore(said, new)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._move()  # assign=True may bring another device
        for name in (*new, *kept):
            weight = self.weight_of(name)
            assert weight is not None
            self.products[name].note(weight)
            self.products[name].note_origin(weight)
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(start)]


def _forgotten(own: Operands, said: Collection[int]) -> list[int]:
    """Return the sites that know nothing of a new weight, which came with a state of these.

    Its own site; and the others where nothing is said of the product, now or before.
    """
    before = own.ledger.loading.weight_came(own.number)
    unknown = [own.indices["weight"]] if said or before else own.indices.values()
    return [index for index in unknown if index not in said and index not in before]


def keys_of(module: nn.Module) -> frozenset[str]:
    """Return the names that scaling state of a module's products may have, however it is stacked.

    Which products share a tensor changes with a switch, and a load takes both.
    """
    names = products_in(module)
    prefixes = {_prefix_of(stack) for stack in stacks(names)}
    prefixes |= {_prefix_of(_alone(name)) for name in names}
    what = ("amax_history", "scale")
    every = {f"{prefix}{role}_{each}" for prefix in prefixes for role in ROLES for each in what}
    return frozenset({*every, f"{STATE_PREFIX}{UPDATES}"})


def _prefix_of(stack: str) -> str:
    return f"{STATE_PREFIX}{stack}_" if stack else STATE_PREFIX


def _alone(name: str) -> str:
    """Return what the keys of a product say that is not in its stack's."""
    return name.replace(".", "_")


def _are_alike(members: Sequence[Operands], role: Role) -> bool:
    """Whether one role has as many scales in each of these products, of the same blocks."""
    grids = [own.ledger.sites[own.indices[role]].grids for own in members]
    return all(grid == grids[0] for grid in grids)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Return values as the rows of one tensor, short histories filled up with zeros."""
    longest = max(value.shape[-1] if value.ndim else 0 for value in values)
    return torch.stack([F.pad(v, (0, longest - v.shape[-1])) if v.ndim else v for v in values])


def _row_of(
    known: Mapping[str, Tensor], name: str, what: str, row: int, rows: int
) -> Tensor | None:
    """Return what was saved of one product of a stack; None where it had another number of rows."""
    own = known.get(f"{_prefix_of(_alone(name))}{what}")
    if own is not None:
        return own
    value = known.get(f"{_prefix_of(name.rpartition('.')[0])}{what}")
    return value[row] if value is not None and value.ndim and len(value) == rows else None


def _described(own: Operands) -> str:
    operands = {role: own.operand(role) for role in ROLES}
    roles = ", ".join(
        f"{role}={describe(operand.scaling)}"
        + (f":{operand.format.name}" if operand.scaling.casts else "")
        for role, operand in operands.items()
    )
    modes = "".join(f", {g}={m}" for g, m in own.modes.items() if m != "float32")
    smooth = ", smooth" if own.smooth else ""
    smooth += ", only observed" if own.ledger.observes or own.only_observed else ""
    return f"{roles}{modes}{smooth}"
