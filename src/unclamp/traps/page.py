"""The part of docs/traps.md that is made of the traps: `python -m unclamp.traps.page FILE`.

What stands above the mark in the file is written by hand and kept.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from unclamp.files import write_atomically
from unclamp.traps.catalogue import TRAPS
from unclamp.traps.trap import Documented, Trap, fact_text

MARK = "<!-- From here on written by: python -m unclamp.traps.page docs/traps.md -->\n"
THEMES = {
    "casts": "Casts",
    "scales": "Scales",
    "gemms": "Matrix products",
    "sums": "Sums",
    "ranks": "Ranks",
    "training": "Training",
    "compiled": "torch.compile",
}


def with_traps(text: str) -> str:
    """Return a page's text with what stands below the mark made anew.

    Raises:
        ValueError: The page has no mark, or more than one.
    """
    if text.count(MARK) != 1:
        raise ValueError(f"expected one line {MARK.strip()!r} in the page, got {text.count(MARK)}")
    return text.partition(MARK)[0] + MARK + "\n" + "\n".join(_sections())


def _sections() -> Iterator[str]:
    for theme, title in THEMES.items():
        yield f"## {title}\n"
        for trap in TRAPS:
            if trap.theme == theme:
                yield from _section(trap)


def _section(trap: Trap) -> Iterator[str]:
    yield f"### {trap.name}\n"
    yield f"*Believed:* {trap.belief}\n"
    yield f"*In truth:* {trap.truth}\n"
    # Not "python": the examples of these pages are run as they stand, and these by their own test.
    yield f"```py\n{trap.code}```\n"
    yield from _table(trap.documented)
    yield f"*What it costs in training:* {trap.cost}\n"
    yield f"*What unclamp does about it:* {trap.remedy} ({_link(trap.see)})\n"


def _table(documented: tuple[Documented, ...]) -> Iterator[str]:
    names = list(dict.fromkeys(name for each in documented for name in each.expected))
    heads = [_head(each) for each in documented]
    rows = [[f"`{name}`", *(_cell(each, name) for each in documented)] for name in names]
    yield (
        "\n".join(
            f"| {' | '.join(row)} |"
            for row in [["documented", *heads], ["---"] * (len(heads) + 1), *rows]
        )
        + "\n"
    )


def _head(documented: Documented) -> str:
    source = f" ({documented.source})" if documented.source else ""
    return f"{documented.device}, {documented.versions}{source}"


def _cell(documented: Documented, name: str) -> str:
    return fact_text(documented.expected[name]) if name in documented.expected else "-"


def _link(see: str) -> str:
    page = see.removeprefix("docs/")
    return f"[{page}]({page})" if page != see else f"`{see}`"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_atomically(path, with_traps(path.read_text(encoding="utf-8")).encode())
