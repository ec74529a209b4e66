"""When a ledger updates: right after the optimizers' steps, once for each.

What torch's hook can see there is no call for a user to forget: an optimizer that holds
parameters of the model updates their products (`nn.holders`) if something is pending, so two
optimizers on one model still make one update a step. Optimizers that step within one backward (one
a parameter) make an update each, and one step in all. What no hook sees is told by
`unclamp.step(model)` (`nn.step`), and `nn.unseen` notices where nobody does. What a CUDA graph
holds is counted by `unclamp.nn.captured`.
"""

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from unclamp.names import ROLES
from unclamp.nn import nesting
from unclamp.nn.alive import Alive
from unclamp.nn.groups import follow_wrappers
from unclamp.nn.holders import Holders, Product
from unclamp.nn.noted import noted
from unclamp.nn.products import SITES, Several, products_in
from unclamp.nn.rehearsal import watch_pipelines
from unclamp.nn.turns import Turn, Turns
from unclamp.nn.unseen import Unseen, closures
from unclamp.numerics.gpu import host_may_look

NO_TASK = -1
"""What torch calls the backward that runs, when none does."""


class Ticking(Protocol):
    """What a clock drives: a ledger."""

    clock: "Clock"
    turns: Turns
    pending: Tensor
    layers: Any
    gone: frozenset[int]
    shared: Any

    @property
    def is_due(self) -> bool:
        """Whether there is something to update."""
        ...

    @property
    def has_pending(self) -> bool:
        """Whether anything was committed that no update has taken."""
        ...

    @property
    def sites(self) -> list[Any]:
        """The sites; each product has `len(ROLES)` of them."""
        ...

    def update(self, turn: Turn = None, *, skipped: bool = False) -> None:
        """Do what a step of these products asks for; one that was skipped, with other ranks."""
        ...


