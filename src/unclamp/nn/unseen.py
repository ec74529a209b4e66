"""Does a model train by steps that its clock does not see? Says so once, and what to call.

A sure sign is a weight that changes between trained forwards although no update is made: under
gradient accumulation it stays as it is, however many microsteps there are. Most changes show in
the version that torch counts for a tensor, which costs nothing to ask. Those that do not (written
through `.data`, or by a kernel of another library) show in a few of its elements, which are looked
at only before a model's first update, and ever more rarely. A frozen model has no weights that
could change: there the steps of an optimizer of something else are the sign, or, where nothing
steps at all, a number of forwards that no accumulation reaches.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from unclamp.errors import UnclampWarning
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.holders import Product
from unclamp.nn.noted import some_of
from unclamp.nn.turns import Turns
from unclamp.numerics.gpu import is_capturing

CHANGES = 3
"""Changes of a weight without an update in between after which the user is told."""
CLOSE_LOOKS = frozenset({1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256, 512, 1024})
"""Trained forwards without an update at which some of a weight's elements are looked at."""
STEPS_OF_OTHERS = 8
"""Steps of other optimizers, with forwards of a frozen model in between, that tell as much."""
FORWARDS = 1024
"""Trained forwards without an update after which the user is told though nothing else shows."""
WEIGHTS = 8
"""Of how many weights some elements are looked at."""

WHY_COPIES = (
    "the optimizer {name} holds other tensors than its parameters, such as float32 copies or one "
    "flat buffer"
)
WHY_NONE = (
    "its weights change without a step of a torch.optim optimizer: gradient hooks or code of your "
    "own update them, or the optimizer holds parameters of another object"
)
WHY_FROZEN = "its weights are frozen, and what trains{by} lies outside of it"
WHY_UNKNOWN = (
    "no optimizer stepped that holds its parameters, and no gradients are being accumulated in them"
)


class Watched(Protocol):
    """What is watched: a ledger."""

    turns: Turns
    pending: Tensor

    @property
    def has_pending(self) -> bool:
        """Whether anything was committed that no update has taken."""
        ...


class _Print(NamedTuple):
    """What weights that want gradients are like, by product: versions, and some elements."""

    versions: dict[int, int]
    elements: dict[int, Tensor]


@dataclass
class _Look:
    """What a product's weight was like when it was last looked at."""

    made: int
    weight: int
    version: int
    forwards: int = 0
    changes: int = 0


