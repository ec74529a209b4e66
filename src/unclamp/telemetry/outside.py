"""Which modules run in a training and did not in the step that its coverage is of.

Only those that the coverage names as idle have a hook, which goes when it was called: a training
that takes no other branch calls none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from unclamp.covered import CoverageReport
from unclamp.nn.ledger import Ledger
from unclamp.nn.named import named_modules
from unclamp.nn.unmatched import few


class Outside:
    """Names idle modules that are called with gradients enabled, each once."""

    def __init__(
        self, model: nn.Module, ledgers: Sequence[Ledger], coverage: CoverageReport | None
    ) -> None:
        self._called: list[str] = []
        self._hooks: dict[str, RemovableHandle] = {}
        idle = frozenset(() if coverage is None else coverage.idle)
        roots = [ledger.clock.root_in(model) for ledger in ledgers] if idle else []
        # The coverage may be of the model, or of the one in it that was converted. Of a wrapper
        # and what it wraps, which have one name, the inner one comes last, and is what was idle.
        named: dict[str, nn.Module] = {}
        for root in (*filter(None, roots), *([model] if idle else ())):
            named |= dict(named_modules(root))
        for name in idle & named.keys():
            self._hooks[name] = named[name].register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def note(*_: Any) -> None:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return
            hook = self._hooks.pop(name, None)
            if hook is not None:
                hook.remove()
                self._called.append(name)

        return note

    def take(self) -> list[str]:
        """Return the modules that were called since the last call, and not before."""
        called, self._called = self._called, []
        return called

    def close(self) -> None:
        """Take the hooks away."""
        while self._hooks:
            self._hooks.popitem()[1].remove()


def remembered(model: nn.Module, ledgers: Sequence[Ledger]) -> CoverageReport | None:
    """Return the coverage that the conversion of a model has left with its ledger; None: none.

    That of a part of the model would be taken for the whole's, and is not returned.
    """
    if len(ledgers) != 1 or ledgers[0].coverage is None:
        return None
    root = ledgers[0].clock.root_in(model)
    if root is None:
        return None
    own = {id(parameter) for parameter in root.parameters()}
    is_all = all(id(parameter) in own for parameter in model.parameters())
    return ledgers[0].coverage if is_all else None


def outside_text(names: Sequence[str]) -> str:
    """Return what the user is told of modules that the coverage did not see."""
    return (
        f"{few(names)}: called in the training, and not in the step that the coverage of this run "
        "is of, so that its shares leave them out: ask unclamp.coverage with a batch that takes "
        "this branch"
    )