class Clock:
    """Whose optimizers one ledger follows, and which of its updates count as steps.

    Attributes:
        holders: The optimizers, and what they hold.
        unseen: Watches for steps that no hook sees.
        graded: Products whose weight ever had a gradient when a step was made.
        idle: Steps since the last update, in which there was nothing to update.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._root = None if model is None else weakref.ref(model)
        self._is_adopted = False
        self._begin()

    def _begin(self) -> None:
        self._counted_in = NO_TASK
        self.holders = Holders()
        self.unseen = Unseen()
        self.graded: set[int] = set()
        self.idle = 0
        self._products: list[Product] = []
        self._weights: list[list[Product]] = []
        self._weights_of: list[Product] | None = None
        self._released: set[int] = set()
        self._found_for: Any = None
        self._asked = 0
        self._someone_trains = False

    @property
    def model(self) -> nn.Module | None:
        """The model; None where it is gone, or unknown (unpickled, or copied out of it)."""
        return None if self._root is None else self._root()

    def is_a_step(self) -> bool:
        """Whether an update now is a step of its own; asked once at each update."""
        task = torch._C._current_graph_task_id()
        is_new = task == NO_TASK or task != self._counted_in
        self._counted_in = task
        return is_new

    def extend_to(self, model: nn.Module) -> None:
        """Follow the optimizers of a whole model, where the clock's own is a part of it."""
        own = self.model
        self.look_again()
        if own is None or any(module is own for module in model.modules()):
            self._root, self._is_adopted = weakref.ref(model), False

    def adopt(self, model: nn.Module, ledger: Ticking) -> None:
        """Take a model for the clock's own, where that is unknown and all its products lie in it.

        What was adopted is a guess (it may be a part of more): a wider one takes its place.
        """
        own = self.model
        if own is model or (own is not None and not self._is_adopted):
            return
        there = {id(module) for module in model.modules()}
        modules = [p.module for p in self.products(ledger)]
        known = [own, *(None if ref is None else ref() for ref in modules)]
        if all(module is None or id(module) in there for module in known):
            self._root, self._is_adopted = weakref.ref(model), True
            self.look_again()

    def look_again(self) -> None:
        """Find the products' modules anew when they are next asked for."""
        self._found_for, self._asked = None, 0

    def release(self, operands: Any) -> None:
        """Forget a product that is reverted: nothing of it is cast or updated any more."""
        ledger: Ticking = operands.ledger
        self._released.add(operands.number)
        self.look_again()
        self.graded.discard(operands.number)
        self.unseen.release(operands.number)
        ledger.gone |= frozenset(operands.indices.values())

    def root_in(self, model: nn.Module) -> nn.Module | None:
        """Return the clock's own model as it lies in another, which may be itself.

        `model` where the own one is unknown; None where `model` is a part of it, or another.
        """
        own = self.model
        return model if own is None else next((m for m in model.modules() if m is own), None)

    # ---- steps -----------------------------------------------------------------------------

    def after_step(self, optimizer: Optimizer, ledger: Ticking) -> None:
        """Update what an optimizer's step was for."""
        self._asked = 0
        is_skipped = _is_skipped(optimizer)
        if is_skipped and not ledger.shared.look(ledger):
            return
        is_due, made = ledger.is_due, ledger.turns.made
        updated = self._update(optimizer, ledger, is_skipped) if is_due else frozenset()
        self.idle = self.idle + 1 if ledger.turns.made == made else 0
        self._note(ledger, updated | self.holders.held_by(optimizer))

    def _update(self, optimizer: Optimizer, ledger: Ticking, skipped: bool) -> frozenset[int]:
        """Update what a step was for; return which products that were, where they are known."""
        products = self.products(ledger)
        modules = _modules_of(products)  # held: what is collected from here on would seem frozen
        if not modules:
            return frozenset()
        model = self.model or nn.ModuleList(modules)
        turn = self.holders.turn_of(optimizer, model, products)
        if turn is None and self.model is None and not any(p.is_trainable for p in products):
            ledger.update()  # frozen, under an adapter of which nothing is known here
            return frozenset(p.number for p in products)
        if turn is None:
            self.unseen.miss(optimizer, ledger, self.products(ledger))
        elif turn or ledger.shared.parts:  # other ranks may have a turn, and wait for this one
            ledger.update(turn, skipped=skipped)
        return turn or frozenset()

    def _note(self, ledger: Ticking, numbers: frozenset[int] | None) -> None:
        """Note the weights of some products as a step has left them; None: of all."""
        if numbers is not None and not numbers:
            return
        for products in self._by_weight(ledger):
            theirs = [p for p in products if numbers is None or p.number in numbers]
            weight = next((w for p in theirs if (w := p.weight()) is not None), None)
            if weight is None:
                continue
            note = noted(weight)
            for product in theirs:
                own = product.operands and product.operands()
                if own is not None:
                    own.noted = note
            # A bank's gradient does not say which of its experts had tokens.
            is_one = not getattr(theirs[0].owner(), "may_be_missed", False)
            if is_one and weight.is_leaf and weight.grad is not None:
                self.graded |= {p.number for p in theirs}

    def _by_weight(self, ledger: Ticking) -> list[list[Product]]:
        """Return the products of a ledger, those together that lie in one parameter of a module."""
        products = self.products(ledger)
        if self._weights_of is not products:
            found: dict[tuple[int, str | None], list[Product]] = {}
            for product in products:
                own = product.operands and product.operands()
                module = product.module and product.module()
                key = (id(module), None if own is None else own.weight_name)
                found.setdefault(key, []).append(product)
            self._weights, self._weights_of = list(found.values()), products
        return self._weights

    def told(self, ledger: Ticking, modules: Iterable[nn.Module]) -> None:
        """Update the products of some modules that no optimizer's step is for."""
        self.unseen.is_told = True
        if not ledger.is_due:
            return
        there = {id(module) for module in modules}  # which the caller holds
        products = [
            p for p in self.products(ledger) if p.module is not None and id(p.module()) in there
        ]
        if turn := self.holders.left_over(products):
            ledger.update(turn)
            self._note(ledger, turn)

    def catch_up(self, ledger: Ticking) -> None:
        """Update where a step was made that nobody told of; called once after every step.

        Only where no optimizer of the model was ever seen, nobody calls `unclamp.step`, and the
        weights have changed since the last call: after a step that a gradient scaler skipped they
        have not. For a frozen model, which has no such weights, where an optimizer of something
        else has stepped. Not where ranks share scales: this one may be the only one to ask.
        """
        if self.unseen.is_told or not self.is_blind() or ledger.shared.parts:
            return
        if self.unseen.has_stepped(self.products(ledger)) and ledger.is_due:
            ledger.update()
            self._note(ledger, None)

    def look_at_weights(self, ledger: Ticking) -> None:
        """Look at the weights, so that the first `catch_up` can tell whether they changed."""
        self.unseen.has_stepped(self.products(ledger))

    def is_blind(self) -> bool:
        """Whether no optimizer of the model was ever seen."""
        return not self.holders

    def products(self, ledger: Ticking) -> list[Product]:
        """Return the products of a ledger, with their modules: in the model, or wherever they live.

        So a model that is gone, or was never known (a container that was made for `convert`, an
        unpickled one), is followed by what is left of it.
        """
        if self._found_for is not ledger.sites:
            model = self.model
            everything = () if model is None else model.modules()
            inside = {
                own.number: _product(own, weakref.ref(module))
                for module in everything
                for own in products_in(module).values()
                if own.ledger is ledger
            }
            # One outside of the model, or where that is unknown, may cast as long as it lives.
            outside = {x.number: x for x in ledger.layers if x.number not in inside}
            every = range(len(ledger.sites) // len(ROLES))
            self._products = [
                inside[n] if n in inside else _product(outside[n], outside[n].module)
                for n in every
                if n in inside or (n in outside and n not in self._released)
            ]
            ledger.turns.lack(frozenset(every).difference(p.number for p in self._products))
            self._found_for = ledger.sites
        return self._products

    def someone_trains(self, ledger: Ticking) -> bool:
        """Whether a parameter of the model wants a gradient.

        Asked at each product, and looked up once in as many questions as there are products. Of an
        unknown model the products' own parameters are asked, and what their optimizers hold; if
        those are frozen, whether it has been trained.
        """
        if self._asked <= 0:
            model = self.model
            self._asked = len(ledger.sites) // len(ROLES)
            self._someone_trains = (
                any(p.requires_grad for p in model.parameters())
                if model is not None
                else ledger.turns.made > 0
                or any(p.is_trainable for p in self.products(ledger))
                or self.holders.someone_trains()
            )
        self._asked -= 1
        return self._someone_trains

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": None, "_is_adopted": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _product(own: Any, module: "weakref.ref[nn.Module] | None") -> Product:
    """Return the product of some operands, and of the module that casts by them."""
    there = None if module is None else module()
    is_alone = there is None or not isinstance(there.__dict__.get(SITES), Several)
    return Product(number=own.number, module=module, operands=weakref.ref(own), has_module=is_alone)


def _modules_of(products: Iterable[Product]) -> list[nn.Module]:
    found = (None if p.module is None else p.module() for p in products)
    return [module for module in found if module is not None]


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler had a fused optimizer skip the step, where the host knows it.

    On another device only the kernel knows, and the host does not wait for it.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and host_may_look(found) and bool(found > 0)


ticking: Alive[Ticking] = Alive()
"""The ledgers of this process, in the order in which they were made."""
_hooks: list[Any] = []


def follow_optimizers(ledger: Ticking) -> None:
    """Have every optimizer's step update this ledger for as long as it lives."""
    if not _hooks:
        # Traced into a compiled step, the update would be no side effect of it.
        before: Any = torch.compiler.disable(_before_optimizer_step)
        after: Any = torch.compiler.disable(_after_optimizer_step)
        _hooks.append(register_optimizer_step_pre_hook(before))
        _hooks.append(register_optimizer_step_post_hook(after))
        watch_pipelines()
        follow_wrappers()
    ticking.add(ledger)


def _before_optimizer_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Have the step's closure noted while it runs, where there is one."""
    nesting.begin(optimizer)
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": closures.noted(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):  # after the optimizer itself
        return (args[0], closures.noted(args[1]), *args[2:]), kwargs
    return None


def _after_optimizer_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    is_outermost = nesting.end(optimizer)
    for ledger in ticking:
        # ZeRO's inner optimizer has other parameters on each rank: ranks meet at the outer one.
        if is_outermost or not ledger.shared.look(ledger):
            ledger.clock.after_step(optimizer, ledger)
