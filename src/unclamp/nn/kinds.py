"""Which modules have matrix products, and how their class changes: an adaptor in front, and back.

A kind is told by behaviour, never by an exact class: a module is linear if its `forward` is that
of `nn.Linear`, whatever class FSDP, torchtitan or a parametrization made of it.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import update_wrapper
from types import CellType, FunctionType
from typing import Any

from torch import nn

from unclamp.nn.adapted import Adapted
from unclamp.nn.attention import (
    Attention,
    Fp8Attention,
    Fp8CallsAttention,
    calls_attention,
)
from unclamp.nn.beside import Float8LinearBeside, float8_linear_forward
from unclamp.nn.conv1d import Fp8Conv1D
from unclamp.nn.experts import Fp8Experts, is_experts
from unclamp.nn.fastpath import allow
from unclamp.nn.hf_attention import Fp8InterfaceAttention, asks_interface
from unclamp.nn.linear import Fp8Linear
from unclamp.nn.multihead import Fp8MultiheadAttention
from unclamp.nn.patches import Fp8Patches, are_patches
from unclamp.nn.traced import Fp8Traced, interpreter_forward, is_traced_linear


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of module that is a matrix product, or has several: its adaptor says which.

    Attributes:
        name: What it is called in sentences.
        adaptor: What comes in front of its class.
        forward: The `forward` that such a module has; None where its library is not loaded. None
            in its place where none says anything.
        fits: Whether a module with that `forward` is one: of some the `forward` says too little.
    """

    name: str
    adaptor: type[Adapted]
    forward: Callable[[], Any] | None
    fits: Callable[[nn.Module], bool] = lambda module: True

    def has(self, forward: Any) -> bool:
        """Whether its modules have this `forward`."""
        return self.forward is None or forward is self.forward()


def _conv1d_forward() -> Any:
    """Return the forward of transformers' Conv1D; a model that has one has loaded it."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D.forward


KINDS = (
    Kind(name="linear", adaptor=Fp8Linear, forward=lambda: nn.Linear.forward),
    Kind(name="Conv1D", adaptor=Fp8Conv1D, forward=_conv1d_forward),
    Kind(
        name="Float8Linear of torchao",
        adaptor=Float8LinearBeside,
        forward=float8_linear_forward,
    ),
    Kind(
        name="traced linear",
        adaptor=Fp8Traced,
        forward=interpreter_forward,
        fits=is_traced_linear,
    ),
    Kind(
        name="convolution of patches",
        adaptor=Fp8Patches,
        forward=lambda: nn.Conv1d.forward,
        fits=are_patches,
    ),
    Kind(
        name="convolution of patches",
        adaptor=Fp8Patches,
        forward=lambda: nn.Conv2d.forward,
        fits=are_patches,
    ),
    Kind(
        name="convolution of patches",
        adaptor=Fp8Patches,
        forward=lambda: nn.Conv3d.forward,
        fits=are_patches,
    ),
    Kind(name="attention", adaptor=Fp8Attention, forward=lambda: Attention.forward),
    Kind(
        name="multi-head attention",
        adaptor=Fp8MultiheadAttention,
        forward=lambda: nn.MultiheadAttention.forward,
    ),
    Kind(
        name="attention of transformers",
        adaptor=Fp8InterfaceAttention,
        forward=None,
        fits=asks_interface,
    ),
    Kind(
        name="caller of attention",
        adaptor=Fp8CallsAttention,
        forward=None,
        fits=calls_attention,
    ),
    Kind(name="experts", adaptor=Fp8Experts, forward=None, fits=is_experts),
)


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module that is not converted; None if it is no matrix product."""
    forward = type(module).forward
    return next((kind for kind in KINDS if kind.has(forward) and kind.fits(module)), None)


def is_relative(module: nn.Module) -> bool:
    """Whether a module derives from a kind, and may compute differently."""
    return isinstance(module, nn.Linear) and kind_of(module) is None


