"""A run log of months: 1,680 sites x 1,000,000 steps, extrapolated from 20 M and 60 M rows.

A page is measured with what it does at a million steps: series judged by compiled code, which a
first call outside of the measured time has loaded, and without the association, of which a page
does not ask where so many casts clamped; that is measured alone.

The writer writes both, merges included. Every hundredth step has a closer look, one cast in a
thousand clamps (`CLAMPS`), and has a price. Seconds are those of the processor, of all threads
together: other work on the machine does not disturb them. Each question is asked in a process of
its own, so that peaks of memory are its own too.
"""

import json
import multiprocessing
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from bench import runlog
from bench.timing import verdict
from unclamp.analysis import (
    associate,
    divergences,
    find_spikes,
    long_series,
    response,
    robust,
    run_curve,
)
from unclamp.analysis.compaction import compact_run
from unclamp.analysis.prices import cast_prices
from unclamp.report import evidence
from unclamp.report.html import write_page
from unclamp.report.view import build_view
from unclamp.runlog import Columns, Keep, RunLog

STEPS = (12_000, 36_000)
MONTHS = 1_000_000
CLAMPS = 0.001
LOOK_EVERY = 100
KEEP = Keep(recent=2_000, every=16, near=100)
EXPONENTS = [(e, 1 << (20 - abs(e + 3))) for e in range(-20, 10)]
FIGURES = "months.json"


def casts(step: int, generator: Generator) -> Columns:
    """Return a step's rows, as `bench.runlog.casts` and with prices and looks."""
    sites = runlog.SITES
    clamped = generator.random(sites) < CLAMPS
    rows: dict[str, Any] = dict(runlog.casts(step, generator))
    rows["clamped"] = clamped
    rows["saturated"] = clamped * generator.integers(1, 100, sites)
    rows["saturated_error"] = clamped * generator.random(sites) * 1e-3
    rows["price_clamp"] = clamped * generator.random(sites) * 1e-4
    if step % LOOK_EVERY == 0:
        rows["sqnr_db"] = 31 + generator.random(sites)
        rows["sqnr_row_median_db"] = np.round(4 * (31 + generator.random(sites))) / 4
        rows["range_used"] = generator.random(sites)
        rows["headroom_bits"] = generator.random(sites)
        rows["scale_age"] = np.full(sites, 3, dtype=np.int32)
        rows["exponents"] = [EXPONENTS] * sites
    return rows


def write(path: Path, steps: int) -> dict[str, float]:
    """Write a log; return what that took of the processor, the disk and memory."""
    began, written = _cpu_s(), _written_bytes()
    runlog.write(path, steps, make=casts)
    size, rows = _size(path), steps * runlog.SITES
    return {
        "writer, us a row": (_cpu_s() - began) / rows * 1e6,
        "bytes a row": size / rows,
        "of these summaries": _size(path / "summaries") / rows,
        "written over kept": (_written_bytes() - written) / size,
        "writer, peak MiB": _peak_mib(),
    }


def spikes(path: Path) -> None:
    """Do what `unclamp spikes` does of a million steps."""
    _as_of_months()
    with RunLog.open(path) as log:
        curve = run_curve(log)
        for name, values in curve.series.items():
            find_spikes(values, steps=curve.steps, groups=curve.groups, series=name)


def windows(path: Path) -> None:
    """Read what a page tells of sites."""
    with RunLog.open(path) as log:
        log.windows()


def prices(path: Path) -> None:
    """Read what clamped casts cost."""
    with RunLog.open(path) as log:
        cast_prices(log)


def summaries(path: Path) -> None:
    """Add up summaries of all windows."""
    with RunLog.open(path) as log:
        log.sql("SELECT site, sum(saturated) FROM summaries GROUP BY site")


