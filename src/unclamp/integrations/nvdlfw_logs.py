"""nvdlfw-inspect's log files as a run log: what Transformer Engine's debug tool wrote.

Its folders are those of Transformer Engine (`nvdlfw_inspect_statistics_logs/`) and of BioNeMo
(`rank_0/nvdlfw_inspect_statistics_logs/`). A line has four decimals of a number, whatever its size:
what that destroys is counted and said. No torch is used here.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from unclamp.analysis.curves import Curve, read_curve
from unclamp.errors import RunLogError
from unclamp.integrations.nvdlfw_rows import Formats, Rows, free_ids
from unclamp.runlog import Cadence, Columns, Every, Header, RunLogWriter
from unclamp.version import __version__
from unclamp.written import counted, listed

FOLDER = "nvdlfw_inspect_statistics_logs"
DECIMALS = 4
"""`FileLogger.log_scalar` writes `{:.4f}`."""
_FILE = re.compile(r".*_globalrank-(?P<rank>\d+)\.log")
_RANK_FOLDER = re.compile(r"rank[_-]?(?P<rank>\d+)")
_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,(?P<ms>\d+))? - \w+ - "
    r"(?P<name>\S.*?)\s+iteration=(?P<iteration>-?\d+)\s+value=(?P<value>\S+)"
)
NOT_COUNTED = (
    "Imported from nvdlfw-inspect, which tells the amax and the scale of a tensor and no number of "
    "elements: whether a cast clamped is known where its four decimals leave no doubt, and how "
    "many elements were clamped is not. Its other statistics are scalars of the steps."
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import found.

    Attributes:
        run: Folder of the run.
        ranks: Ranks that wrote.
        iterations: Iterations with statistics.
        casts: Rows of casts.
        sites: Sites.
        unknown: Casts of which nobody knows whether they clamped.
        zeros: Values that four decimals made 0, by kind: each is unknown now.
        without_loss: Iterations that the curve has no loss of; None without a curve.
        notes: Sentences for people.
    """

    run: str
    ranks: list[int]
    iterations: int
    casts: int
    sites: int
    unknown: int
    zeros: dict[str, int]
    without_loss: int | None
    notes: list[str]


@dataclass
class _Rank:
    """What one rank wrote: numbers by iteration and name, and seconds of each iteration."""

    values: dict[int, dict[str, float]]
    times: dict[int, float]
    passed_over: int = 0


@dataclass(frozen=True)
class _Row:
    """What an iteration of a rank comes to: rows of casts, and numbers that no column holds."""

    iteration: int
    casts: Columns
    others: dict[str, float]


def import_nvdlfw(
    folder: Path, out: Path, *, curve: Path | None = None, formats: Formats = "hybrid"
) -> Imported:
    """Write a run log of a folder of nvdlfw-inspect's logs.

    Args:
        folder: Of the logs, or any folder above them; one log file.
        out: Folder of the run, new or empty.
        curve: What holds the losses, as `unclamp spikes` reads it.
        formats: "hybrid" for E5M2 gradients; no statistic tells.

    Raises:
        RunLogError: There are no such logs, nothing is in them, or `out` is not free.
        AnalysisError: The curve cannot be read.
    """
    ranks = {rank: _read(files) for rank, files in find_logs(folder).items()}
    if not any(rank.values for rank in ranks.values()):
        raise RunLogError(
            f"{folder} has logs of nvdlfw-inspect, but no line of a statistic: nothing was logged, "
            "or TE_DEBUG was off; LogTensorStats with cur_amax and LogFp8TensorStats with "
            "scale_inv_max are what an import needs"
        )
    losses = None if curve is None else read_curve(curve)
    return _write(ranks, out, losses, formats=formats, name=folder.resolve().name)


def find_logs(folder: Path) -> dict[int, list[Path]]:
    """Return the statistics' logs under a folder by rank, each rank's in order of their names.

    Raises:
        RunLogError: There are none.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*_globalrank-*.log"))
    inside = [path for path in files if path.parent.name == FOLDER]
    found: dict[int, list[Path]] = {}
    for path in inside or files:
        match = _FILE.fullmatch(path.name)
        if match is not None and path.parent.name != "nvdlfw_inspect_logs":
            found.setdefault(_rank_of(path, int(match["rank"])), []).append(path)
    if not found:
        raise RunLogError(
            f"expected logs of nvdlfw-inspect under {folder}, such as "
            f"{FOLDER}/nvdlfw_inspect_globalrank-0.log; found none"
        )
    return dict(sorted(found.items()))


def _rank_of(path: Path, named: int) -> int:
    """Return a file's rank; where all processes were rank 0 to it, that of its folder."""
    for parent in list(path.parents)[:2]:
        folder = _RANK_FOLDER.fullmatch(parent.name)
        if folder is not None:
            return int(folder["rank"])
    return named


def _read(files: Sequence[Path]) -> _Rank:
    """Return what a rank wrote; of a number that was written again, the last counts."""
    found = _Rank(values={}, times={})
    for path in files:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                match = _LINE.fullmatch(line.strip())
                if match is None:
                    found.passed_over += bool(line.strip())
                    continue
                iteration = int(match["iteration"])
                values = found.values.setdefault(iteration, {})
                values[match["name"]] = float(match["value"])
                found.times[iteration] = _seconds(match["time"], match["ms"])
    return found


def _seconds(time: str, ms: str | None) -> float:
    return datetime.fromisoformat(time).timestamp() + float(f"0.{ms or 0}")


