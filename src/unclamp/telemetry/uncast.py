"""Which converted products never cast, although their model trains: someone else reads the weight.

What was cast is known on the writer's thread, which reads the statistics anyway. At a few recorded
steps, ever more rarely, the products that cast nothing so far are looked for there.
"""

import json
from collections.abc import Iterable, Sequence

from unclamp.names import ROLES
from unclamp.nn.unmatched import few
from unclamp.runlog import UNCAST_EVENT, Columns
from unclamp.telemetry.columns import UNNUMBERED
from unclamp.telemetry.source import Source

UNCAST_STEPS = 8
"""Updates for a product without a cast of it after which the user is told."""


class Uncast:
    """What cast nothing so far, of the ledgers that are heard.

    Its methods are called on the training's thread, `saw` and `columns` on the writer's.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._look_at = UNCAST_STEPS
        self._decided: set[str] = set()
        self._versions: dict[tuple[int, int], int] = {}
        self._seen: set[int] = set()
        self._news: list[str] = []

    def candidates(self, sources: Iterable[Source]) -> dict[str, list[int]]:
        """Return products to look for after a step with updates, with the ids of their sites."""
        self._heard += 1
        if self._heard not in (1, self._look_at):
            return {}
        trained = {
            source: products
            for place, source in enumerate(sources)
            if (products := self._trained(place, source))
        }
        if self._heard == 1:
            return {}
        self._look_at *= 2
        found = {
            fqn: ids
            for source, products in trained.items()
            for fqn, ids in _casting(source, products, self._heard).items()
            if fqn not in self._decided
        }
        self._decided |= found.keys()
        return found

    def _trained(self, place: int, source: Source) -> frozenset[int]:
        """Return the products whose weights have changed since they were first looked at.

        A frozen one need not. An update alone is no sign: it takes along products that nobody is
        known to hold, such as a half of a GAN whose turn has not come. Where no weight at all shows
        a change (it is written through `.data`, or is not in the model) they count as trained.
        """
        ledger = source.ledger
        products = ledger.clock.products(ledger)
        changed = set[int]()
        for product in products:
            version = sum(p._version for p in product.parameters() if not p.is_inference())
            if self._versions.setdefault((place, product.number), version) != version:
                changed.add(product.number)
        return frozenset(
            product.number
            for product in products
            if not changed or product.number in changed or not product.is_trainable
        )

    def saw(self, ids: Sequence[int]) -> None:
        """Take down the sites that cast in a step."""
        self._seen.update(ids)

    def columns(self, step: int, candidates: dict[str, list[int]]) -> Columns:
        """Return the rows of an event that names the candidates without a cast; none without."""
        names = [fqn for fqn, ids in candidates.items() if self._seen.isdisjoint(ids)]
        if not names:
            return {"step": [], "kind": [], "data": []}
        self._news = names
        return {"step": [step], "kind": [UNCAST_EVENT], "data": [json.dumps({"products": names})]}

    def take_warning(self) -> str | None:
        """Return what to warn of since the last call."""
        names, self._news = self._news, []
        if not names:
            return None
        return (
            f"{few(names)}: converted, and cast nothing in {UNCAST_STEPS} steps or more in which "
            f"{'it' if len(names) == 1 else 'they'} trained. Something else reads the weight (a "
            "fused loss, a tied layer, F.linear with module.weight), or the layer is not called: "
            "what is computed with it is not in FP8. Call the layer, or leave it out by skip=[...]."
        )


def _casting(source: Source, trained: frozenset[int], heard: int) -> dict[str, list[int]]:
    """Return those of a ledger's products that are to cast, after enough updates; with ids."""
    ledger, found = source.ledger, dict[str, list[int]]()
    for layer in ledger.layers:
        first = layer.number * len(ROLES)
        indices = range(first, first + len(ROLES))
        made = heard if ledger.captured.is_in_graph else ledger.turns.made_for(layer.number)
        ids = [source.ids[index] for index in indices if index < len(source.ids)]
        is_there = len(ids) == len(ROLES) and UNNUMBERED not in ids
        is_due = made >= UNCAST_STEPS and layer.number in trained
        if is_due and is_there and not layer.is_plain and first not in ledger.gone:
            found[layer.fqn] = ids
    return found
