"""Products of tokens with a bank of weights, `[experts, ., .]`: each expert's is one by itself.

A module of experts is watched while its forward runs: a function of torch that multiplies by one
of its banks, or by an expert's part of one, is the products of those experts. A weight is known by
the memory that it lies in, so views of any kind are; what `to`, `bfloat16` and so on make of one
is followed.

Rows of an expert are those that `offs` say. What comes after the last of them belongs to nobody,
and rows of zeros at a group's end are padding, which libraries add to fill up tiles: they are
multiplied as the plain module does, and are neither cast nor counted. An expert without tokens
casts nothing, and keeps its history. Its weight gets a gradient of zeros.

The sizes of the groups are needed on the host, so a device is waited for once a product of a bank.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from unclamp.errors import UnclampWarning, UnsupportedError
from unclamp.names import shown
from unclamp.nn.accounts import accounted
from unclamp.nn.checkpointed import run_again_within
from unclamp.nn.counting import count
from unclamp.nn.gemms import Meets
from unclamp.nn.grouped import Bank, Part, is_of_experts, sizes_of
from unclamp.nn.operands import Operands
from unclamp.nn.parts import fit, is_sharded
from unclamp.nn.product import check, meeting, multiply, when_to_commit
from unclamp.nn.products import products_in

BANK = 3
"""Dimensions of a parameter that is a bank."""
CONVERSIONS = frozenset(
    ["to", "bfloat16", "half", "float", "type", "type_as", "contiguous", "clone", "requires_grad_"]
)
"""Functions of torch whose result is the same weight elsewhere."""


def banks_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters that are banks, by name; a bias `[E, 1, N]` is none."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim == BANK and 1 not in parameter.shape[1:]:
            yield name, parameter


OTHERS = frozenset(["einsum", "tensordot", "baddbmm", "addbmm", "inner", "multi_dot"])
"""Functions of torch that multiply, too, and that nothing is known of here."""
_told: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Place(NamedTuple):
    """What lies in a piece of memory: a bank, or one expert's part of one.

    Attributes:
        bank: The parameter's name.
        start: Where it begins in its memory, in elements.
        stop: Where it ends.
        step: Elements from an expert to the next; 0 where it is one expert's.
        first: The number of the first expert, among those of all ranks.
    """

    bank: str
    start: int
    stop: int
    step: int
    first: int


class Found(NamedTuple):
    """A weight that is multiplied by: a bank from an expert on, or one expert's part."""

    bank: str
    first: int
    is_bank: bool


class _Stack(threading.local):
    def __init__(self) -> None:
        self.running: list[Watching] = []


_stack = _Stack()


def running() -> "list[Watching]":
    """Return what is watched in this thread, the innermost last."""
    return _stack.running