def _write(
    ranks: Mapping[int, _Rank], out: Path, curve: Curve | None, *, formats: Formats, name: str
) -> Imported:
    world_size, lead = max(ranks) + 1, min(ranks)
    begun = min(min(rank.times.values()) for rank in ranks.values() if rank.times)
    makers = {
        rank: Rows(
            free_ids(rank, world_size),
            formats=formats,
            decimals=DECIMALS,
            replicated=rank != lead and _is_same(own, ranks[lead]),
        )
        for rank, own in ranks.items()
    }
    tables = {
        rank: [_Row(i, *makers[rank].casts(i, own.values[i])) for i in sorted(own.values)]
        for rank, own in ranks.items()
    }
    found = _found(ranks, makers, tables, curve)
    header = Header(
        unclamp_version=__version__,
        created=datetime.fromtimestamp(begun, UTC).isoformat(timespec="seconds"),
        world_size=world_size,
        run_id=f"nvdlfw:{name}:{begun:.3f}",
        metadata={"framework": "nvdlfw-inspect", "folder": name, "decimals": DECIMALS},
        cadence=_cadence(ranks),
        counts="casts",
        notes=[NOT_COUNTED, *found.notes],
    )
    path = out
    for rank in sorted({0, *ranks}):  # rank 0 makes the run, whether it has logged or not
        own, rows = ranks.get(rank, _Rank(values={}, times={})), tables.get(rank, [])
        with RunLogWriter(path, header=header, rank=rank) as writer:
            path = writer.path
            for row in rows:
                writer.add("casts", row.casts)
            if rank in makers:
                writer.add("sites", makers[rank].new_sites())
                writer.add("events", makers[rank].events())
            writer.add("steps", _steps(own, rows, begun, curve if rank == 0 else None))
    return replace(found, run=str(path))


def _found(
    ranks: Mapping[int, _Rank],
    makers: Mapping[int, Rows],
    tables: Mapping[int, list[_Row]],
    curve: Curve | None,
) -> Imported:
    """Return what an import found, with sentences of what it lacks."""
    iterations = sorted({i for rank in ranks.values() for i in rank.values})
    clamped = [c for rows in tables.values() for row in rows for c in row.casts.get("clamped", ())]
    unknown = sum(each is None for each in clamped)
    zeros = sum((Counter(maker.zeros) for maker in makers.values()), Counter())
    without = None if curve is None else len(set(iterations) - set(_lossy(curve)))
    notes = [*_notes(ranks), *_zero_notes(zeros)]
    if without:
        notes.append(
            f"{without:,} of {counted(len(iterations), 'iteration')} "
            f"{'has' if without == 1 else 'have'} no loss in the curve: check that it counts steps "
            "as nvdlfw-inspect does (from 0, one a debug_api.step())."
        )
    if unknown:
        notes.append(
            f"Whether {counted(unknown, 'cast')} clamped is not known: the amax or the scale is "
            "missing, or their four decimals leave it open."
        )
    return Imported(
        run="",
        ranks=list(ranks),
        iterations=len(iterations),
        casts=len(clamped),
        sites=len({name for maker in makers.values() for name in maker.names}),
        unknown=unknown,
        zeros=dict(zeros),
        without_loss=without,
        notes=notes,
    )


def _steps(own: _Rank, rows: Sequence[_Row], begun: float, curve: Curve | None) -> dict[str, list]:
    """Return the rows of steps: those of the curve and those with statistics."""
    others = {row.iteration: row.others for row in rows}
    losses = {} if curve is None else _series(curve, "loss")
    norms = {} if curve is None else _series(curve, "grad_norm")
    steps = sorted({*own.values, *losses, *norms})
    known = sorted(own.times)
    times = [own.times[i] - begun for i in known]
    at = np.interp(steps, known, times) if known else np.zeros(len(steps))
    return {
        "step": steps,
        "loss": [losses.get(step) for step in steps],
        "grad_norm": [norms.get(step) for step in steps],
        "time_s": at.tolist(),
        "scalars": [sorted(others.get(step, {}).items()) or None for step in steps],
    }


def _series(curve: Curve, name: str) -> dict[int, float | None]:
    return dict(zip(curve.steps.tolist(), curve.series.get(name, ()), strict=False))


def _lossy(curve: Curve) -> list[int]:
    return [step for step, loss in _series(curve, "loss").items() if loss is not None]


def _is_same(own: _Rank, lead: _Rank) -> bool:
    """Whether a rank wrote what another did: statistics that were reduced over ranks."""
    common = own.values.keys() & lead.values.keys()
    pairs = [
        (value, lead.values[i][name])
        for i in common
        for name, value in own.values[i].items()
        if name in lead.values[i]
    ]
    return bool(pairs) and all(a == b for a, b in pairs)


def _cadence(ranks: Mapping[int, _Rank]) -> Cadence:
    """Return how often statistics were written: the smallest distance of two iterations."""
    iterations = sorted({i for rank in ranks.values() for i in rank.values})
    every = int(min(np.diff(iterations), default=1))
    return Cadence(casts=Every(max(every, 1)), inspect=None)


def _notes(ranks: Mapping[int, _Rank]) -> list[str]:
    passed = sum(rank.passed_over for rank in ranks.values())
    if not passed:
        return []
    are = "line that is" if passed == 1 else "lines that are"
    return [f"{passed:,} {are} no statistic passed over."]


def _zero_notes(zeros: Mapping[str, int]) -> list[str]:
    """Say what four decimals have destroyed."""
    if not zeros:
        return []
    kinds = listed([f"{count:,} of {kind}" for kind, count in sorted(zeros.items())])
    return [
        f"Four decimals turned small numbers into 0.0000, and they are unknown now: {kinds}. "
        "unclamp.integrations.nvdlfw.UnclampLogger keeps all digits."
    ]
