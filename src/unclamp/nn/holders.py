"""Whose step it is: which products of a model an optimizer's step is for.

An optimizer updates the products whose parameters it holds. So two optimizers on one container,
such as the two halves of a GAN, update each its own half; what the other half's casts saw stays
pending until its own optimizer steps. A product that nobody holds, such as the frozen base under
an adapter, goes with every optimizer of the model.

An optimizer holds a parameter that is in its groups, one that lies in the memory of a tensor in
them (a view of a flat buffer), and one whose copy is there, where a plain link leads to it:
`param.main_param` (Megatron-LM), `param._hp_mapping` (DeepSpeed), apex's `optimizer._amp_stash`,
and the shards of a module that FSDP2 has put together (`unshard`). One that held something once is
remembered for as long as it lives, because parameters may have another identity when it steps.
"""

import itertools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from unclamp.nn.products import SITES

PATIENCE = 100
"""Steps that were told, and left a product to its optimizer, after which that one lost its hold."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of a ledger, and the module that has its parameters.

    Attributes:
        number: Its place among the ledger's products.
        module: The converted module; None where it is unknown.
        operands: What casts by it (`Operands`); None where that is gone.
        has_module: Whether all parameters of the module are its own, and not one at most.
    """

    number: int
    module: weakref.ref[nn.Module] | None
    operands: weakref.ref[Any] | None = None
    has_module: bool = True

    def owner(self) -> nn.Module | None:
        """Return the converted module; None where it is gone, unknown, or reverted by now."""
        module = None if self.module is None else self.module()
        return module if module is not None and SITES in module.__dict__ else None

    def weight(self) -> nn.Parameter | None:
        """Return the parameter in which its second operand lies; None where there is none."""
        own = None if self.operands is None else self.operands()
        return None if own is None else own.parameter_in(self.owner())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield its parameters, those of a parametrization too; none where the module is gone."""
        module = None if self.module is None else self.module()
        if module is None:
            return
        if not self.has_module:
            weight = self.weight()
            yield from () if weight is None else (weight,)
            return
        yield from (p for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None:
                yield from child.parameters()

    @property
    def is_trainable(self) -> bool:
        """Whether one of its parameters wants a gradient."""
        return any(p.requires_grad for p in self.parameters())


class _Grip:
    """The tensors that an optimizer holds."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._model = model
        self._groups = [group["params"] for group in optimizer.param_groups]
        self._ids = {id(p) for group in self._groups for p in group}
        stash = getattr(optimizer, "_amp_stash", None)  # apex: half-precision models of its masters
        self._ids |= {id(p) for p in getattr(stash, "all_fp16_params", ())}
        self._memory: set[int] | None = None
        self._shards: dict[int, Tensor] | None = None

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether it holds one of these, or a copy of one."""
        return any(
            id(p) in self._ids
            or any(self._holds_memory_of(x) for x in (p, *copies_of(p)))
            or id(self._shard_of(p)) in self._ids
            for p in parameters
        )

    def _shard_of(self, whole: Tensor) -> Tensor | None:
        if self._shards is None:
            self._shards = _shards(self._model)
        return self._shards.get(id(whole))

    def _holds_memory_of(self, x: Tensor) -> bool:
        if id(x) in self._ids:
            return True
        if self._memory is None:
            self._memory = {_memory_of(p) for p in itertools.chain(*self._groups)}
        return _memory_of(x) in self._memory


def copies_of(parameter: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that libraries train in a parameter's place, where it says which."""
    copy = getattr(parameter, "main_param", None)
    if isinstance(copy, Tensor):
        yield copy
    fragment = getattr(getattr(parameter, "_hp_mapping", None), "hp_fragment", None)
    if isinstance(fragment, Tensor):
        yield fragment


_SPECS = ("_unsharded_dtensor_spec", "_tp_spec")
"""What FSDP2 calls the layout of a parameter that tensor parallelism has cut: torch 2.13, 2.11."""


def sharded_parameters(model: nn.Module) -> list[Any]:
    """Return what FSDP2 keeps of each parameter of a model, sharded and whole.

    torch has no public way from one to the other; where its own names change, nothing is found.
    """
    modules: list[Any] = [m for m in model.modules() if hasattr(type(m), "_get_fsdp_state")]
    states = [module._get_fsdp_state() for module in modules]
    groups = [group for state in states for group in parameter_groups(state)]
    every = [parameter for group in groups for parameter in getattr(group, "fsdp_params", ())]
    return [parameter for parameter in every if hasattr(parameter, "sharded_param")]