def one_site(path: Path) -> None:
    """Read a site's casts."""
    with RunLog.open(path) as log:
        log.casts(site=runlog.SITES // 2)


def page(path: Path) -> None:
    """Write the page, as one of a million steps."""
    _as_of_months()
    with tempfile.TemporaryDirectory() as folder:
        write_page(build_view(path), Path(folder) / "report.html")


def association(path: Path) -> None:
    """Do what `unclamp associate` does."""
    with RunLog.open(path) as log:
        associate(log)


def _as_of_months() -> None:
    """Have short series judged as long ones are; a first call loads what numba has kept."""
    robust.LONG = divergences.LONG = response.LONG = 0
    evidence.MOST_CLAMPED = 0


def opened(path: Path) -> None:
    """Open the log and say what it is."""
    with RunLog.open(path) as log:
        repr(log)


def compacted(path: Path) -> dict[str, float]:
    """Thin a copy that shares the files."""
    copy = path.with_name(f"{path.name}-thinned")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    try:
        found = compact_run(copy, KEEP)
    finally:
        shutil.rmtree(copy)
    return {"left of the bytes": found.bytes_after / found.bytes_before,
            "left of the rows": found.kept / found.rows}  # fmt: skip


READS: dict[str, Callable[[Path], Any]] = {
    "open": opened,
    "sites in 300 windows": windows,
    "prices": prices,
    "unclamp spikes": spikes,
    "summaries, all": summaries,
    "one site's casts": one_site,
    "a page": page,
    "unclamp associate": association,
    "compact --keep": compacted,
}


def measure_months(folder: Path | None = None) -> dict[str, dict[str, float]]:
    """Write two logs, or read those in `folder`, and print what 1,680 M rows would take."""
    place = Path(tempfile.mkdtemp(prefix="unclamp-bench-")) if folder is None else folder
    results = {}
    try:
        for steps in STEPS:
            results[steps] = _of_log(place / str(steps), steps)
            print(f"\n{steps * runlog.SITES / 1e6:.0f} M rows")
            for name, value in results[steps].items():
                print(f"  {name:32} {value:10.3f}", flush=True)
    finally:
        if folder is None:
            shutil.rmtree(place)
    small, large = (results[steps] for steps in STEPS)
    slope = {name: (large[name] - small[name]) / (STEPS[1] - STEPS[0]) for name in large}
    print(f"\nat {MONTHS * runlog.SITES / 1e6:,.0f} M rows")
    for name in READS:
        if name == "sites in 300 windows":
            continue  # a longer log has coarser summaries: not a straight line, in a page neither
        rise = slope[f"{name}, s"]
        if name == "a page":
            rise -= slope["sites in 300 windows, s"]
        seconds = large[f"{name}, s"] + rise * (MONTHS - STEPS[1])
        end = f"  target 3 s: {verdict(seconds, 3.0)}" if name == "a page" else ""
        print(f"  {name + ', s':32} {seconds:10.3f}{end}")
    size = large["bytes a row"]
    print(f"  bytes a row {size:.2f}  target 8.6: {verdict(size, 8.6)}")
    return {str(steps): found for steps, found in results.items()}


def _of_log(path: Path, steps: int) -> dict[str, float]:
    figures = path / FIGURES
    if not figures.exists():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        written, _, _ = _alone(write, path / "run", steps)
        figures.write_text(json.dumps(written), encoding="utf-8")
    found: dict[str, float] = json.loads(figures.read_text(encoding="utf-8"))
    for name, read in READS.items():
        told, seconds, peak = _alone(read, path / "run")
        found |= {f"{name}, s": seconds, f"{name}, peak MiB": peak} | (told or {})
    return found


def _alone(work: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Return what a function returns in a new process, its seconds, and the process's peak."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (work, *args))


def _measured(work: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    few = np.arange(1.0, 99.0)
    long_series.judge_robust(few, robust.THRESHOLD)
    long_series.diverge(few)
    began = _cpu_s()
    found = work(*args)
    return found, _cpu_s() - began, _peak_mib()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _written_bytes() -> int:
    """Return how many bytes this process has written; 0 where only Linux tells."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
