"""Linear layers and a Llama-3-8B block on a GPU, against bfloat16 and torchao in the same run.

Each candidate is timed twice: launched by Python, as most people train, where a slow host can be
what takes the time; and as the replay of a CUDA graph, which is what the device takes.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from bench.gpu_timing import Report, graphed, times_ms
from unclamp.nn import find_ledgers

SHAPES = [(16384, 4096, 4096), (16384, 4096, 14336), (8192, 8192, 28672)]
RECIPE = unclamp.Recipe(output="hopper_fast")
"""Fast accumulation in the forward alone, as torchao's default has it."""


def fp8(model: nn.Module) -> nn.Module:
    """Return a converted copy."""
    twin = copy.deepcopy(model)
    unclamp.convert(twin, RECIPE)
    return twin


def torchao(model: nn.Module, recipe: str) -> nn.Module | None:
    """Return a copy converted by torchao; None where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]  # noqa: PLC0415
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = Float8LinearConfig.from_recipe_name(recipe)
    return convert_to_float8_training(copy.deepcopy(model), config=config)


def compiled(model: nn.Module) -> nn.Module:
    """Return a model that is compiled at its first call, for one shape."""
    made = torch.compile(model, dynamic=False)
    assert isinstance(made, nn.Module)
    return made


def step_of(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Return a forward and backward that leaves no gradients behind."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        model(x).backward(grad)

    return run


def settled(run: Callable[[], None], model: nn.Module) -> Callable[[], None]:
    """Return the run after a first one has given every site its scale."""
    run()
    for ledger in find_ledgers(model):
        ledger.update()
    return run


def kept_mib(model: nn.Module, x: Tensor) -> float:
    """Return what a forward keeps for backward, parameters, input and output left out.

    A plain layer keeps its input, which its maker would else free: that counts.
    """
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x.detach().requires_grad_())
    return sum(kept.values()) / 2**20


ROW, BLOCK = (unclamp.Dynamic(granularity=g) for g in (unclamp.PerRow(), unclamp.PerBlock(1, 128)))
SQUARE = unclamp.Guarded(granularity=unclamp.PerBlock(128, 128))
RECIPES = {
    "delayed": unclamp.Recipe(),
    "guarded": unclamp.Recipe.uniform(unclamp.Guarded()),
    "dynamic": unclamp.Recipe.uniform(unclamp.Dynamic()),
    "rows": unclamp.Recipe.uniform(ROW),
    "blocks": unclamp.Recipe(input=BLOCK, weight=SQUARE, grad_output=BLOCK),
    "blocks, gradients e4m3fn": unclamp.Recipe(
        input=BLOCK, weight=SQUARE, grad_output=BLOCK, grad_output_format="e4m3fn"
    ),
    "MX": unclamp.Recipe.uniform(unclamp.Dynamic(granularity=unclamp.MX())),
    "smooth": unclamp.Recipe(weight=unclamp.Guarded(), smooth=True),
}


def against_the_cpu(report: Report) -> None:
    """Compare two steps of a layer with the CPU's, where the same codes are multiplied in float32.

    What differs is how products are added up, and the rounding to bfloat16.
    """
    tokens, k, n = (report.size(size) for size in (512, 512, 384))
    torch.manual_seed(0)
    base = nn.Linear(k, n, dtype=torch.bfloat16)
    x, grad = (torch.randn(tokens, d, dtype=torch.bfloat16) for d in (k, n))
    for name, recipe in RECIPES.items():
        try:
            found = [_two_steps(base, recipe, x, grad, torch.device("cpu"))]
            found += [_two_steps(base, recipe, x, grad, report.device)]
        except Exception as error:  # the next recipe may do
            report.errors[f"layer, {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        worst = max(
            float((a - b).norm() / b.norm())
            for a, b in zip(found[1], found[0], strict=True)
        )  # fmt: skip
        report.add(f"layer, {name}: differs from the CPU by", worst, "", at_most=5e-3)


def _two_steps(
    base: nn.Module, recipe: unclamp.Recipe, x: Tensor, grad: Tensor, device: torch.device
) -> list[Tensor]:
    model = copy.deepcopy(base).to(device)
    unclamp.convert(model, recipe)
    found = []
    for _ in range(2):
        moved = x.to(device, copy=True).requires_grad_()
        y = model(moved)
        for parameter in model.parameters():
            parameter.grad = None
        y.backward(grad.to(device))
        assert moved.grad is not None
        found += [y.detach(), moved.grad, *(p.grad for p in model.parameters())]
        for ledger in find_ledgers(model):
            ledger.update()
    return [t.float().cpu() for t in found if t is not None]


COMPILING_S = 25.0
"""What a compiled candidate may take until its first step is done."""


def candidates(
    report: Report, label: str, base: nn.Module, x: Tensor, grad: Tensor
) -> dict[str, Callable[[], None]]:
    """Return steps by name, as many as there is time for; compiled ones have been compiled."""
    runs = {}
    for name in ("bf16 eager", "unclamp eager", "bf16 compiled", "unclamp compiled",
                 "torchao tensorwise compiled", "torchao rowwise compiled"):  # fmt: skip
        kind, *recipe, way = name.split()
        if way == "compiled" and not report.has_time(f"{label} {name}", COMPILING_S):
            continue
        made = {"bf16": copy.deepcopy, "unclamp": fp8}.get(kind)
        model = made(base) if made else torchao(base, recipe[0])
        if model is not None:
            ran = compiled(model) if way == "compiled" else model
            runs[name] = settled(step_of(ran, x, grad), model)
    return runs


def compare(
    report: Report, name: str, ms: dict[str, float], pair: tuple[str, str], at_least: float | None
) -> None:
    """Add how many times faster the second is than the fastest whose name begins as the first."""
    rivals = [value for key, value in ms.items() if key.startswith(pair[0])]
    if rivals and pair[1] in ms:
        report.add(name, min(rivals) / ms[pair[1]], "x", at_least=at_least)


def linears(report: Report, flops: float) -> None:
    """Time a linear layer's forward and backward at three shapes; `flops` a second in FP8."""
    for index, (tokens, k, n) in enumerate(SHAPES):
        tokens, k, n = (report.size(size) for size in (tokens, k, n))
        label = f"linear {tokens}x{k}x{n}"
        if not report.has_time(label, 10):
            continue
        options: dict[str, Any] = {"device": report.device, "dtype": torch.bfloat16}
        base = nn.Linear(k, n, bias=False, **options)
        x, grad = torch.randn(tokens, k, **options), torch.randn(tokens, n, **options)
        runs = candidates(report, label, base, x, grad)
        ms = timed(runs, report)
        replayed = timed(in_graphs(runs, report), report)
        # Three casts, the weight's twice; each GEMM reads two operands and writes one.
        moved = tokens * k * 4 + n * k * 7 + tokens * n * 4 + 2 * (tokens * (n + k) + n * k)
        floor = 6 * tokens * k * n / flops * 1e3
        for name, value in ms.items():
            report.figures[f"linear {index} {name} ms"] = {
                "value": value, "floor": floor, "bytes": moved,
            }  # fmt: skip
            report.figures[f"linear {index} {name} replayed ms"] = {
                "value": replayed.get(name), "floor": floor, "bytes": moved,
            }  # fmt: skip
            device_ms = replayed.get(name, float("nan"))
            print(
                f"   {tokens} x {k} x {n} {name:28} {value:8.3f} ms, replayed {device_ms:.3f} ms "
                f"(floor {floor:.3f})"
            )
        goal = 1.25 if index else None
        compare(report, f"{label} eager / bf16", ms, ("bf16 eager", "unclamp eager"), goal)
        compare(report, f"{label} compiled / torchao", ms, ("torchao", "unclamp compiled"), 1.0)
        compare(report, f"{label} compiled / bf16", ms, ("bf16 comp", "unclamp compiled"), None)
        compare(report, f"{label} replayed / bf16", replayed, ("bf16", "unclamp eager"), goal)
        compare(report, f"{label} replayed / torchao", replayed, ("torchao", "unclamp eager"), 1.0)
        share = kept_mib(fp8(base), x) / kept_mib(base, x)
        report.add(f"{label} kept memory / bf16", share, "x", at_most=0.55)
        del base, x, grad, runs
        _free(report)


