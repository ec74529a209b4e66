"""Times on a GPU by its own events, floors beside them, and the table that comes last."""

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TOTAL_S = 340.0
"""What all parts may take together."""


@dataclass(frozen=True)
class Part:
    """A part of the bench: the seconds that it may take, and the packages that it needs."""

    run: Callable[[], Any]
    budget_s: float
    needs: tuple[str, ...] = ()

    @property
    def lacks(self) -> list[str]:
        """The packages that are not here."""
        return [name for name in self.needs if not _is_here(name)]


def _is_here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


@dataclass(kw_only=True)
class Report:
    """Figures by name, the rows of the table, the errors of parts that failed, what is left out.

    `is_dry` stands for tiny sizes on a CPU: it finds mistakes in the script, and no figures.
    """

    device: torch.device
    is_dry: bool = False
    total_s: float = TOTAL_S
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    until: float = float("inf")

    @property
    def left_s(self) -> float:
        """Seconds left to the part that runs."""
        return min(self.until, self.began + self.total_s) - time.perf_counter()

    def has_time(self, name: str, needed_s: float) -> bool:
        """Whether there is time for something; where there is not, it is said in the table."""
        if self.left_s >= needed_s:
            return True
        self.leave_out(name, f"{max(self.left_s, 0):.0f} s left, {needed_s:.0f} s wanted")
        return False

    def leave_out(self, name: str, why: str) -> None:
        """Say that something was not measured, and why."""
        self.left_out[name] = why
        print(f"{name}: left out, {why}", flush=True)

    def table(self, machine: str) -> str:
        """Return all that was found in Markdown, to be copied as it is."""
        lines = [machine, "", "| what | measured | floor | target |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        lines += [f"| {name} | FAILED | | {why} |" for name, why in self.errors.items()]
        if self.left_out:
            named = [f"{name} ({why})" for name, why in self.left_out.items()]
            lines += ["", "Left out: " + "; ".join(named) + "."]
        return "\n".join(lines)

    def size(self, full: int, dry: int = 64) -> int:
        """Return a size, or a tiny one."""
        return dry if self.is_dry else full

    def add(self, name: str, value: float, unit: str, *, floor: float | None = None,
            at_least: float | None = None, at_most: float | None = None) -> None:  # fmt: skip
        """Keep a figure, with the floor beside it and the target that it has."""
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        target = at_least if at_least is not None else at_most
        self.figures[name] = {"value": value, "unit": unit, "floor": floor, "target": target}
        sign = "at least" if at_least is not None else "at most"
        known = target is not None and not self.is_dry
        aim = f"{sign} {target:g}: {'met' if met else '**missed**'}" if known else ""
        beside = "" if floor is None else f"{floor:.4g} {unit}"
        row = (name, f"{value:.4g} {unit}".strip(), beside, aim)
        self.rows.append(row)
        print(f"{name[:44]:44} {row[1]:>16} {beside and f'(floor {beside})'} {aim}", flush=True)

    @contextlib.contextmanager
    def part(self, name: str, budget_s: float = float("inf")) -> Iterator[None]:
        """Run a part of the bench in its time; where it fails, say so and go on."""
        began = time.perf_counter()
        self.until = began + budget_s
        print(f"\n-- {name}", flush=True)
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())[:200].replace("|", "/")
            self.errors[name] = f"{type(error).__name__}: {said}"
            print(f"{name[:44]:44}    FAILED {self.errors[name]}", flush=True)
        print(f"   {time.perf_counter() - began:.0f} s", flush=True)


def times_ms(
    runs: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int = 25, inner: int = 1,
    limit_s: float = 20,
) -> list[float]:  # fmt: skip
    """Return the median time of each candidate, taken in turn, so that drift hits all alike.

    After `limit_s` there are no more rounds than three.
    """
    for run in runs:
        for _ in range(2):
            run()
    found: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for done in range(rounds if device.type == "cuda" else 1):
        if done >= 3 and time.perf_counter() - began > limit_s:
            break
        for run, times in zip(runs, found, strict=True):
            times.append(_once(run, device, inner) / inner)
    return [statistics.median(times) for times in found]


def _once(run: Callable[[], Any], device: torch.device, inner: int) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(inner):
            run()
        return (time.perf_counter() - began) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(inner):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def rotating(make: Callable[[], Callable[[], Any]], copies: int = 3) -> Callable[[], None]:
    """Return a run that takes another set of inputs each time, so that no cache holds them."""
    runs = [make() for _ in range(copies)]
    turn = iter(range(1 << 62))

    def run() -> None:
        runs[next(turn) % copies]()

    return run


def graphed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of a run; the run itself where there is no GPU."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()
        _ = run  # its inputs live as long as the graph that reads them

    return replay
