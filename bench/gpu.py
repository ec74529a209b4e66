"""Everything that is claimed of a GPU, measured or checked in one run of a few minutes.

    python bench/gpu.py              all of it; a table last, in Markdown, to be copied as it is;
                                     JSON in bench/gpu_results.json
    python bench/gpu.py --check      only whether casts give the CPU's bits; exit code 1 if not
    python bench/gpu.py --dry-run    every part at tiny sizes on a CPU, to find mistakes in the
                                     script: UNCLAMP_DEVICE_PATH=interpreter TRITON_INTERPRET=1

Without a GPU it says so and exits with 2. A part that fails is reported and the rest goes on.
It ends within six minutes: each part has its time, and what there was none for is said. It wants
torch, triton, numpy and numba; parts that want more are left out where that is not there.
Beside a figure stands its floor: bytes over the bandwidth of a copy, or operations over the rate
of a large GEMM, both measured here.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Not the script's folder, where `coverage` would be this bench's and not what numba looks for.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import unclamp
from bench.gpu_timing import TOTAL_S, Part, Report, graphed, rotating, times_ms
from unclamp import E4M3FN
from unclamp.names import ROLES
from unclamp.nn import Ledger, Site, find_ledgers
from unclamp.numerics import Stat, matmul

ELEMENTS = 1 << 26
SITES = 1680
STUDY_STEPS = 300


def ceilings(report: Report) -> tuple[float, float]:
    """Measure bytes a second of a copy, and operations a second of a GEMM in FP8."""
    size = report.size(8192)
    source = torch.randint(0, 255, (report.size(1 << 28, 1 << 10),), dtype=torch.uint8)
    source = source.to(report.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    first, second = (unclamp.quantize(t, E4M3FN) for t in (a, b))
    left, right = (q.along(1) for q in (first, second))
    copy, half, eight = times_ms(
        [
            lambda: target.copy_(source),
            lambda: a @ b.t(),
            lambda: matmul(left, right, accumulate="hopper_fast", out_dtype=torch.bfloat16),
        ],
        report.device,
    )
    bandwidth = 2 * source.numel() / copy * 1e3
    report.add("copy", bandwidth / 1e9, "GB/s")
    report.add("GEMM bf16", 2 * size**3 / half / 1e9, "TFLOP/s")
    report.add("GEMM FP8, fast accumulation", 2 * size**3 / eight / 1e9, "TFLOP/s")
    return bandwidth, 2 * size**3 / eight * 1e3


def casts(report: Report, bandwidth: float) -> None:
    """Time casts of 64 M bfloat16 elements against a copy that moves the same bytes."""
    from unclamp.numerics.gpu.cast import quantize_tensor  # noqa: PLC0415  # loads Triton

    count = report.size(ELEMENTS, 4096)
    device = report.device

    def tensor() -> Tensor:
        return torch.randn(count // 64, 64, device=device).to(torch.bfloat16)

    def cast(factor: float | None, **settings: Any) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            x = tensor()
            scale = None if factor is None else 448 / x.abs().max().float() * factor
            return lambda: quantize_tensor(x, E4M3FN, scale, **{"measured": True, **settings})

        return make

    def copy(total: int) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            source = torch.randint(0, 255, (total // 2,), dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)

        return make

    kinds = {
        "copy of 3 bytes an element": (copy(3 * count), 3),
        "delayed": (cast(0.5), 3),
        "delayed, in two launches": (cast(0.5, measured=False), 3),
        "delayed, no counts": (cast(0.5, counts=False), 3),
        "delayed, some saturate": (cast(1.5), 3),
        "guarded, none overflows": (cast(0.5, guard=True), 3),
        "guarded, each overflows": (cast(8.0, guard=True), 5),
        "dynamic": (cast(None), 5),
        "delayed, codes turned too": (cast(0.5, turned=True), 4),
        "copy of 4 bytes an element": (copy(4 * count), 4),
    }
    runs = [rotating(make) for make, _ in kinds.values()]
    # One launch after another in a graph: what the device takes, without what Python takes.
    runs = [graphed(_six_times(run), device) for run in runs]
    ms = dict(zip(kinds, (t / 6 for t in times_ms(runs, device)), strict=True))
    for name, (_, size) in kinds.items():
        report.add(f"cast {name}", ms[name] * 1e3, "us", floor=size * count / bandwidth * 1e6)
    three = ms["copy of 3 bytes an element"]
    quiet = ms["guarded, none overflows"]
    report.add("delayed: speed of a copy", three / ms["delayed"], "x", at_least=0.85)
    report.add("guarded / delayed", quiet / ms["delayed"], "x", at_most=1.03)
    worst = ms["guarded, each overflows"] / ms["dynamic"]
    report.add("guarded / dynamic, each overflows", worst, "x", at_most=1.15)
    counting = ms["delayed"] / ms["delayed, no counts"]
    report.add("counters on / off", counting, "x", at_most=1.01)


def _six_times(run: Callable[[], Any]) -> Callable[[], None]:
    def runs() -> None:
        for _ in range(6):  # a multiple of what `rotating` rotates among
            run()

    return runs


def ledger(report: Report) -> None:
    """Time an update of 1,680 sites, in a graph, so that launches do not count."""
    recipe = unclamp.Recipe()
    operands = recipe.plan("").operands
    book = Ledger()
    book.add([Site.of(str(i), ROLES[i % 3], operands[ROLES[i % 3]]) for i in range(SITES)])
    book.move_to(report.device)
    book.pending.copy_(torch.rand_like(book.pending))
    run = graphed(lambda: book.update(captured=True), report.device)
    (ms,) = times_ms([run], report.device, inner=20)
    report.add("ledger update, 1,680 sites", ms * 1e3, "us", at_most=100)


def _small(device: torch.device, dim: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
    model = model.to(device, torch.bfloat16)
    unclamp.convert(model, unclamp.Recipe.uniform(unclamp.Guarded()))
    is_cuda = device.type == "cuda"
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=is_cuda)


def whole_step(report: Report) -> None:
    """Run forward, backward, optimizer and ledger without a sync, in a graph, and compiled."""
    device = report.device
    size = report.size(512), report.size(256, 32)
    x = torch.randn(size, device=device, dtype=torch.bfloat16)

    def trained(steps: int, *, in_graph: bool = False, is_compiled: bool = False) -> list[Tensor]:
        model, optimizer = _small(device, report.size(256, 32))
        called = torch.compile(model, dynamic=False) if is_compiled else model
        heard: list[Any] = []
        book = find_ledgers(model)[0]
        book.subscribe(heard.append)

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            called(x).float().square().mean().backward()
            optimizer.step()

        if in_graph and device.type == "cuda":
            run = graphed(step, device)  # after three steps of warm-up
        else:
            run = step
            for _ in range(3):
                step()
        _set_sync_debug(device, "error")
        try:
            for _ in range(steps):
                run()
                if in_graph:
                    book.replayed()
        finally:
            _set_sync_debug(device, "default")
        weights = [p.detach().clone() for p in model.parameters()]
        return [*weights, book.amax_history.clone(), heard[-1].stats]

    eager = trained(5)
    for name, others in (
        ("graph", trained(5, in_graph=True)), ("compiled", trained(5, is_compiled=True)),
    ):  # fmt: skip
        differ = sum(not torch.equal(a, b) for a, b in zip(eager, others, strict=True))
        report.add(f"{name}: tensors that differ from eager", differ, "", at_most=0)


def _set_sync_debug(device: torch.device, mode: str) -> None:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def recorder(report: Report) -> None:
    """Replay a graph with the recorder on; its thread reads, so no sync debugging here."""
    from unclamp.runlog import RunLog  # noqa: PLC0415  # pyarrow, duckdb

    model, optimizer = _small(report.device, report.size(256, 32))
    size = report.size(512), report.size(256, 32)
    x = torch.randn(size, device=report.device, dtype=torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).float().square().mean().backward()
        optimizer.step()

    run = graphed(step, report.device)
    with tempfile.TemporaryDirectory() as folder:
        with unclamp.Recorder(model, f"{folder}/run") as log:
            for index in range(20):
                run()
                log.step(index, loss=1.0)
        with RunLog.open(f"{folder}/run") as written:
            count = written.casts().num_rows
    report.add("recorder: casts written in 20 replays", count, "", at_least=20 * 6)


def study(report: Report) -> None:
    """Train the study's model on the CPU and on the device; compare what saturated."""
    from unclamp.study.config import StudyConfig, default_toml  # noqa: PLC0415  # transformers
    from unclamp.study.data import Batches, read_text  # noqa: PLC0415
    from unclamp.study.loop import build_model, tokenize  # noqa: PLC0415

    config = StudyConfig.from_toml(default_toml())
    text = read_text((), seq_len=config.data.seq_len)
    steps = report.size(STUDY_STEPS, 2)
    rates = []
    for device in (torch.device("cpu"), report.device):
        torch.manual_seed(0)
        model = build_model(config.model)
        tokens = tokenize(config.model, model, text)
        model = model.to(device)
        unclamp.convert(model, unclamp.Recipe(), skip=config.model.skip)
        totals: list[Tensor] = []
        find_ledgers(model)[0].subscribe(lambda u, totals=totals: totals.append(u.stats.sum(0)))
        batches = Batches(tokens, batch_size=8, seq_len=config.data.seq_len, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        for step in range(steps):
            ids, labels = (t.to(device) for t in batches.batch(step))
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        total = torch.stack(totals).sum(0)
        rates.append(float(total[Stat.SATURATED] / total[Stat.ELEMENTS]))
    report.add(f"study {steps} steps: saturated, CPU", rates[0] * 1e6, "ppm")
    report.add(f"study {steps} steps: saturated, device", rates[1] * 1e6, "ppm")
    ratio = max(rates) / max(min(rates), 1e-12)
    report.add("study: ratio of the two", ratio, "x", at_most=1.5)


def run(report: Report, *, only_check: bool, only: Sequence[str], out: Path) -> int:
    """Run the parts, print the table, write the JSON; return the exit code."""
    from bench import gpu_check, gpu_layers  # noqa: PLC0415  # loads Triton

    ceiling = {"bandwidth": float("nan"), "flops": float("nan")}
    same: list[bool] = []

    def measured() -> None:
        ceiling["bandwidth"], ceiling["flops"] = ceilings(report)

    parts = {
        "check": Part(lambda: same.append(gpu_check.check(report)), 110),
        "layers": Part(lambda: gpu_layers.against_the_cpu(report), 40),
        "ceilings": Part(measured, 20),
        "casts": Part(lambda: casts(report, ceiling["bandwidth"]), 40),
        "ledger": Part(lambda: ledger(report), 15),
        "whole step": Part(lambda: whole_step(report), 30),
        "recorder": Part(lambda: recorder(report), 20, ("pyarrow", "duckdb")),
        "linear layers": Part(lambda: gpu_layers.linears(report, ceiling["flops"]), 120),
        "Llama-3-8B block": Part(lambda: gpu_layers.block(report), 80),
        "study": Part(lambda: study(report), 60, ("pyarrow", "duckdb", "transformers")),
    }
    wanted = ["check"] if only_check else only
    alarm = threading.Timer(report.total_s + 10, cut_off, [report, out])
    alarm.daemon = True
    alarm.start()
    for name, part in parts.items():
        if wanted and not any(name.startswith(word) for word in wanted):
            continue
        if part.lacks:
            report.leave_out(name, f"needs {' and '.join(part.lacks)}")
        elif report.has_time(name, min(part.budget_s, 20)):
            with report.part(name, part.budget_s):
                part.run()
            report.until = float("inf")
        write(report, out)
    alarm.cancel()
    print(f"\n{report.table(machine(report.device))}\n\nwritten: {out}", flush=True)
    return 0 if same == [True] * ("check" in wanted or not wanted) and not report.errors else 1


def cut_off(report: Report, out: Path) -> None:
    """Give what there is and end the process: something takes longer than it may."""
    report.leave_out("the rest", "cut off, a part took longer than it may")
    write(report, out)
    print(f"\n{report.table(machine(report.device))}\n\nwritten: {out}", flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def write(report: Report, out: Path) -> None:
    """Write the figures that there are; after each part, so that a killed run keeps them."""
    found = {"machine": machine(report.device), "figures": report.figures}
    found |= {"errors": report.errors, "left_out": report.left_out}
    out.write_text(json.dumps(found, indent=1) + "\n")


def machine(device: torch.device) -> str:
    """Return what ran this."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a dry run on the CPU"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {_driver()}"
    return f"{name}, {versions}, Triton {_version('triton')}, torchao {_version('torchao')}"


def _driver() -> str:
    """Return the version of the GPU's driver; "-" where nvidia-smi is not there."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "-"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare casts with the CPU")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="a part's first words; repeats"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    out = Path(os.environ.get("OUT", Path(__file__).parent)) / "gpu_results.json"
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="time for all parts")
    parser.add_argument("--out", type=Path, default=out, help="where the JSON goes")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        print("bench/gpu.py needs a GPU, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    report = Report(device=device, is_dry=options.dry_run, total_s=options.seconds)
    return run(report, only_check=options.check, only=options.only, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