def in_graphs(runs: dict[str, Callable[[], None]], report: Report) -> dict[str, Callable[[], None]]:
    """Return replays of the same steps; what cannot be captured is said and left out."""
    replays = {}
    for name, run in runs.items():
        try:
            replays[name] = graphed(run, report.device)
        except Exception as error:
            report.leave_out(f"{name} in a graph", f"{type(error).__name__} {str(error)[:80]}")
    return replays


def timed(runs: dict[str, Callable[[], None]], report: Report) -> dict[str, float]:
    """Return the median times in ms, by name."""
    return dict(zip(runs, times_ms(list(runs.values()), report.device, rounds=15), strict=True))


class LlamaBlock(nn.Module):
    """A block of Llama-3-8B: 32 heads of 128, 8 of keys and values, SwiGLU of 14336."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head = dim // heads
        kv = kv_heads * self.head
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.q, self.k, self.v, self.o = (
            nn.Linear(dim, out, bias=False) for out in (dim, kv, kv, dim)
        )
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def block(report: Report) -> None:
    """Time a Llama-3-8B block, 1 x 8192 tokens, forward and backward."""
    dim, hidden, tokens = report.size(4096, 64), report.size(14336, 96), report.size(8192)
    base = LlamaBlock(dim, hidden, report.size(32, 4), report.size(8, 2))
    base = base.to(report.device, torch.bfloat16)
    x = torch.randn(1, tokens, dim, device=report.device, dtype=torch.bfloat16)
    runs = candidates(report, "block", base, x, torch.randn_like(x))
    ms = timed(runs, report)
    for name, value in ms.items():
        report.add(f"block {name}", tokens / value * 1e3, "tokens/s")
    replayed = timed(in_graphs(runs, report), report)
    for name, value in replayed.items():
        report.add(f"block {name}, replayed", tokens / value * 1e3, "tokens/s")
    compare(report, "block compiled / bf16", ms, ("bf16 comp", "unclamp compiled"), 1.25)
    compare(report, "block compiled / torchao", ms, ("torchao", "unclamp compiled"), 1.0)
    compare(report, "block replayed / bf16", replayed, ("bf16", "unclamp eager"), 1.25)
    compare(report, "block replayed / torchao", replayed, ("torchao", "unclamp eager"), 1.0)
    del base, x, runs
    _free(report)


def _free(report: Report) -> None:
    torch.compiler.reset()
    if report.device.type == "cuda":
        torch.cuda.empty_cache()