class Watching(TorchFunctionMode):
    """Makes products with a module's banks FP8 products while its forward runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.products = products_in(module)
        self._places: dict[int, list[Place]] = {}
        self._made: list[Tensor] = []
        for name, bank in banks_of(module):
            self._check_matrices_are_whole(name, bank)
            local, first = local_part(bank)
            self._add(local, name, first=first, step=local.stride(0))

    def __enter__(self) -> "Watching":
        running().append(self)
        self._entered_by = sys._getframe(1).f_code
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        running().pop()
        super().__exit__(*raised)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a product with a bank, or do as told."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        act = ACTS.get(name)
        if act is not None:
            if (account := accounted(*self.products.values())) is not None:
                with account:
                    return func(*args, **kwargs)
            made = act(self, lambda: func(*args, **kwargs), *args, **kwargs)
            if made is not None:
                return made
        if act is not None or name in OTHERS:
            self._say_if_missed(name, args)
        made = func(*args, **kwargs)
        if name in CONVERSIONS and args:
            self._follow(args[0], made)
        return made

    def _check_matrices_are_whole(self, name: str, bank: Any) -> None:
        """Raise where ranks hold parts of a matrix whose rows or blocks have histories."""
        if not is_sharded(bank):
            return
        sizes = zip(bank.placements, bank.device_mesh.shape, strict=True)
        if all(size == 1 or not p.is_shard() or p.is_shard(dim=0) for p, size in sizes):
            return
        own = next((each for each in self.products.values() if each.weight_name == name), None)
        if own is not None and own.ledger.sites[own.indices["weight"]].grids:
            raise UnsupportedError(
                f"{shown(own.fqn)}: expected banks that are split over experts, got matrices that "
                "are split themselves, whose weights have a scale a row or block; split over "
                "experts, or give these weights one scale (PerTensor())"
            )

    # ---- which weight ----------------------------------------------------------------------

    def find(self, weight: Any) -> Found | None:
        """Return what of the banks a tensor is; None: nothing."""
        if not isinstance(weight, Tensor) or weight.ndim not in (2, BANK):
            return None
        memory, offset = memory_of(weight), int(weight.storage_offset())
        for place in self._places.get(memory, ()):
            if place.start <= offset < place.stop and is_of_experts(weight, place.step):
                within = (offset - place.start) // place.step if place.step else 0
                return Found(place.bank, place.first + within, weight.ndim == BANK)
        return None

    def _add(self, x: Tensor, bank: str, *, first: int, step: int) -> None:
        start = int(x.storage_offset())
        place = Place(bank, start, start + max(x.numel(), 1), step, first)
        self._places.setdefault(memory_of(x), []).append(place)

    def _follow(self, x: Any, made: Tensor) -> None:
        """Know what was made of a weight as that weight."""
        found = self.find(x)
        if found is not None and memory_of(made) != memory_of(x):
            self._made.append(made)  # or its memory is soon another's
            step = made.stride(0) if found.is_bank else 0
            self._add(made, found.bank, first=found.first, step=step)

    def _say_if_missed(self, name: str, args: Sequence[Any]) -> None:
        """Warn once of a module that multiplies by a bank in a way that is not known here."""
        if self.module in _told or accounted(*self.products.values()) is not None:
            return
        for arg in tree_leaves(args):
            found = self.find(arg)
            own = None if found is None else self.of(found.bank, found.first)
            if found is None or own is None or own.is_plain:
                continue
            _told.add(self.module)
            warnings.warn(
                f"{shown(own.fqn.rpartition('.')[0])}: a bank of matrices, by which its forward "
                f"multiplies through {name}, of which nothing is known here: without FP8; use "
                "unclamp.grouped_mm (docs/experts.md)",
                UnclampWarning,
                stacklevel=3,
            )
            return

    def of(self, bank: str, number: int) -> Operands | None:
        """Return an expert's operands; None where it is not converted."""
        return self.products.get(f"{bank}.{number}")

    # ---- products --------------------------------------------------------------------------

    def one(
        self,
        found: Found,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """Return one expert's product, with its weight as `[N, K]`."""
        own = self.of(found.bank, found.first)
        if own is None or own.is_plain:
            return plain()
        run_again_within(self, self._entered_by)
        if not own.counts_only:
            fit(own, weight.shape)
            return multiply(own, x, weight, bias, training=self.module.training)
        return self._counted(own, plain(), x, weight)

    def _counted(self, own: Operands, output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        fit(own, weight.shape)
        commit = when_to_commit(own, x, weight, None, training=self.module.training)
        return output if commit is None else count(own, output, x, weight, commit=commit)

    def all(
        self,
        found: Found,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[tuple[int, int]],
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """Return the products of all experts of a bank.

        Args:
            found: The bank.
            x: Rows, those of one expert after those of another, `[T, K]`.
            weight: `[E, K, N]`.
            bias: `[E, N]`, or None.
            sizes: Rows of each expert that count, and of padding after them.
            plain: Computes it all without FP8.
        """
        experts = [self.of(found.bank, found.first + number) for number in range(len(sizes))]
        run_again_within(self, self._entered_by)
        casting = [own for own in experts if own is not None and not own.is_plain]
        if all(own.counts_only for own in casting):  # those of one model all are, or none
            output = plain()
            return self._all_counted(experts, output, x, weight, sizes) if casting else output
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        parts, start = [], 0
        for number, (own, (tokens, padding)) in enumerate(zip(experts, sizes, strict=True)):
            middle, stop = start + tokens, start + tokens + padding
            rows, start = slice(start, middle), stop
            if own is None or own.is_plain:
                parts += [Part(number, rows)] if tokens else []
            elif tokens or own.shares:
                check(own, x, weight)
                fit(own, weight.shape[:0:-1])
                parts.append(Part(number, rows, own, self._meeting(own, x[rows], weight, bias)))
            if padding:
                parts.append(Part(number, slice(middle, stop), is_padding=True))
        return Bank.apply(x, weight, bias, parts)

    def _meeting(self, own: Operands, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Meets:
        return meeting(own, rows, weight, bias, training=self.module.training)

    def _all_counted(
        self,
        experts: Sequence[Operands | None],
        output: Tensor,
        x: Tensor,
        weight: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Return the plain output, with what each expert's casts would lose counted."""
        every = [size for pair in sizes for size in pair]
        every.append(len(x) - sum(every))
        # One node of the graph, whose backward is one copy: a slice each would make as many sums.
        parts, rows = list(output.split(every)), x.split(every)
        for number, own in enumerate(experts):
            place = 2 * number
            if own is not None and not own.is_plain and (len(rows[place]) or own.shares):
                parts[place] = self._counted(own, parts[place], rows[place], weight[number].t())
        return torch.cat(parts)


def local_part(bank: Any) -> tuple[Tensor, int]:
    """Return this rank's part of a bank, and the number of its first expert among all."""
    if not is_sharded(bank):
        return bank, 0
    first, count = 0, bank.shape[0]
    for number, placement in enumerate(bank.placements):
        if placement.is_shard() and placement.dim % BANK == 0:
            piece = -(-count // bank.device_mesh.size(number))
            first += piece * bank.device_mesh.get_local_rank(number)
            count = piece
    return bank._local_tensor, first


def memory_of(x: Tensor) -> int:
    """Return which memory a tensor lies in; 0 where it has none."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return 0


# ---- functions of torch ------------------------------------------------------------------------


def in_groups(
    watching: Watching,
    plain: Callable[[], Tensor],
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """`torch._grouped_mm`, of rows in groups by the matrices of a bank, or of batches by them."""
    found = watching.find(weight)
    if found is None or not found.is_bank:
        return None
    if offs is None or x.ndim == BANK:
        return _batched(watching, plain, x, weight)
    # As torch's own, which autocast does not know.
    with torch.autocast(x.device.type, enabled=False):
        made = watching.all(found, x, weight, bias, sizes_of(x, offs), plain)
    return made if out_dtype is None else made.to(out_dtype)


def _batched(
    watching: Watching, plain: Callable[[], Tensor], x: Tensor, weight: Tensor, **_: Any
) -> Tensor | None:
    """`torch.bmm` of a batch an expert, `[E, T, K]`, by a bank, `[E, K, N]`."""
    found = watching.find(weight)
    if found is None or not found.is_bank or x.ndim != BANK or len(x) != len(weight):
        return None
    experts, tokens = x.shape[:2]
    sizes = [(tokens, 0)] * experts
    flat = watching.all(found, x.flatten(0, 1), weight, None, sizes, lambda: plain().flatten(0, 1))
    return flat.view(experts, tokens, -1)


def _matmul(
    watching: Watching, plain: Callable[[], Tensor], x: Tensor, weight: Tensor, **_: Any
) -> Tensor | None:
    """`x @ weight`, of tokens by an expert's `[K, N]`, or of batches, or all of them, by a bank."""
    found = watching.find(weight)
    if found is None:
        return None
    if found.is_bank:
        x = x.expand(len(weight), *x.shape[-2:]) if x.shape[:-2] in ((), (1,)) else x
        return _batched(watching, plain, x, weight)
    return watching.one(found, x, weight.t(), None, plain)


def _linear(
    watching: Watching,
    plain: Callable[[], Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor | None:
    found = watching.find(weight)
    return None if found is None else watching.one(found, input, weight, bias, plain)


def _addmm(
    watching: Watching,
    plain: Callable[[], Tensor],
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor | None:
    found = watching.find(weight)
    if found is None or (beta, alpha) != (1, 1) or bias.ndim != 1:
        return None
    return watching.one(found, x, weight.t(), bias, plain)


ACTS: dict[str, Callable[..., Tensor | None]] = {
    "_grouped_mm": in_groups,
    "grouped_mm": in_groups,
    "bmm": _batched,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "linear": _linear,
    "addmm": _addmm,
}
