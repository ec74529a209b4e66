"""For every site at once: the first-order effect of what its clamp removed on the loss.

One extra pass over the steps, in which the casts tell their prices (`numerics.price`): with x as it
came, x_hat as clamped, and g the gradient of the loss by the operand, un-clamping changes the loss
by about <g, x - x_hat>, which is the price with the other sign. Inputs and weights have that. What
a gradient's clamp removes cannot change the loss of its own step, and acts through the optimizer
later: such sites are ranked by clamp error.

On several ranks each has the gradients of its own loss, and the effect is the mean. Casts whose
price is not known have no effect here, and are ranked by clamp error too: those of tensors that
ranks have parts of, and off the CPU casts that clamped more than one element in 128.

First order is good for a ranking and not for an attribution: the outliers are large
(docs/price.md). The effects are kept with the answers of replays.
"""

import contextlib
import math
from collections.abc import Iterator

from torch import nn

from unclamp.explain.kept import Screened
from unclamp.explain.replay import Replay
from unclamp.names import SiteName
from unclamp.nn.attach import find_ledgers
from unclamp.nn.ledger import Ledger
from unclamp.nn.update import Inspection, Update
from unclamp.numerics.inspection import CLAMP_PRICE, PRICES
from unclamp.policy import unclamped
from unclamp.scaling import Scaling


class Screening:
    """Adds up the effects of clamped inputs and weights while steps run; see `watching`."""

    def __init__(self, model: nn.Module) -> None:
        self._ledgers = find_ledgers(model)
        self._sums: dict[SiteName, float] = {}

    @property
    def effects(self) -> dict[SiteName, float]:
        """By site, the change of the losses that un-clamping would make, first order.

        It is the sum over the steps watched. Negative is a fall. Sites of which not all is known
        are left out.
        """
        return {site: effect for site, effect in self._sums.items() if math.isfinite(effect)}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the steps in this context."""
        ends = []
        for ledger in self._ledgers:
            ledger.inspect(_inspection(ledger), by=self)
            ends.append(ledger.subscribe(lambda update, ledger=ledger: self._hear(ledger, update)))
        try:
            yield
        finally:
            for end in ends:
                end()
            for ledger in self._ledgers:
                ledger.inspect("never", by=self)

    def _hear(self, ledger: Ledger, update: Update) -> None:
        if update.details is None:
            return
        prices = update.details[:, [PRICES, CLAMP_PRICE]].tolist()
        for site, (count, price) in zip(ledger.sites, prices, strict=True):
            if count:
                name = SiteName(site.fqn, site.role)
                self._sums[name] = self._sums.get(name, 0.0) - price


def _inspection(ledger: Ledger) -> Inspection:
    """Return which casts are to be looked at: off the CPU nobody knows which clamped."""
    return "clamped" if ledger.scale.device.type == "cpu" else "always"


def screened(replay: Replay, *, last: int) -> Screened:
    """Return the effects of what the steps up to `last` clamp, in one pass over them."""
    screening = Screening(replay.training.model)
    trace = replay.run(free_gradients(replay), last=last, watching=screening.watching)
    ranks = replay.ranks
    effects = {k: x / ranks.count for k, x in ranks.summed(screening.effects).items()}
    return Screened(effects=effects, seconds=trace.seconds)


def free_gradients(replay: Replay) -> dict[SiteName, Scaling]:
    """Return the change with which to watch: no gradient is clamped.

    Where a loss jumps its gradients do, and a clamped one would understate every effect.
    """
    free = {k: unclamped(replay.original(k)) for k in replay.sites if k.role == "grad_output"}
    return {key: scaling for key, scaling in free.items() if scaling is not None}
