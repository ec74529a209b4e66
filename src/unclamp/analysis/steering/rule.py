"""The rule by which a site moves on its ladder of scalings, as a value and as a text.

What a cast loses by clamping is not in its amax, but it is bounded by it. An element is clamped
from x to c = format.max / scale. With overshoot o = amax / c every clamped element has |x| <= o c,
so it loses |x| - c <= |x| (1 - 1/o), and over the tensor

    clamp error = sum (|x| - c)^2 / sum x^2  <=  (1 - 1/o)^2

So a rule that acts wherever this bound is above a tolerance overlooks no clamp error above it,
whatever the tensor, and needs nothing but amaxes, which ranks share.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from unclamp.analysis.whatif import parse_policy, policy_text
from unclamp.errors import RecipeError
from unclamp.formats import unknown_name
from unclamp.policy import history_len_of
from unclamp.scaling import Delayed, Dynamic, Guarded, Scaling, check_int

MOST_RELAPSES = 10
"""Times at most that a site's way back becomes twice as long."""


def _ladder() -> tuple[Scaling, ...]:
    return Delayed(), Guarded(), Dynamic()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a site goes up its ladder, and when it comes back.

    A site goes up one rung at once when, among its newest `of` updates, the newest one and in all
    `casts` of them speak against the rung that it is on:

    - a rung that clamps: the cast's clamp error may be above `tolerance` (the module's bound);
    - a guarded rung: the cast is repeated, in `recasts` of the newest `recasts_of` updates;
    - any rung, if `price` is set: the first-order price of the cast is known and above it.

    It comes back one rung after so many updates in a row in which the lower rung, tried on the same
    amaxes, would have had nothing against it: as many as its history is long and at least `floor`.
    Each time that it has to go up again these become twice as many. A site that went up for its
    price does not come back, as a price on the lower rung is not known.

    Args:
        ladder: Scalings, cheapest first; those that predict have one scale a tensor. No rung that
            clamps lies above one that does not.
        tolerance: Largest clamp error that a cast may have, a fraction.
        casts: Casts that have to speak against a rung that clamps.
        of: Newest updates among which they are looked for.
        recasts: Repeated casts that have to speak against a guarded rung.
        recasts_of: Newest updates among which they are looked for.
        price: Largest first-order price of a cast, in units of the loss; None: not looked at.
        floor: Fewest updates for which a site stays up.
        reads: Largest mean of reads a cast over all steered sites; what would exceed it is left.

    Raises:
        RecipeError: A setting that makes no sense.
    """

    ladder: tuple[Scaling, ...] = field(default_factory=_ladder)
    tolerance: float = 0.1
    casts: int = 1
    of: int = 1
    recasts: int = 12
    recasts_of: int = 16
    price: float | None = None
    floor: int = 100
    reads: float = 1.2

    def __post_init__(self) -> None:
        for name in ("casts", "of", "recasts", "recasts_of"):
            check_int(name, getattr(self, name), 1, 1 << 16)
        check_int("floor", self.floor, 0, 1 << 30)
        for some, among in (("casts", "of"), ("recasts", "recasts_of")):
            if getattr(self, some) > getattr(self, among):
                raise RecipeError(
                    f"expected at most as many {some} as updates that they are among, got "
                    f"{some}={getattr(self, some)} and {among}={getattr(self, among)}"
                )
        _check_number("tolerance", self.tolerance, 0, 1)
        _check_number("reads", self.reads, 1, math.inf)
        if self.price is not None:
            _check_number("price", self.price, 0, math.inf)
        _check_ladder(self.ladder)

    def needed(self, rung: int, relapses: int) -> int:
        """Return how many clean updates in a row bring a site back to a rung."""
        again = 1 << min(relapses, MOST_RELAPSES)
        return max(history_len_of(self.ladder[rung]), self.floor) * again

    @property
    def longest(self) -> int:
        """Updates that some rung looks back on, the longest."""
        return max(history_len_of(scaling) for scaling in self.ladder)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives an equal rule back."""
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        return data | {"ladder": [policy_text(scaling) for scaling in self.ladder]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rule":
        """Return the rule that plain data describes.

        Raises:
            RecipeError: An unknown setting, or one that makes no sense.
        """
        known = [each.name for each in fields(cls)]
        for key in data:
            if key not in known:
                raise unknown_name("setting of a rule", key, known)
        settings = dict(data)
        if "ladder" in settings:
            settings["ladder"] = tuple(parse_policy(text) for text in settings["ladder"])
        return cls(**settings)

    def __str__(self) -> str:
        plain, said = Rule().to_dict(), self.to_dict()
        parts = [f"ladder={' > '.join(said.pop('ladder'))}"]
        parts += [f"{key}={value}" for key, value in said.items() if value != plain[key]]
        return ", ".join(parts)


def parse_rule(text: str) -> Rule:
    """Return the rule of a text: settings of `Rule`, a ladder as policies with ">" between.

    Raises:
        RecipeError: An unknown setting, or one that makes no sense.

    Example:
        >>> parse_rule("tolerance=0.2, floor=50, ladder=delayed(32) > guarded").floor
        50
    """
    data: dict[str, Any] = {}
    for part in re.split(r",(?![^(]*\))", text):
        if not part.strip():
            continue
        name, is_setting, value = (each.strip() for each in part.partition("="))
        if not is_setting:
            raise RecipeError(
                f"expected settings such as tolerance=0.1, floor=50 in the rule {text!r}, "
                f"got {part.strip()!r}"
            )
        if name in data:
            raise RecipeError(f"{name} is given twice in the rule {text!r}")
        data[name] = _parsed(name, value)
    return Rule.from_dict(data)


def _parsed(name: str, value: str) -> object:
    if name == "ladder":
        return [each.strip() for each in value.split(">")]
    if value in ("none", "None"):
        return None
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # pyright: ignore[reportOperatorIssue]
        raise RecipeError(f"expected a {name} in [{low:g}, {high:g}], got {value!r}")


def _check_ladder(ladder: tuple[Scaling, ...]) -> None:
    if len(ladder) < 2 or len({policy_text(each) for each in ladder}) < len(ladder):
        raise RecipeError(
            f"expected a ladder of two scalings or more, each once, cheapest first, got "
            f"{[policy_text(each) for each in ladder]}"
        )
    for lower, upper in itertools.pairwise(ladder):
        if upper.clamps and not lower.clamps:
            raise RecipeError(
                f"expected no rung that clamps above one that does not, got "
                f"{policy_text(lower)} > {policy_text(upper)}"
            )
    for rung in ladder:
        if rung.remembers and not rung.granularity.is_whole:
            raise RecipeError(
                f"{policy_text(rung)}: amaxes of blocks are not shared, so a rung that predicts "
                "has one scale a tensor"
            )