class Closures:
    """The closures of optimizers that run: within them weights may change many times a step.

    A hook before a step and one after it would not do: the second one is not called where the step
    raises, and the first one's word would then stand for good.
    """

    def __init__(self) -> None:
        self._running = 0

    def __bool__(self) -> bool:
        """Whether one runs."""
        return self._running > 0

    def noted(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return a closure that is known to run while it does."""

        @functools.wraps(closure)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._running += 1
            try:
                return closure(*args, **kwargs)
            finally:
                self._running -= 1

        return run


closures = Closures()


class Unseen:
    """Notices steps that no hook sees, for one ledger.

    Attributes:
        is_told: Whether the user calls `unclamp.step`.
    """

    def __init__(self) -> None:
        self.is_told = False
        self._has_warned = False
        self._looks: dict[int, _Look] = {}
        self._watched_closely: int | None = None
        self._sample: Tensor | None = None
        self._missed = 0
        self._missed_between = (-1, -1)
        self._missed_name: str | None = None
        self._missed_since = 0
        self._print: _Print | None = None
        self._missed_print: _Print | None = None

    def release(self, product: int) -> None:
        """Watch a product no more."""
        self._looks.pop(product, None)
        if self._watched_closely == product:
            self._watched_closely = self._sample = None

    # ---- at each forward that trains -------------------------------------------------------

    def look(self, product: int, weight: Tensor, ledger: Watched) -> None:
        """Look at a product's weight in a forward that trains."""
        if self._has_warned or self.is_told or closures:
            return
        own = weight if weight._base is None else weight._base  # Conv1D's is a view
        if not isinstance(own, nn.Parameter) or own.is_inference():
            return
        made, look = ledger.turns.made_for(product), self._looks.get(product)
        if look is None or look.made != made or look.weight != id(own):
            self._looks[product] = _Look(made, id(own), own._version)
            return
        look.forwards += 1
        if own._version != look.version:
            look.version = own._version
            look.changes += 1
        elif made == 0 and look.forwards in CLOSE_LOOKS and self._has_changed(product, own):
            look.changes += 1
        if look.changes < CHANGES and look.forwards < FORWARDS:
            return
        self._conclude(look, own, ledger)

    def _conclude(self, look: _Look, weight: Tensor, ledger: Watched) -> None:
        is_sure = look.changes >= CHANGES
        look.forwards = look.changes = 0
        if not ledger.has_pending:  # forwards without a backward: nothing waits for an update
            return
        if _accumulates(weight):  # weights edited between the microsteps of a step that will come
            return
        if is_sure:
            name = self._missed_name
            self._tell(WHY_NONE if name is None else WHY_COPIES.format(name=name))
        elif not weight.requires_grad:
            self._tell(WHY_FROZEN.format(by=self._by()))
        elif weight.grad is None:
            self._tell(WHY_UNKNOWN)

    def _has_changed(self, product: int, weight: Tensor) -> bool:
        """Whether elements of one product's weight have changed since the last look at them."""
        if self._watched_closely is None:
            self._watched_closely = product
        if self._watched_closely != product or is_capturing() or _is_fake(weight):
            return False
        before, self._sample = self._sample, some_of(weight)
        return before is not None and not torch.equal(before, self._sample)

    # ---- at steps --------------------------------------------------------------------------

    def miss(self, optimizer: Optimizer, ledger: Watched, products: Iterable[Product]) -> None:
        """Take down a step of an optimizer that holds nothing of the model."""
        self._missed_name = type(optimizer).__name__
        self._missed_since += 1
        if self._has_warned or self.is_told:
            return
        updates, commits = ledger.turns.made, ledger.pending._version
        before, self._missed_between = self._missed_between, (updates, commits)
        if before[0] != updates:
            self._missed = 0
        if before[1] != commits:  # something was trained in between
            self._missed += 1
        if self._missed < STEPS_OF_OTHERS - 1:
            return
        # Twice at most: what is compiled as a whole is looked at nowhere else.
        before, self._missed_print = self._missed_print, _print_of(products)
        if self._missed_print is None:
            if self._missed >= STEPS_OF_OTHERS:
                self._tell(WHY_FROZEN.format(by=self._by()))
        elif _differ(before, self._missed_print):
            self._tell(WHY_COPIES.format(name=self._missed_name))
        if self._missed >= STEPS_OF_OTHERS:
            self._missed, self._missed_print = 0, None

    def has_stepped(self, products: list[Product]) -> bool:
        """Whether a step was made since the last call; False at the first, which only looks.

        Versions are read on the host. Elements are compared as well, for which a device is waited
        for: in trainings that no hook sees, once a step.
        """
        missed, self._missed_since = self._missed_since, 0
        before, self._print = self._print, _print_of(products)
        return missed > 0 if self._print is None else _differ(before, self._print)

    def _by(self) -> str:
        return "" if self._missed_name is None else f" by {self._missed_name}"

    def _tell(self, why: str) -> None:
        self._has_warned = True
        warnings.warn(
            "the model trains, but unclamp sees no optimizer step of it, so that its scales are "
            f"not updated and its casts not recorded: {why}. Call unclamp.step(model) after each "
            "step.",
            UnclampWarning,
            stacklevel=4,
        )


def _print_of(products: Iterable[Product]) -> _Print | None:
    """Return what the weights are like; None where all of them are frozen."""
    weights = {p.number: w for p in products if (w := _trained_weight(p)) is not None}
    if not weights:
        return None
    some = itertools.islice(weights.items(), 0, None, -(-len(weights) // WEIGHTS))
    elements = {number: some_of(w) for number, w in some}
    return _Print({number: w._version for number, w in weights.items()}, elements)


def _differ(before: _Print | None, now: _Print) -> bool:
    """Whether weights that are in both have changed: others were put in or taken out since."""
    if before is None:
        return False
    if any(before.versions.get(n, version) != version for n, version in now.versions.items()):
        return True
    both = [(x, y) for n, y in now.elements.items() if (x := before.elements.get(n)) is not None]
    if not both or any(len(x) != len(y) for x, y in both):
        return False
    device = both[0][0].device  # together, so that it is waited for once
    old, new = (
        torch.cat([x.to(device, torch.float32) for x in xs]) for xs in zip(*both, strict=True)
    )
    return not torch.equal(old, new)


def _trained_weight(product: Product) -> Tensor | None:
    usable = (p for p in product.parameters() if not (p.is_inference() or _is_fake(p)))
    return next((p for p in usable if p.requires_grad), None)


def _is_fake(weight: Tensor) -> bool:
    """Whether a tensor has no elements that could be looked at."""
    is_codes = isinstance(weight, GatheredCodes)
    return is_codes or weight.is_meta or hasattr(weight, "fake_mode")


def _accumulates(weight: Tensor) -> bool:
    """Whether a gradient from before is waiting; asked where a warning is about to be told."""
    return weight.grad is not None and bool(weight.grad.any())
