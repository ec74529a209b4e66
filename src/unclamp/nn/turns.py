"""Which products an update is for, what it leaves pending, and which updates count as steps.

A *turn* is a set of products by number, or None for all of a ledger's. Whether a product has
something pending is known without a look at the device: after a commit any product may have, and
after an update those that it left may.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unclamp.names import ROLES

Turn = frozenset[int] | None
"""Products by number, each of them `len(ROLES)` sites in a row; None: all."""
NOTHING, LEFT, FRESH = 0, 1, 2
"""What is pending for a turn: nothing; something that updates have left; or, as far as the host
knows, anything. The most of several ledgers holds for all of them."""


class Turns:
    """The updates of one ledger, as far as the host knows them.

    Attributes:
        left: Products that may have something pending since before the last update.
        made: Updates so far.
    """

    def __init__(self) -> None:
        self.left: frozenset[int] = frozenset()
        self.made = 0
        self._of_all = 0
        self._of: dict[int, int] = {}
        self._counted: Turn = None
        self._chosen: dict[frozenset[int], Tensor] = {}
        self.lay_out(0, torch.device("cpu"))

    def lay_out(self, sites: int, device: torch.device) -> None:
        """Take turns of so many sites from now on, whose tensors lie on a device."""
        self._products, self._device = sites // len(ROLES), device
        self._chosen.clear()
        self._counted = None

    def made_for(self, product: int) -> int:
        """Return the number of updates so far that were for a product."""
        return self._of_all + self._of.get(product, 0)

    def pending(self, turn: Turn, *, is_fresh: bool) -> int:
        """Return what is pending for a turn: `NOTHING`, `LEFT` or `FRESH`."""
        if is_fresh:
            return FRESH
        return LEFT if self.left and (turn is None or turn & self.left) else NOTHING

    def narrowed(self, turn: Turn, *, is_fresh: bool) -> Turn:
        """Return the products of a turn that may have something pending."""
        if turn is not None and not is_fresh:
            turn &= self.left
        return None if turn is not None and len(turn) == self._products else turn

    def chosen(self, turn: Turn) -> Tensor | None:
        """Return which sites a turn is for, bool `[sites]`; None: all."""
        if turn is None:
            return None
        if turn not in self._chosen:
            of_product = torch.zeros(self._products, dtype=torch.bool)
            of_product[sorted(turn)] = True
            self._chosen[turn] = of_product.repeat_interleave(len(ROLES)).to(self._device)
        return self._chosen[turn]

    def note(self, turn: Turn, *, is_fresh: bool) -> None:
        """Take down an update that was made."""
        self.made += 1
        if turn is None:
            self._of_all += 1
            self.left = frozenset()
            return
        for product in turn:
            self._of[product] = self._of.get(product, 0) + 1
        self.left = (frozenset(range(self._products)) if is_fresh else self.left) - turn

    def is_next_step(self, turn: Turn, is_a_step: Callable[[], bool]) -> bool:
        """Whether an update begins a step: one that holds a product which had its turn in this one.

        So the halves of a GAN, updated one after the other, count as one step, and updates of a
        half that is trained five times as often as five.

        Args:
            turn: The products of the update.
            is_a_step: Whether it may be one at all; asked once.
        """
        had_turn = turn is None or self._counted is None or bool(turn & self._counted)
        begins = is_a_step() and had_turn
        if begins or turn is None or self._counted is None:
            self._counted = turn
        else:
            self._counted |= turn
        return begins


def taken(x: Tensor, some: Tensor | None, otherwise: Tensor) -> Tensor:
    """Return the rows of some sites, and of the others what `otherwise` has; None: all as is."""
    return x if some is None else torch.where(some.unsqueeze(1), x, otherwise)


def clear(x: Tensor, some: Tensor | None, value: Tensor | float) -> None:
    """Set the rows of some sites, in place; None: all of them."""
    if some is None:
        x.copy_(value) if isinstance(value, Tensor) else x.fill_(value)
        return
    chosen = some.unsqueeze(1) if x.ndim > 1 else some
    x.copy_(torch.where(chosen, value, x))
