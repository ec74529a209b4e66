"""The doctor's answers as short tables and sentences for a terminal."""

from itertools import groupby
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

CAST_COLUMNS = {
    "format": "format",
    "source": "from",
    "finite_overflow": "finite overflow",
    "inf": "Inf",
    "nan": "NaN",
    "ties": "ties",
    "nonfinite": "non-finite",
    "clamped_differ": "off",
}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
CAST_NOTE = (
    "ties: values halfway between two codes. non-finite: how many of the 65,280 finite bf16 values "
    "become Inf or NaN. off: how many get another code than the scalar reference gives, although "
    "clamped first; must be 0."
)
PAIR = " x "
BOTH_E5M2 = "e5m2 x e5m2"
LISTED = 8
"""More format pairs than these are counted and not named; JSON names all."""


def diagnosis_view(diagnosis: dict[str, Any]) -> RenderableType:
    """Return what `Diagnosis.to_dict` says as something to print."""
    parts: list[RenderableType] = [_build(diagnosis["build"])]
    for device in diagnosis["devices"]:
        parts += [
            Text.assemble("\n", (device["device"], "bold"), f"  {device['name']}"),
            *_section("plain casts to FP8", _casts(device["casts"])),
            Text(CAST_NOTE, style="dim"),
            *_section(device["matmul_api"], _matmul(device["matmul"])),
            *_section("what unclamp runs here", _pairs(device["kernels"])),
        ]
    parts.append(Text("\nwhat follows", style="bold"))
    parts += [_pairs_table([("·", line)]) for line in diagnosis["warnings"]]
    return Group(*parts)


def _section(title: str, body: RenderableType) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), body]


def _build(build: dict[str, str]) -> RenderableType:
    words = [Text(f"{key.replace('_', ' ')} {value}") for key, value in build.items()]
    return Columns(words, padding=(0, 3))


def _casts(casts: list[dict[str, Any]]) -> RenderableType:
    """Make one row of a format whose sources agree, else one of each."""
    table = Table(
        *(f"[dim]{title}[/]" for title in CAST_COLUMNS.values()), box=None, pad_edge=False
    )
    rows = [{key: _cell(cast[key]) for key in CAST_COLUMNS} for cast in casts]
    for _, same in groupby(rows, key=lambda row: {**row, "source": ""}):
        together = list(same)
        source = ", ".join(SHORT.get(row["source"], row["source"]) for row in together)
        table.add_row(*{**together[0], "source": source}.values())
    return table


def _cell(value: str | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def _matmul(answers: list[dict[str, Any]]) -> RenderableType:
    """Make a row of each case; the format pairs share one for each outcome."""
    cases = {
        a["case"]: _outcome(a) for a in answers if PAIR not in a["case"] or a["case"] == BOTH_E5M2
    }
    pairs = [a for a in answers if PAIR in a["case"]]
    for outcome in dict.fromkeys(a["outcome"] for a in pairs):
        names = [a["case"] for a in pairs if a["outcome"] == outcome]
        words = ", ".join(names) if len(names) <= LISTED else f"{len(names)} of {len(pairs)}"
        cases[f"format pairs: {outcome}"] = words
    return _pairs(cases)


def _outcome(answer: dict[str, Any]) -> str:
    return answer["outcome"] + (f": {answer['detail']}" if answer["detail"] else "")


def _pairs(rows: dict[str, str]) -> RenderableType:
    return _pairs_table([(f"{key}  ", value) for key, value in rows.items()])


def _pairs_table(rows: list[tuple[str, str]]) -> RenderableType:
    """Return lines whose second part wraps under itself."""
    grid = Table.grid(padding=(0, 1))
    for first, second in rows:
        grid.add_row(Text(first, no_wrap=True), Text(second))
    return grid
