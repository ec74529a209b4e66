"""How one figure is written, wherever people read it: a ratio, a share, a loss, a count of things.

Whole cells and rows are for `words`; `sites.js` writes numbers by the same rules.
"""

import math
from collections.abc import Sequence

LARGEST_FIXED = 1e5
"""From here on a figure has an exponent: 1.9e29, and not thirty digits of which two are known."""
SMALLEST_FIXED = 1e-3
NOT_FINITE = "not finite"


def loss_text(value: float, form: str = ".4f") -> str:
    """Return a loss, or a difference of losses, in a fixed form as long as that is readable.

    Example:
        >>> loss_text(2.58214), loss_text(1.9e29), loss_text(math.nan)
        ('2.5821', '1.9e29', 'not finite')
    """
    if not math.isfinite(value):
        return NOT_FINITE
    return format(value, form) if abs(value) < LARGEST_FIXED else with_exponent(value, form)


def times(value: float, digits: int = 2) -> str:
    """Return a ratio: "2.36x".

    Example:
        >>> times(2.361), times(1.9e29), times(0.0002), times(math.inf)
        ('2.36x', '1.9e29x', '2.0e-4x', 'not finite')
    """
    if not math.isfinite(value):
        return NOT_FINITE
    is_small = 0 < abs(value) < SMALLEST_FIXED
    if is_small or abs(value) >= LARGEST_FIXED:
        return f"{with_exponent(value)}x"
    return f"{value:.{digits}f}x"


def signed(value: float) -> str:
    """Return a difference with its sign and three figures.

    Example:
        >>> signed(0.00412), signed(-1.9e29), signed(0.0)
        ('+0.00412', '-1.9e29', '0')
    """
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < LARGEST_FIXED:
        return with_exponent(value, "+")
    return f"{value:+.3g}" if abs(value) < 1000 else f"{value:+,.0f}"


def with_exponent(value: float, form: str = "") -> str:
    """Return a figure as 1.9e29: two figures, and an exponent without plus sign or zeros."""
    sign = "+" if form.startswith("+") else ""
    mantissa, exponent = format(value, f"{sign}.1e").split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """Return a fraction as percent with three figures.

    Example:
        >>> percent(0.25), percent(6.94e-8), percent(0.0)
        ('25 %', '6.94e-6 %', '0 %')
    """
    if not math.isfinite(share):
        return NOT_FINITE
    text = f"{100 * share:.3g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return f"{text} %"


def counted(number: float, noun: str, nouns: str = "") -> str:
    """Return a count with its noun in the right number.

    Example:
        >>> counted(1, "step"), counted(1200, "step"), counted(2, "is", "are")
        ('1 step', '1,200 steps', '2 are')
    """
    shown = f"{number:,.0f}"
    return f"{shown} {noun if shown == '1' else nouns or noun + 's'}"


def listed(names: Sequence[str], joined: str = "and", *, most: int | None = None) -> str:
    """Return names as people list them; of more than `most`, the first ones and how many remain.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"], "or")
        ('a', 'a and b', 'a, b or c')
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    if most is not None and len(names) > most:
        names = [*names[:most], f"{len(names) - most:,} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {joined} {names[-1]}"
