"""Times on a GPU by its own events, floors beside them, and the table that comes last."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(kw_only=True)
class Report:
    """Figures by name, the lines of the table, and the errors of parts that failed.

    `is_dry` stands for tiny sizes on a CPU: it finds mistakes in the script, and no figures.
    """

    device: torch.device
    is_dry: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def size(self, full: int, dry: int = 64) -> int:
        """Return a size, or a tiny one."""
        return dry if self.is_dry else full

    def add(self, name: str, value: float, unit: str, *, floor: float | None = None,
            at_least: float | None = None, at_most: float | None = None) -> None:  # fmt: skip
        """Keep a figure, with the floor beside it and the target that it has."""
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        target = at_least if at_least is not None else at_most
        self.figures[name] = {"value": value, "unit": unit, "floor": floor, "target": target}
        sign = ">=" if at_least is not None else "<="
        aim = (
            ""
            if target is None or self.is_dry
            else f"  {sign} {target:g}: {'met' if met else 'MISSED'}"
        )
        beside = "" if floor is None else f" (floor {floor:.4g})"
        self.lines.append(f"{name[:44]:44} {value:9.4g} {unit}{beside}{aim}")
        print(self.lines[-1], flush=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part of the bench; where it fails, say so and go on."""
        began = time.perf_counter()
        print(f"\n-- {name}", flush=True)
        try:
            yield
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            self.lines.append(f"{name[:44]:44}    FAILED {self.errors[name][:60]}")
            print(self.lines[-1], flush=True)
        print(f"   {time.perf_counter() - began:.0f} s", flush=True)


def times_ms(
    runs: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int = 25, inner: int = 1
) -> list[float]:
    """Return the median time of each candidate, taken in turn, so that drift hits all alike."""
    for run in runs:
        for _ in range(2):
            run()
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds if device.type == "cuda" else 1):
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
