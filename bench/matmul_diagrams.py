"""The diagrams of docs/matmul.md. Codes, products and digits in them are computed, not typed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

from bench.pictures import AMBER, BLUE, EDGE, GREY, INK, PAGE, RAISED, SOFT, canvas
from unclamp import E4M3FN
from unclamp.numerics.hopper import BLOCK, FRACTION_BITS, PROMOTION

PAIR = (13.0, 0.6875)
"""Two values of E4M3 whose product has all eight digits that one can have."""
BEFORE = (6.0, 6.0)
"""Their product, 32 times, is the sum so far of the block that is added."""
ADDED = (PAIR, (0.6875, 0.5), (0.6875, 0.125), (-1.625, 1.375))
"""The next block; its other products are zero."""
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _box(ax: Axes, x: float, y: float, w: float, h: float, **look: Any) -> None:
    ax.add_patch(Rectangle((x, y), w, h, **{"facecolor": RAISED, "edgecolor": EDGE, **look}))


def _say(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    ax.text(x, y, text, **{"va": "center", "color": INK, **look})


def _power(exponent: int) -> str:
    return "2" + str(exponent).translate(_RAISED)


def _number(value: float) -> str:
    return f"{value:.12g}".replace("-", MINUS)


def digits(value: float, first: int, last: int) -> str:
    """Return the binary digits of |value| from 2**first down to 2**last."""
    return format(int(abs(value) * 2.0**-last), "b").rjust(first - last + 1, "0")


def bits() -> Figure:
    """Draw two codes, field by field, and the significand of their product."""
    figure, ax = canvas(164)
    for x, label, colour in ((72, "sign", GREY), (132, "exponent + 7", AMBER),
                             (216, "mantissa", BLUE)):  # fmt: skip
        _say(ax, x, 15, label, ha="center", color=colour, fontsize=8.5)
    for row, value in enumerate(PAIR):
        _code(ax, 26 + 40 * row, "ab"[row], value)
    product = math.prod(PAIR)
    exponent = sum(math.floor(math.log2(abs(value))) for value in PAIR)
    found = digits(product / 2.0**exponent, 1, -6)
    _say(ax, 14, 127, "a · b", weight="bold")
    for place, digit in enumerate(found):
        _box(ax, 60 + 24 * place, 115, 24, 24, facecolor=PAGE, edgecolor=GREY)
        _say(ax, 72 + 24 * place, 127, digit, ha="center", family="monospace")
    ax.add_patch(Circle((108, 139), 3, facecolor=INK))  # the binary point
    written = f"{found[:2]}.{found[2:]}₂ {TIMES} {_power(exponent)} = {_number(product)}"
    _say(ax, 264, 127, written)
    _say(ax, 264, 144, "exact: 4 digits by 4 digits are at most 8", color=SOFT, fontsize=8.5)
    return figure


def _code(ax: Axes, y: float, name: str, value: float) -> None:
    code = int(torch.tensor(value).to(torch.float8_e4m3fn).view(torch.uint8))
    text = format(code, "08b")
    colours = [GREY, *[AMBER] * 4, *[BLUE] * 3]
    _say(ax, 14, y + 12, name, weight="bold")
    for place, digit in enumerate(text):
        _box(ax, 60 + 24 * place, y, 24, 24, facecolor=PAGE, edgecolor=colours[place], lw=1.5)
        _say(ax, 72 + 24 * place, y + 12, digit, ha="center", family="monospace")
    exponent = int(text[1:5], 2) - (1 - E4M3FN.min_exponent)
    _say(ax, 264, y + 12, f"1.{text[5:]}₂ {TIMES} {_power(exponent)} = {_number(value)}")


def layouts() -> Figure:
    """Draw the operands of the three GEMMs, contracted axis across, striped as they are stored."""
    figure, ax = canvas(236)
    gemms = (
        ("output = x · wᵀ", "in", ("x", "tokens", True), ("w", "out", True)),
        ("grad x = dy · w", "out", ("dy", "tokens", True), ("wᵀ", "in", False)),
        ("grad w = dyᵀ · x", "tokens", ("dyᵀ", "out", False), ("xᵀ", "in", False)),
    )
    for column, (title, across, *operands) in enumerate(gemms):
        x = 20 + 164 * column
        _say(ax, x, 14, title, weight="bold", fontsize=10)
        _say(ax, x, 29, f"contracted: {across}", color=SOFT)
        for row, (name, rows, lies) in enumerate(operands):
            _matrix(ax, x + 14, 52 + 80 * row, (name, rows, across), lies=lies)
    _stripes(ax, 20, 212, 20, 14, across=True, colour=BLUE)
    _say(ax, 46, 219, "stored along the contracted axis: goes in as it lies", fontsize=8.5)
    _stripes(ax, 294, 212, 20, 14, across=False, colour=AMBER)
    _say(ax, 320, 219, "stored across it: has to be turned first", fontsize=8.5)
    return figure


def _matrix(ax: Axes, x: float, y: float, names: tuple[str, str, str], *, lies: bool) -> None:
    colour = BLUE if lies else AMBER
    name, rows, across = names
    _stripes(ax, x, y, 88, 46, across=lies, colour=colour)
    _say(ax, x - 8, y + 23, rows, rotation=90, ha="center", color=SOFT, fontsize=8.5)
    _say(ax, x + 44, y + 55, across, ha="center", color=SOFT, fontsize=8.5)
    _say(ax, x + 96, y + 23, name, weight="bold", color=colour, fontsize=11)


def _stripes(
    ax: Axes, x: float, y: float, w: float, h: float, *, across: bool, colour: str
) -> None:
    _box(ax, x, y, w, h, edgecolor=colour, lw=1.3)
    length = h if across else w
    count = round(length / 5.6)
    for at in (place * length / count for place in range(1, count)):
        line = ((x, x + w), (y + at, y + at)) if across else ((x + at, x + at), (y, y + h))
        ax.plot(*line, color=colour, lw=0.8)


def scales() -> Figure:
    """Draw the contracted axis as a bar, cut where scales are multiplied into the sum."""
    figure, ax = canvas(226)
    kinds = (
        ("tensor", "s · t", 512, "in the epilogue: one number for all outputs"),
        ("rows", "s[m] · t[n]", 512, "in the epilogue: a number for each output"),
        ("1x128, 128x128", "s[m, k] · t[n, k]", PROMOTION,
         "in the main loop: after every 128 products, on the way to a float32 sum"),
        ("MX", "s[m, k] · t[n, k]", BLOCK,
         "in the tensor core of a Blackwell GPU: with every 32 products; powers of two"),
    )  # fmt: skip
    _say(ax, 118, 12, "K = 0", color=SOFT, fontsize=8.5)
    _say(ax, 374, 12, "512", color=SOFT, fontsize=8.5, ha="center")
    for row, (name, formula, every, where) in enumerate(kinds):
        y = 26 + 50 * row
        _say(ax, 14, y + 9, name, weight="bold")
        _box(ax, 118, y, 256, 18)
        colour = AMBER if every == BLOCK else BLUE
        for end in range(every, 513, every):
            ax.plot([118 + end / 2] * 2, [y - 3, y + 21], color=colour, lw=2.2)
        _say(ax, 384, y + 9, f"{TIMES} {formula}")
        _say(ax, 118, y + 31, where, color=SOFT, fontsize=8.5)
    return figure


def adding() -> Figure:
    """Draw a sum and four products on the grid that the sum sets, with what is cut off."""
    figure, ax = canvas(210)
    so_far = BLOCK * math.prod(BEFORE)
    top = math.floor(math.log2(so_far))
    unit, lowest = top - FRACTION_BITS, top - FRACTION_BITS - 5
    left, wide = 116, 14.0
    edge = left + wide * (top - unit + 1)
    _box(ax, edge, 30, wide * (unit - lowest), 120, edgecolor=RAISED)
    heads = ((left + wide / 2, _power(top)), (edge - wide / 2, _power(unit)), (410, "exact"))
    for x, head in heads:
        _say(ax, x, 18, head, color=SOFT, ha="center")
    _say(ax, edge + wide * 2.5, 18, "cut off", color=AMBER, ha="center", weight="bold")
    _say(ax, 494, 18, "counted", ha="right", weight="bold")
    values = [so_far, *(math.prod(pair) for pair in ADDED)]
    names = ["sum so far", *(f"{_number(a)} {TIMES} {_number(b)}" for a, b in ADDED)]
    kept = [math.trunc(value / 2.0**unit) * 2.0**unit for value in values]
    for row, (name, value, counted) in enumerate(zip(names, values, kept, strict=True)):
        y = 42 + 22 * row
        _say(ax, 14, y, name)
        _digits(ax, (left, wide, y), value, range(top, lowest - 1, -1), unit)
        _say(ax, 410, y, _number(value), color=SOFT, ha="center", fontsize=8.5)
        _say(ax, 494, y, _number(counted), ha="right", weight="bold")
    ax.plot([left, 494], [152, 152], color=EDGE, lw=1)
    _say(ax, 14, 166, "new sum", weight="bold")
    _digits(ax, (left, wide, 166), sum(kept), range(top, unit - 1, -1), unit)
    _say(ax, 410, 166, _number(sum(values)), ha="center", color=SOFT, fontsize=8.5)
    _say(ax, 494, 166, _number(sum(kept)), ha="right", weight="bold", color=BLUE)
    ax.add_patch(
        FancyArrowPatch((edge, 186), (edge, 156), arrowstyle="-|>", mutation_scale=8, color=AMBER)
    )
    says = f"{FRACTION_BITS} digits after the first of the largest"
    _say(ax, edge, 196, says, ha="center", color=AMBER, fontsize=8.5)
    return figure


def _digits(
    ax: Axes, grid: tuple[float, float, float], value: float, places: Sequence[int], unit: int
) -> None:
    left, wide, y = grid
    shown = digits(value, places[0], places[-1])
    first = shown.find("1")
    for column, (place, digit) in list(enumerate(zip(places, shown, strict=True)))[first:]:
        look = {"color": INK if place >= unit else AMBER}
        if place < unit and digit == "1":
            look["weight"] = "bold"
        _say(ax, left + wide * (column + 0.5), y, digit, ha="center", family="monospace", **look)
    if value < 0:
        _say(ax, left + wide * (first - 0.5), y, MINUS, ha="center", family="monospace")
