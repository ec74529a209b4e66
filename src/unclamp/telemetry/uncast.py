"""Which converted products never cast, although their model trains: someone else reads the weight.

What was cast is known on the writer's thread, which reads the statistics anyway. At a few recorded
steps, ever more rarely, the products that cast nothing so far are looked for there.

A product that is only called without gradients (a teacher, a target network) does cast, and the log
of a training has nothing of it: it is not named. A frozen one that nobody calls may be a part that
this training does not need (a vision tower, trained on text), or its weight is read by someone
else. It is noted beside the figures; the user is warned unless a whole part of the model is silent.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from unclamp.names import ROLES
from unclamp.nn.holders import Product
from unclamp.nn.named import COPIES
from unclamp.nn.unmatched import few
from unclamp.numerics import Stat
from unclamp.runlog import UNCAST_EVENT, Columns
from unclamp.telemetry.columns import UNNUMBERED
from unclamp.telemetry.source import Source

UNCAST_STEPS = 8
"""Updates for a product without a cast of it after which the user is told."""


class Candidate(NamedTuple):
    """A product that is to cast.

    Attributes:
        fqn: Its name.
        ids: The ids of its sites in the log.
        others: Those of the other experts in its bank: where one of them casts the bank is called,
            and this expert gets no tokens.
        casts: Where its casts in evaluations are counted: the source's place, and the site's index.
        is_frozen: Whether its weight wants no gradient.
        is_graded: Whether its weight had a gradient when a step was made.
        is_called: Whether it was called without gradients since the last look.
    """

    fqn: str
    ids: list[int]
    others: list[int]
    casts: tuple[int, int]
    is_frozen: bool
    is_graded: bool
    is_called: bool


class Look(NamedTuple):
    """What is looked for after a step.

    Attributes:
        candidates: The products that are to cast.
        casts: Casts in evaluations so far, `[sites]` for each source; None without candidates.
    """

    candidates: list[Candidate]
    casts: list[Tensor]


class Uncast:
    """What cast nothing so far, of the ledgers that are heard.

    Its methods are called on the training's thread, `saw` and `columns` on the writer's.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._look_at = UNCAST_STEPS
        self._versions: dict[tuple[int, int], int] = {}
        self._silent_forwards: dict[tuple[int, int], int] = {}
        self._seen: set[int] = set()
        self._casts: list[list[float]] = []
        self._named: set[str] = set()
        self._noted: set[str] = set()
        self._news: list[str] = []

    def look(self, sources: Sequence[Source]) -> Look | None:
        """Return what to look for after a step with updates, if anything."""
        self._heard += 1
        if self._heard not in (1, self._look_at):
            return None
        found = [c for place, source in enumerate(sources) for c in self._candidates(place, source)]
        resting = _resting(layer.fqn for source in sources for layer in source.ledger.layers)
        found = [c for c in found if not (c.is_frozen and c.fqn in resting)]
        if self._heard == self._look_at:
            self._look_at *= 2
        casts = [source.ledger.evaluated.stats[:, Stat.CASTS].clone() for source in sources]
        return Look(found, casts)

    def _candidates(self, place: int, source: Source) -> list[Candidate]:
        """Return those of a ledger's products that are to cast, after enough updates."""
        ledger, found = source.ledger, list[Candidate]()
        products = list(ledger.clock.products(ledger))
        trained, banks = self._trained(place, products), _banks(products)
        for layer in ledger.layers:
            number, first = layer.number, layer.number * len(ROLES)
            before = self._silent_forwards.get((place, number), 0)
            self._silent_forwards[place, number] = layer.silent_forwards
            made = self._heard if ledger.captured.is_in_graph else ledger.turns.made_for(number)
            ids = source.ids[first : first + len(ROLES)]
            is_there = len(ids) == len(ROLES) and UNNUMBERED not in ids
            is_due = made >= UNCAST_STEPS and number in trained
            if (
                is_due
                and is_there
                and not (layer.is_plain or layer.only_observed)
                and first not in ledger.gone
            ):
                found.append(
                    Candidate(
                        fqn=layer.fqn,
                        ids=ids,
                        others=[
                            source.ids[other * len(ROLES) + role]
                            for other in banks.get(number, ())
                            for role in range(len(ROLES))
                            if other * len(ROLES) + role < len(source.ids)
                        ],
                        casts=(place, first),
                        is_frozen=trained[number],
                        is_graded=number in ledger.clock.graded,
                        is_called=layer.silent_forwards != before,
                    )
                )
        return found

    def _trained(self, place: int, products: Iterable[Product]) -> dict[int, bool]:
        """Return the products whose weights have changed since they were first looked at, and
        those that are frozen, whose weights need not; and whether they are.

        An update alone is no sign: it takes along products that nobody is known to hold, such as a
        half of a GAN whose turn has not come. Where no weight at all shows a change (it is written
        through `.data`, or is not in the model) they count as trained.
        """  # noqa: D205
        changed, frozen = set[int](), dict[int, bool]()
        for product in products:
            parameters = list(product.parameters())
            version = sum(p._version for p in parameters if not p.is_inference())
            if self._versions.setdefault((place, product.number), version) != version:
                changed.add(product.number)
            frozen[product.number] = bool(parameters) and not product.is_trainable
        return {
            number: is_frozen
            for number, is_frozen in frozen.items()
            if not changed or number in changed or is_frozen
        }

    def saw(self, ids: Sequence[int]) -> None:
        """Take down the sites that cast in a step."""
        self._seen.update(ids)

    def columns(self, step: int, look: Look) -> Columns:
        """Return the rows of an event that names the candidates without a cast; none without."""
        before, self._casts = self._casts, [casts.tolist() for casts in look.casts]
        silent = [c for c in look.candidates if self._seen.isdisjoint((*c.ids, *c.others))]
        called = [c for c in silent if c.is_called or self._was_evaluated(c, before)]
        # What trains has to cast in the training, whatever evaluations do.
        used = {c.fqn for c in called if c.is_frozen or not c.is_graded}
        new = [c for c in silent if c.fqn not in used | self._named]
        trained = [c.fqn for c in new if not c.is_frozen]
        frozen = [c.fqn for c in new if c.is_frozen]
        parts = _whole_parts([c.fqn for c in look.candidates], frozen)
        self._named |= {*trained, *frozen}
        late = sorted(self._noted & used)
        self._noted = (self._noted | parts) - used
        self._news += _news(trained, [fqn for fqn in frozen if fqn not in parts])
        data = {"products": trained, "frozen": frozen, "evaluated": late}
        data = {key: names for key, names in data.items() if names}
        if not data:
            return {"step": [], "kind": [], "data": []}
        return {"step": [step], "kind": [UNCAST_EVENT], "data": [json.dumps(data)]}

    def _was_evaluated(self, candidate: Candidate, before: list[list[float]]) -> bool:
        """Whether a product cast in an evaluation since the look before, compiled ones too."""
        place, index = candidate.casts
        then = before[place][index] if index < len(before[place]) else 0.0
        return self._casts[place][index] != then

    def take_warning(self) -> str | None:
        """Return what to warn of since the last call."""
        news, self._news = self._news, []
        return " ".join(news) or None


