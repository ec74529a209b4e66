"""Whether somebody takes an account of a model's products, without a cast: `nn.coverage`.

A converted product that is accounted for is computed by the plain layer's operation, inside of a
note which product that is. So nothing is cast or counted, the step's shapes are enough, and its
backward is the plain one. Whatever computes products of its own asks here first.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from unclamp.nn.ledger import Ledger
from unclamp.nn.operands import Operands

_LISTENERS: list["Account"] = []


class Account:
    """Notes which products are being computed, of some ledgers. One at a time listens.

    Attributes:
        inside: The operands of the product, or of the several products of one operation, that is
            being computed; empty outside of one.
    """

    def __init__(self, ledgers: Iterable[Ledger]) -> None:
        self.ledgers = frozenset(ledgers)
        self.inside: tuple[Operands, ...] = ()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Listen for as long as the context lasts."""
        _LISTENERS.append(self)
        try:
            yield
        finally:
            _LISTENERS.remove(self)

    @contextmanager
    def note(self, operands: tuple[Operands, ...]) -> Iterator[None]:
        """Note that these are computed, for as long as the context lasts."""
        before, self.inside = self.inside, operands
        try:
            yield
        finally:
            self.inside = before


def accounted(*operands: Operands) -> AbstractContextManager[None] | None:
    """Return the context in which the plain operation is to be computed; None: nobody listens."""
    for account in _LISTENERS:
        if operands and operands[0].ledger in account.ledgers:
            return account.note(operands)
    return None
