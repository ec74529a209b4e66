"""The figures of docs/matmul.md: two of what `bench.matmul` measures, and the diagrams."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import matmul_diagrams as diagrams
from bench.matmul import DATA, LENGTHS, SIZES, by_length, by_outlier, percent
from bench.pictures import AMBER, BLUE, GREY, PURPLE, SOFT, panels, save

SERIES = {"fast": ("fast sums", AMBER, "s", "-"), "cast": ("casts", GREY, "", "--"),
          "promoted": ("promoted sums", BLUE, "o", "-")}  # fmt: skip
UP = {"cast": 5, "promoted": -5, "tensor": 3, "rows": -3}
"""Where two lines meet, their labels stand one above the other."""
POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw(folder: Path) -> list[Path]:
    """Draw every figure into a folder and return where they are."""
    return [save(figure, folder / f"{name}.svg", title) for name, title, figure in _figures()]


def _figures() -> Iterator[tuple[str, str, Figure]]:
    yield "bits", "Two FP8 codes and their exact product", diagrams.bits()
    yield "layouts", "Which axis each GEMM of a linear layer contracts", diagrams.layouts()
    yield "scales", "Where scales enter a GEMM, by granularity", diagrams.scales()
    yield "adding", "How a Hopper tensor core adds products", diagrams.adding()
    yield "error-by-k", "Error of sums and casts against the length of the sum", error_by_k()
    yield "outliers", "Error around an outlier, by granularity", outliers()


def error_by_k() -> Figure:
    figure, axes = panels(2.9, len(DATA), sharey=True)
    for ax, data in zip(axes, DATA, strict=True):
        found = [one for one in by_length() if one.data == data]
        for name, (label, colour, marker, dash) in SERIES.items():
            errors = [getattr(one, name) for one in found]
            ax.plot(LENGTHS, errors, dash, color=colour, marker=marker)
            _at_end(ax, LENGTHS[-1], errors[-1], percent(errors[-1]), colour, UP.get(name, 0))
            if ax is axes[1]:
                y = {"fast": 2.2e-3, "cast": 5.5e-2, "promoted": 5.2e-5}[name]
                ax.text(120, y, label, color=colour, weight="bold")
        ax.set_title(data, fontsize=10, loc="left", color=SOFT)
        ax.set(xscale="log", yscale="log", xlim=(105, 60000), ylim=(4e-5, 0.5))
        ax.set_xticks(LENGTHS, map(str, LENGTHS), fontsize=8)
        ax.set_xlabel("K, products in a sum")
        ax.minorticks_off()
    _percents(axes[0], (1e-4, 1e-3, 1e-2, 1e-1))
    axes[0].set_ylabel("relative error")
    figure.subplots_adjust(left=0.125, right=0.99, top=0.9, bottom=0.165, wspace=0.06)
    return figure


def outliers() -> Figure:
    figure, axes = panels(2.9, 2, sharey=True)
    looks = {"tensor": (AMBER, "s"), "rows": (PURPLE, "^"), "1x128 by 128x128": (BLUE, "o"),
             "MX": (GREY, "D")}  # fmt: skip
    titles = {"token": "an outlier token: the other tokens' outputs",
              "channel": "an outlier channel that no weight reads"}  # fmt: skip
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
        for name, (colour, marker) in looks.items():
            errors = [getattr(one, kind)[name] for one in by_outlier()]
            ax.plot(SIZES, errors, color=colour, marker=marker)
        ax.set_title(title, fontsize=10, loc="left", color=SOFT)
        ax.set(xscale="log", yscale="log", xlim=(0.7, 6e7), ylim=(0.025, 1.3))
        powers = range(len(SIZES))
        ax.set_xticks(SIZES, [f"10{str(p).translate(POWERS)}" for p in powers])
        ax.set_xlabel("size of the outlier, times the others")
        ax.minorticks_off()
    _percents(axes[0], (0.03, 0.1, 0.3, 1))
    axes[0].set_ylabel("relative error")
    last = by_outlier()[-1]
    _at_end(axes[0], SIZES[-1], last.token["tensor"], "tensor", AMBER)
    _at_end(axes[0], SIZES[-1], last.token["rows"], "rows,\n1x128,\nMX", PURPLE)
    for name, value in last.channel.items():
        _at_end(axes[1], SIZES[-1], value, name.partition(" ")[0], looks[name][0], UP.get(name, 0))
    figure.subplots_adjust(left=0.125, right=0.99, top=0.9, bottom=0.165, wspace=0.06)
    return figure


def _at_end(ax: Axes, x: float, y: float, text: str, colour: str, up: float = 0) -> None:
    place = {"xytext": (7, up), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, (x, y), color=colour, weight="bold", fontsize=9, **place)


def _percents(ax: Axes, ticks: tuple[float, ...]) -> None:
    ax.set_yticks(ticks, [percent(tick) for tick in ticks])