def _resting(names: Iterable[str]) -> frozenset[str]:
    """Return modules of which PEFT has one called, and the others not: copies and their original.

    Those that are not called are frozen.
    """
    copies = [name for name in names if f".{COPIES}." in name]
    return frozenset(copies) | {re.sub(rf"\.{COPIES}\.[^.]+", "", name) for name in copies}


def _banks(products: Iterable[Product]) -> dict[int, list[int]]:
    """Return the products of each one's bank, which are parts of the same parameter."""
    found: dict[int, list[int]] = {}
    of: dict[int, int] = {}
    for product in products:
        weight = None if product.has_module else product.weight()
        if weight is not None:
            of[product.number] = id(weight)
            found.setdefault(id(weight), []).append(product.number)
    return {number: found[bank] for number, bank in of.items()}


def _whole_parts(every: Sequence[str], silent: Iterable[str]) -> set[str]:
    """Return the silent products that lie in a part of the model in which all of several are."""
    names, parts = set(silent), dict[str, list[str]]()
    for fqn in every:
        path = fqn.split(".")
        for depth in range(1, len(path)):
            parts.setdefault(".".join(path[:depth]), []).append(fqn)
    whole = [inside for inside in parts.values() if len(inside) > 1 and names.issuperset(inside)]
    return {fqn for inside in whole for fqn in inside}


def _news(trained: Sequence[str], frozen: Sequence[str]) -> list[str]:
    """Return what the user is told of products without a cast."""
    said = []
    if trained:
        said.append(
            f"{few(trained)}: converted, and cast nothing in {UNCAST_STEPS} steps or more in which "
            f"{'it' if len(trained) == 1 else 'they'} trained. Something else reads the weight (a "
            "fused loss, a tied layer, F.linear with module.weight), or the layer is not called: "
            "what is computed with it is not in FP8. Call the layer, or leave it out by skip=[...]."
        )
    if frozen:
        said.append(
            f"{few(frozen)}: converted, frozen, and cast nothing in {UNCAST_STEPS} steps or more. "
            "The layer is not called; if something else reads its weight (a fused loss, a tied "
            "layer, F.linear with module.weight), what is computed with it is not in FP8. Call the "
            "layer, or leave it out by skip=[...]."
        )
    return said
