"""One decision about one site, with the evidence that it was made from."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from unclamp.analysis.whatif import policy_text
from unclamp.names import SiteName
from unclamp.scaling import Scaling
from unclamp.written import counted, percent, times

Kind = Literal["up", "down", "held"]
Reason = Literal["clamped", "repeated", "price", "clean"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A site goes up its ladder or down; or "held": it would go up, and the ceiling forbids it.

    Attributes:
        step: The step whose casts decided it; it governs later ones.
        site: Which site.
        kind: Up, down or held.
        reason: What spoke: casts that may have clamped too much, repeated casts, a price; or that
            nothing spoke against the lower rung.
        before: The scaling so far.
        after: The scaling that it gets, or would have got.
        amax: Of the step's cast.
        overshoot: The amax over the largest value that its rung could represent; 0: unknown.
        clamp_error: The most that the cast may have lost by clamping on the rung, a fraction.
        price: The first-order price of the cast, in units of the loss; None: unknown.
        spoke: Of the newest `of` updates, how many spoke against the rung.
        of: See there.
        clean: Updates in a row in which nothing spoke against the lower rung.
        avoided: Updates since the site went up at which the lower rung would have been spoken
            against: what staying up has gained.
        reads: Reads a cast over all steered sites after it.
    """

    step: int
    site: SiteName
    kind: Kind
    reason: Reason
    before: Scaling
    after: Scaling
    amax: float
    overshoot: float
    clamp_error: float
    price: float | None = None
    spoke: int = 0
    of: int = 0
    clean: int = 0
    avoided: int = 0
    reads: float = 1.0

    @property
    def text(self) -> str:
        """The decision in one line."""
        way = f"{policy_text(self.before)} -> {policy_text(self.after)}"
        head = f"{self.site}: {way}" if self.kind != "held" else f"{self.site}: stays, not {way}"
        return f"{head} ({self._why()})"

    def _why(self) -> str:
        over = f"overshoot {times(self.overshoot)}"
        if self.reason == "clean":
            return f"{counted(self.clean, 'clean update')}, {self.avoided:,} avoided above"
        if self.reason == "clamped":
            why = f"{over}, clamp error up to {percent(self.clamp_error)}"
        elif self.reason == "repeated":
            why = f"{self.spoke:,} of {self.of:,} casts repeated"
        else:
            why = f"price {self.price:.3g}"
        return f"{why}, but {self.reads:.3g} reads a cast" if self.kind == "held" else why

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "step": self.step,
            **self.site.to_dict(),
            "kind": self.kind,
            "reason": self.reason,
            "before": policy_text(self.before),
            "after": policy_text(self.after),
            "amax": self.amax,
            "overshoot": self.overshoot if math.isfinite(self.overshoot) else None,
            "clamp_error": self.clamp_error,
            "price": self.price,
            "spoke": self.spoke,
            "of": self.of,
            "clean": self.clean,
            "avoided": self.avoided,
            "reads": self.reads,
        }
