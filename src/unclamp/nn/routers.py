"""Routers: small layers that choose each token's experts, left in high precision on purpose.

A wrong choice is no small error: rounding a score sends a token to another expert. A router is a
layer beside experts with an output an expert, which is called `router` or `gate`, or lies in a
module that is. (transformers' routers are modules of their own, and no linear layers.)
"""

from collections.abc import Iterable, Mapping

from torch import nn

from unclamp.nn.bank import banks_of
from unclamp.nn.experts import is_experts
from unclamp.nn.named import named_modules
from unclamp.rule import Rule

REASON = (
    "a router, which chooses experts: left in high precision on purpose; a rule that names it, "
    "such as {glob!r}, takes it in"
)
CALLED = ("router", "gate")
LEVELS = 2
"""How far above a router the module lies that has the experts too."""


def find_routers(
    model: nn.Module, outputs: Mapping[str, int], rules: Iterable[Rule]
) -> dict[str, str]:
    """Return the layers that are routers and that no rule names, and what to say of each.

    Args:
        model: The model.
        outputs: The outputs of each layer that could be one, by name.
        rules: The recipe's.
    """
    counts = _experts_below(model)
    if not counts:
        return {}
    named = [rule for rule in rules if not set(_last(rule.match)) & set("*?[")]
    modules = dict(named_modules(model))
    found = {}
    for fqn, number in outputs.items():
        above = _above(fqn)
        parent = modules.get(above[0]) if above else None
        is_called = (
            _last(fqn) in CALLED
            or (bool(above) and _last(above[0]) in CALLED)
            or "router" in type(parent).__name__.lower()
        )
        beside = any(number in counts.get(name, ()) for name in above[:LEVELS])
        if is_called and beside and not any(rule.matches(fqn) for rule in named):
            found[fqn] = REASON.format(glob=f"*.{_last(fqn)}")
    return found


def _experts_below(model: nn.Module) -> dict[str, set[int]]:
    """Return how many experts there are below modules, by the modules' names."""
    counts: dict[str, set[int]] = {}
    for fqn, module in named_modules(model):
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and "expert" in _last(fqn):
            number = len(module)
        elif is_experts(module):
            number = next(bank.shape[0] for _, bank in banks_of(module))
        else:
            continue
        parent = fqn.rpartition(".")[0]
        while "expert" in _last(parent):  # torchtitan's bank is `moe.routed_experts.inner_experts`
            parent = parent.rpartition(".")[0]
        counts.setdefault(parent, set()).add(number)
    return counts


def _above(fqn: str) -> list[str]:
    """Return the names of the modules around a module, the nearest first; the model's is ""."""
    parts = fqn.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
