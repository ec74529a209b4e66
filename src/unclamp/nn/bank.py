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

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unclamp.nn.accounts import accounted
from unclamp.nn.clock import ticking
from unclamp.nn.counting import count
from unclamp.nn.grouped import Matrices, is_of_experts, sizes_of, split_rows
from unclamp.nn.operands import Operands
from unclamp.nn.parts import fit, is_sharded
from unclamp.nn.product import multiply, when_to_commit
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


class Watching(TorchFunctionMode):
    """Makes products with a module's banks FP8 products while its forward runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.products = products_in(module)
        self._places: dict[int, list[Place]] = {}
        self._made: list[Tensor] = []
        for name, bank in banks_of(module):
            local, first = _local(bank)
            self._add(local, name, first=first, step=local.stride(0))

    def __enter__(self) -> "Watching":
        _running().append(self)
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        _running().pop()
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
        made = func(*args, **kwargs)
        if name in CONVERSIONS and args:
            self._follow(args[0], made)
        return made

    # ---- which weight ----------------------------------------------------------------------

    def find(self, weight: Any) -> Found | None:
        """Return what of the banks a tensor is; None: nothing."""
        if not isinstance(weight, Tensor) or weight.ndim not in (2, BANK):
            return None
        memory, offset = _memory_of(weight), int(weight.storage_offset())
        for place in self._places.get(memory, ()):
            if place.start <= offset < place.stop and is_of_experts(weight, place.step):
                within = (offset - place.start) // place.step if place.step else 0
                return Found(place.bank, place.first + within, weight.ndim == BANK)
        return None

    def _add(self, x: Tensor, bank: str, *, first: int, step: int) -> None:
        start = int(x.storage_offset())
        place = Place(bank, start, start + max(x.numel(), 1), step, first)
        self._places.setdefault(_memory_of(x), []).append(place)

    def _follow(self, x: Any, made: Tensor) -> None:
        """Know what was made of a weight as that weight."""
        found = self.find(x)
        if found is not None and _memory_of(made) != _memory_of(x):
            self._made.append(made)  # or its memory is soon another's
            step = made.stride(0) if found.is_bank else 0
            self._add(made, found.bank, first=found.first, step=step)

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
        casts = [own is not None and not (own.is_plain or own.counts_only) for own in experts]
        counts = [own is not None and own.counts_only and not own.is_plain for own in experts]
        if not any(casts):
            output = plain()
            if not any(counts):
                return output
            made = split_rows(output, sizes)
        else:
            made = [None] * (2 * len(sizes) + 1)
        weights, rows = Matrices.apply(weight), split_rows(x, sizes)
        biases = [None] * len(sizes) if bias is None else bias.unbind(0)
        parts: list[Tensor] = []
        for number, own in enumerate(experts):
            matrix, shift = weights[number], biases[number]
            for place in (2 * number, 2 * number + 1):
                tokens, part = rows[place], made[place]
                is_counted = place == 2 * number and own is not None and not own.is_plain
                if not len(tokens) and not (is_counted and own is not None and own.shares):
                    continue
                if is_counted and own is not None and own.counts_only:
                    part = F.linear(tokens, matrix, shift) if part is None else part
                    parts.append(self._counted(own, part, tokens, matrix))
                elif is_counted and own is not None and part is None:
                    fit(own, matrix.shape)
                    training = self.module.training
                    parts.append(multiply(own, tokens, matrix, shift, training=training))
                else:
                    parts.append(F.linear(tokens, matrix, shift) if part is None else part)
        if not parts and made[-1] is None:  # a graph all the same, whose gradients are zeros
            parts.append(F.linear(rows[0], weights[0], biases[0]))
        if len(tail := rows[-1]):
            rest = made[-1]
            parts.append(tail.new_zeros(len(tail), weight.shape[-1]) if rest is None else rest)
        return torch.cat(parts) if parts else plain()


def _local(bank: Any) -> tuple[Tensor, int]:
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


def _memory_of(x: Tensor) -> int:
    """Return which memory a tensor lies in; 0 where it has none."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return 0


# ---- functions of torch ------------------------------------------------------------------------


def _grouped(
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
    "_grouped_mm": _grouped,
    "grouped_mm": _grouped,
    "bmm": _batched,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "linear": _linear,
    "addmm": _addmm,
}


# ---- unclamp.grouped_mm ------------------------------------------------------------------------


class _Stack(threading.local):
    def __init__(self) -> None:
        self.running: list[Watching] = []


_stack = _Stack()


def _running() -> list[Watching]:
    """Return what is watched in this thread, the innermost last."""
    return _stack.running


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows in groups each by a matrix of its own: `F.grouped_mm`, in FP8 once converted.

    For a module of one's own whose experts lie in one parameter. It is torch's function until the
    module that has the parameter goes through `unclamp.convert`, which finds it by this name in the
    module's code. From then on each expert is a product with scales, histories and counts of its
    own, named like one of a list of linear layers: `experts.up.5`.

    Shapes: `x` `[T, K]`, `weight` `[E, K, N]` (a transposed parameter `[E, N, K]` is fine), `offs`
    `[E]`, the end of each group in `x`; `bias` `[E, N]`; the result `[T, N]` in the dtype of `x`.

    Numerics: those of a linear layer for each group. Rows after the last group are zeros where
    the module is converted, and whatever was in memory where it is not.

    Example:
        >>> import torch, unclamp
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = torch.nn.Parameter(torch.ones(2, 16, 8))
        ...     def forward(self, x, offs):
        ...         return unclamp.grouped_mm(x, self.up.mT, offs)
        >>> experts = Experts()
        >>> list(unclamp.convert(experts, unclamp.Recipe()).converted)
        ['up.0', 'up.1']
        >>> offs = torch.tensor([3, 4], dtype=torch.int32)
        >>> experts(torch.ones(4, 8), offs).shape
        torch.Size([4, 16])
    """
    for watching in reversed(_running()):
        if watching.find(weight) is not None:
            return _in_fp8(watching, x, weight, offs, bias)
    module = _converted_module_of(weight)
    if module is not None:  # a part of a forward that is computed again in backward
        with Watching(module) as watching:
            return _in_fp8(watching, x, weight, offs, bias)
    return _plain(x, weight, offs, bias)


def _in_fp8(
    watching: Watching, x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None
) -> Tensor:
    with torch._C.DisableTorchFunction():
        made = _grouped(watching, lambda: _plain(x, weight, offs, bias), x, weight, offs, bias)
    assert made is not None
    return made


def _plain(x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None) -> Tensor:
    output = F.grouped_mm(x, weight, offs=offs)
    if bias is None:
        return output
    numbers = torch.arange(len(x), device=x.device, dtype=offs.dtype)
    group = torch.searchsorted(offs, numbers, right=True).clamp(max=len(offs) - 1)
    return output + bias[group]


def _converted_module_of(weight: Tensor) -> nn.Module | None:
    """Return the converted module that has a bank, whose forward does not run."""
    memory = _memory_of(weight)
    for ledger in ticking:
        for own in ledger.layers:
            module = None if own.module is None else own.module()
            bank = own.parameter_in(module)
            if bank is not None and bank.ndim == BANK and _memory_of(_local(bank)[0]) == memory:
                return module
    return None
