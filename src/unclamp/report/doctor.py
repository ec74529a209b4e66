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
            *_section("for each scaling and granularity", _by_scaling(device["by_scaling"])),
            *_section("experiments of `unclamp traps`", _traps(device["traps"])),
        ]
    parts.append(Text("\nwhat follows", style="bold"))
    parts += [_pairs_table([("·", line)]) for line in diagnosis["warnings"]]
    parts += _section("to paste into a bug report", Text(diagnosis["paragraph"]))
    return Group(*parts)


def _by_scaling(answers: list[dict[str, Any]]) -> RenderableType:
    """Make a line of each cast and GEMM; granularities and scalings that share it share it here."""
    grains: dict[tuple[str, ...], list[str]] = {}
    for grain in dict.fromkeys(answer["granularity"] for answer in answers):
        lines = _lines([answer for answer in answers if answer["granularity"] == grain])
        grains.setdefault(tuple(lines), []).append(grain)
    parts: list[RenderableType] = []
    for lines, names in grains.items():
        parts += [Text("; ".join(names)), _pairs_table([(" ", line) for line in lines])]
    return Group(*parts)


def _lines(answers: list[dict[str, Any]]) -> list[str]:
    casts: dict[str, list[str]] = {}
    for answer in answers:
        casts.setdefault(answer["cast"], []).append(answer["scaling"])
    gemms: dict[str, list[str]] = {}
    for name in ("output", "grad_input", "grad_weight"):
        gemms.setdefault(answers[0][name], []).append(name)
    return [
        *(f"casts ({', '.join(kinds)}): {cast}" for cast, kinds in casts.items()),
        *(f"{', '.join(names)}: {gemm}" for gemm, names in gemms.items()),
    ]


def _traps(answers: list[dict[str, Any]]) -> RenderableType:
    """Count verdicts, and name what is not as documented."""
    verdicts = [answer["verdict"] for answer in answers]
    rows = {each: f"{verdicts.count(each)} of {len(verdicts)}" for each in dict.fromkeys(verdicts)}
    for answer in answers:
        if answer["is_bad"] or answer["verdict"] == "skipped":
            rows[answer["name"]] = f"{answer['verdict']}: {answer['detail']}"
    return _pairs(rows)


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