def parameter_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of one module that FSDP2 gathers together.

    There are several where some have a mesh of their own, as experts do under expert parallelism;
    torch's older name knows one, and raises there.
    """
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def whole_spec(parameter: Any) -> Any:
    """Return the `DTensorSpec` of what FSDP2 puts together of a parameter; None: a plain tensor."""
    new, old = (getattr(parameter, name, None) for name in _SPECS)
    return new or old


def _shards(model: nn.Module) -> dict[int, Tensor]:
    """Return the shards of FSDP2's whole parameters, by the id of the whole one."""
    return {
        id(parameter._unsharded_param): parameter.sharded_param
        for parameter in sharded_parameters(model)
        if hasattr(parameter, "_unsharded_param")
    }


def _memory_of(x: Tensor) -> int:
    """Return which memory a tensor lies in; one that has none (sparse, not made yet) is its own."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return -id(x)


class Holders:
    """The optimizers of one model, and the products that each of them holds."""

    def __init__(self) -> None:
        self._held: weakref.WeakKeyDictionary[Optimizer, frozenset[int]] = (
            weakref.WeakKeyDictionary()
        )
        self._passed: weakref.WeakKeyDictionary[Optimizer, frozenset[int]] = (
            weakref.WeakKeyDictionary()
        )
        # With the products themselves: the id of a list that is gone is soon another's.
        self._lists: weakref.WeakKeyDictionary[Optimizer, tuple[list[Product], list[int]]] = (
            weakref.WeakKeyDictionary()
        )
        self._idle: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def __bool__(self) -> bool:
        """Whether an optimizer that lives ever stepped for the model."""
        return len(self._held) > 0

    def someone_trains(self) -> bool:
        """Whether a parameter in one of the optimizers wants a gradient."""
        groups = (group for optimizer in list(self._held) for group in optimizer.param_groups)
        return any(p.requires_grad for group in groups for p in group["params"])

    def held_by(self, optimizer: Optimizer) -> frozenset[int]:
        """Return the products that an optimizer is known to hold."""
        return self._held.get(optimizer, frozenset())

    def turn_of(
        self, optimizer: Optimizer, model: nn.Module, products: list[Product]
    ) -> frozenset[int] | None:
        """Return the products that a step of this optimizer is for; None if it is not the model's.

        A product that wants gradients and that nobody is known to hold is passed over once: its
        own optimizer may be about to make its first step. If it is still nobody's at this
        optimizer's next step, it goes with it from then on.
        """
        own = self._own(optimizer, model, products)
        if own is None:
            return None
        self._idle[optimizer] = 0
        if len(own) == len(products):
            return own
        free = [p for p in products if p.number not in own and not self._is_held(p.number)]
        waiting = frozenset(p.number for p in free if p.is_trainable)
        passed = self._passed.get(optimizer, frozenset())
        self._passed[optimizer] = waiting
        return own | (frozenset(p.number for p in free) - waiting) | (waiting & passed)

    def _own(
        self, optimizer: Optimizer, model: nn.Module, products: list[Product]
    ) -> frozenset[int] | None:
        """Return the products that an optimizer holds; None if it is not the model's.

        Looked up anew where its lists of parameters, or the products, are others than before.
        """
        groups = [group["params"] for group in optimizer.param_groups]
        lists = [number for each in groups for number in (id(each), len(each))]
        known, before = self._lists.get(optimizer, (None, None))
        if known is products and before == lists and optimizer in self._held:
            return self._held[optimizer]
        grip = _Grip(optimizer, model)
        own = frozenset(p.number for p in products if grip.holds(p.parameters()))
        if own or grip.holds(model.parameters()):
            self._held[optimizer], self._lists[optimizer] = own, (products, lists)
        return self._held.get(optimizer)

    def left_over(self, products: Iterable[Product]) -> frozenset[int]:
        """Return the products that no living optimizer holds: those of a step that was told.

        An optimizer that lives and steps no more loses its hold in the end.
        """
        numbers = frozenset(p.number for p in products)
        for optimizer, held in list(self._held.items()):
            if held & numbers:
                self._idle[optimizer] = self._idle.get(optimizer, 0) + 1
                if self._idle[optimizer] > PATIENCE:
                    del self._held[optimizer]
        return frozenset(n for n in numbers if not self._is_held(n))

    def _is_held(self, number: int) -> bool:
        return any(number in held for held in self._held.values())