def take_away(module: nn.Module) -> None:
    """Change a converted module's class to what is left without the adaptor.

    Whatever was put in front of it since (by FSDP, a parametrization) stays.
    """
    allow(module)
    module.__class__ = _without(type(module))


def adapted(adaptor: type[Adapted], plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class of converted modules of a plain class; `Fp8Linear` of `nn.Linear` itself."""
    if plain in adaptor.__mro__:
        return adaptor
    for made in plain.__subclasses__():  # which keeps no class alive, as a cache would
        if made.__dict__.get("__plain__") is plain and made.__bases__[0] is adaptor:
            return made
    name = f"Fp8{plain.__name__}"
    body = {"__reduce_ex__": _reduce, "__module__": adaptor.__module__, "__plain__": plain}
    return type(name, (adaptor, plain), body)


def _reduce(self: Adapted, protocol: Any) -> Any:
    """Pickle a module by the classes that its own is made of."""
    made = type(self)
    if "__plain__" not in made.__dict__:  # another class was made of ours since
        return object.__reduce_ex__(self, protocol)
    return _restored, (made.__bases__[0], made.__bases__[1]), self.__getstate__()


def _restored(adaptor: type[Adapted], plain: type[nn.Module]) -> nn.Module:
    made = adapted(adaptor, plain)
    return made.__new__(made)


def _without(made: type) -> type:
    if made in (kind.adaptor for kind in KINDS):
        return _first_plain(made)
    if "__plain__" in made.__dict__:
        return made.__dict__["__plain__"]
    bases = tuple(_without(base) if issubclass(base, Adapted) else base for base in made.__bases__)
    if bases == made.__bases__:
        return made
    own = {k: v for k, v in made.__dict__.items() if k not in ("__dict__", "__weakref__")}
    cell = CellType()
    moved = {name: _moved(value, made, cell) for name, value in own.items()}
    cell.cell_contents = type(made.__name__.replace("Fp8", "", 1), bases, moved)
    return cell.cell_contents


def _moved(value: Any, old: type, cell: CellType) -> Any:
    """Return what a class has in its body, for the class in `cell`, which takes its place.

    `super()` without arguments reads its class from a cell of the method, and that one holds the
    old class, of which the module is no instance any more. Others still are, so the cell stays as
    it is, and the method is made anew with another; so is one inside of a decorator that says
    what it wraps.
    """
    if isinstance(value, classmethod | staticmethod):
        return type(value)(_moved(value.__func__, old, cell))
    if isinstance(value, property):
        get, put, drop = (_moved(part, old, cell) for part in (value.fget, value.fset, value.fdel))
        return property(get, put, drop, value.__doc__)
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return value
    wrapped = value.__dict__.get("__wrapped__")
    inner = _moved(wrapped, old, cell)
    if inner is wrapped:
        return _with_cells(value, [(old, cell)])
    made = _with_cells(value, [(old, cell), (wrapped, CellType(inner))])
    made.__dict__["__wrapped__"] = inner
    return made


def _with_cells(function: FunctionType, swaps: Iterable[tuple[Any, CellType]]) -> FunctionType:
    """Return a function with other cells for those that hold certain things; itself without."""
    assert function.__closure__ is not None
    other = [_swapped(each, swaps) for each in function.__closure__]
    if all(one is two for one, two in zip(other, function.__closure__, strict=True)):
        return function
    code, defaults = function.__code__, function.__defaults__
    made = FunctionType(code, function.__globals__, function.__name__, defaults, tuple(other))
    made.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(made, function)
    del made.__dict__["__wrapped__"]  # it wraps nothing: it takes the other's place
    made.__dict__.update(function.__dict__)
    return made


def _swapped(cell: CellType, swaps: Iterable[tuple[Any, CellType]]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # it is empty
        return cell
    return next((other for held, other in swaps if held is content), cell)


def _first_plain(adaptor: type) -> type:
    return next(base for base in adaptor.__mro__[1:] if not issubclass(base, Adapted))
