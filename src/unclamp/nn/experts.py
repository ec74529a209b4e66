"""Experts whose weights lie in one parameter each, `[experts, ., .]`: a product an expert.

Such a module is known by what it does: its forward is dispatched by transformers'
`use_experts_implementation`, or its code, that of its methods and of the functions they call, names
`grouped_mm` (torch's or `unclamp.grouped_mm`), or its class is called experts. All its parameters
of three dimensions are banks of weights, and expert 5 of `experts.up` is the product
`experts.up.5`, as in a list of linear layers.

Its forward stays its own, and is watched (`nn.bank`). Of transformers' implementations those that
multiply by copies of the weights ("batched_mm"), or by kernels of their own, have no weight that
could be watched: such a module computes as "grouped_mm" does while it is in FP8. Its config stays.

Under `torch.compile` the module is a break of the graph: how many tokens an expert gets is known
when it runs.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo

from unclamp.errors import UnclampWarning
from unclamp.nn.adapted import Adapted
from unclamp.nn.bank import Watching, banks_of
from unclamp.nn.products import Matrix

DEPTH = 2
"""How far functions that functions call are looked into."""
NAMES = frozenset(["grouped_mm", "_grouped_mm"])
INTERFACE = "experts_interface"
"""What transformers' dispatching forward closes over."""
WATCHED = (None, "eager", "grouped_mm")
"""Those of transformers' implementations that multiply by the parameters themselves."""


class Fp8Experts(Adapted):
    """A module of experts whose operands go through FP8, an expert a product; see `Adapted`."""

    may_be_missed = True
    """A rank without tokens for an expert makes no cast of it."""

    @classmethod
    def matrices(cls, module: nn.Module) -> dict[str, Matrix]:
        """Return each expert's part of each bank."""
        is_turned = bool(getattr(module, "is_transposed", False))
        return {
            f"{name}.{number}": Matrix(name, _shape(bank, is_turned=is_turned))
            for name, bank in banks_of(module)
            for number in range(bank.shape[0])
        }

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward does, with the operands cast."""
        own: Callable[..., Any] = super().forward
        said = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if said not in WATCHED and is_dispatched(type(self)):
            if any(not product.ledger.observes for product in self.products.values()):
                moe: Any = sys.modules["transformers.integrations.moe"]
                own = functools.partial(moe.grouped_mm_experts_forward, self)
            else:
                _say_not_counted(said)
        with Watching(self):
            return own(*args, **kwargs)


def _shape(bank: Tensor, *, is_turned: bool) -> tuple[int, ...]:
    _, rows, columns = bank.shape
    return (columns, rows) if is_turned else (rows, columns)


def is_experts(module: nn.Module) -> bool:
    """Whether a module multiplies tokens by banks of experts."""
    if not any(True for _ in banks_of(module)):
        return False
    kind = type(module)
    if is_dispatched(kind) or "experts" in kind.__name__.lower():
        return True
    methods = (
        value for base in kind.__mro__ if base is not nn.Module for value in vars(base).values()
    )
    return any(
        _names(method, NAMES, DEPTH) for method in methods if isinstance(method, FunctionType)
    )


def unknown_banks(module: nn.Module) -> dict[str, list[int]]:
    """Return names and shapes of what may be banks, of a module that is not known to have any.

    Layers of torch's own have parameters of three dimensions that are none.
    """
    kind = getattr(type(module), "__plain__", type(module))
    if kind.__module__.startswith("torch.nn."):
        return {}
    return {name: list(bank.shape) for name, bank in banks_of(module) if min(bank.shape) > 1}


def is_dispatched(kind: type) -> bool:
    """Whether transformers chooses at each call how the experts of a class compute."""
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        if isinstance(forward, FunctionType) and INTERFACE in forward.__code__.co_freevars:
            return True
    return False


def _names(function: FunctionType, wanted: frozenset[str], depth: int) -> bool:
    """Whether a function's code names one of these, or a function does that it calls."""
    names = set[str]().union(*(code.co_names for code in _codes(function.__code__)))
    if names & wanted:
        return True
    called = [function.__globals__.get(name) for name in names]
    if any(getattr(f, "__name__", None) in wanted for f in called if callable(f)):  # an alias
        return True
    if depth == 0:
        return False
    return any(_names(f, wanted, depth - 1) for f in called if isinstance(f, FunctionType))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


@functools.cache
def _say_not_counted(name: str) -> None:
    warnings.warn(
        f"experts computed by {name!r} multiply by copies of their weights, of which nothing is "
        "counted where a model is only observed; set_experts_implementation('grouped_mm') of the "
        "model has them counted",
        UnclampWarning,
        stacklevel=2,
    )
