"""What was loaded of a model since its last update: one checkpoint may come in several parts.

A file of a sharded checkpoint holds the weight of a layer, another one its scaling state, and
nothing says which comes first. So the order does not matter: scaling state that came before the
weight it belongs to stays when that comes. A second weight of one layer is another checkpoint's.
"""

from collections.abc import Iterable


class Loading:
    """What came since the last update, of products and sites by their numbers.

    Attributes:
        updates: Of how many updates each product's state is; None where it was loaded without.
    """

    def __init__(self) -> None:
        self.updates: dict[int, float | None] = {}
        self._weights: set[int] = set()
        self._waiting: dict[int, set[int]] = {}

    def clear(self) -> None:
        """Forget all of it: the model trains on, and what is loaded next is another checkpoint."""
        self.__init__()

    def state_came(self, product: int, sites: Iterable[int]) -> None:
        """Note that scaling state came without a weight: of one that came, or that is to come."""
        if product not in self._weights:
            self._waiting.setdefault(product, set()).update(sites)

    def weight_came(self, product: int) -> frozenset[int]:
        """Note a new weight; return the sites whose state came before it, and is its own."""
        self._weights.add(product)
        return frozenset(self._waiting.pop(product, ()))

    def updates_came(self, product: int, updates: float | None) -> None:
        """Note of how many updates a state is; a part that does not say so takes nothing back."""
        if updates is not None or product not in self.updates:
            self.updates[product] = updates

    def agreed_updates(self, products: frozenset[int]) -> float | None:
        """Return the fewest updates where all of these were loaded; None: not yet, or unknown."""
        if not products <= self.updates.keys():
            return None
        known = [count for count in self.updates.values() if count is not None]
        self.updates.clear()
        return min(known, default=None)
