"""What FP8 matmuls accept, what their scales mean, and how tensor cores add."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unclamp.numerics.hopper import hopper_matmul
from unclamp.traps.products import Problem, attempt, eighths, multiply
from unclamp.traps.trap import Between, Documented, Trap


def accepted_on_a_cpu(device):
    """Try three products that a Hopper GPU refuses, and one that it takes."""
    problems = {
        "e4m3fn x e4m3fn": Problem(),
        "e5m2 x e5m2": Problem(a="e5m2", b="e5m2"),
        "K not a multiple of 16": Problem(k=40),
        "row-major second operand": Problem(row_major=True),
    }
    return {name: attempt(p, device).outcome for name, p in problems.items()}


def fast_accumulation(device):
    """Sum 4096 positive products with `use_fast_accum` and without it."""
    problem, x, one = Problem(k=4096), eighths(4096), torch.ones(1, 1)
    given = problem, x, x.t(), one, one, device
    slow, fast = multiply(*given), multiply(*given, use_fast_accum=True)
    change = (fast - slow) / slow
    return {"largest change over K = 4096": change.abs().max().item()}


def scale_or_inverse(device):
    """Give a scaled matmul the scales of its operands, or their inverses."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=seeded).to(device)
    scale = 448 / x.abs().max()
    codes = (x * scale).to(torch.float8_e4m3fn)
    whole, right = F.ScalingType.TensorWise, x @ x.t()

    def error(factor):
        given = factor.reshape(1), whole, factor.reshape(1), whole
        y = F.scaled_mm(codes, codes.t(), *given, output_dtype=torch.float32)  # pyright: ignore
        return ((y - right).norm() / right.norm()).item()

    return {
        "error with 1 / scale": error(1 / scale),
        "error with scale, over scale**4": error(scale) / scale.item() ** 4,
    }


def grouped_mm(device):
    """Multiply three groups of rows, one empty; go backward, count FLOPs."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(96, 32, generator=seeded).to(device).requires_grad_()
    w = torch.randn(3, 32, 48, generator=seeded).to(device)
    ends = torch.tensor([32, 32, 96], dtype=torch.int32, device=device)
    with FlopCounterMode(display=False) as counter:
        y = F.grouped_mm(x, w, offs=ends)
    loop = torch.cat([x[:32] @ w[0], x[32:] @ w[2]])
    facts = {
        "equals a loop": str(torch.equal(y, loop)),
        "FLOPs counted of 294,912": counter.get_total_flops(),
    }
    losses = {"y.sum()": y.sum(), "(y * 1).sum()": (y * 1).sum()}
    for name, loss in losses.items():
        facts[f"backward of {name}"] = "works"
        try:
            torch.autograd.grad(loss, x, retain_graph=True)
        except RuntimeError:
            facts[f"backward of {name}"] = "raises"
    return facts


def hopper_like_accumulation(device):
    """Sum K products of numbers in [0, 1) by the model of a Hopper GPU."""
    facts = {}
    for k in (512, 2048, 8192):
        x = torch.rand(2, 16, k, generator=torch.Generator().manual_seed(0))
        a, b = x.to(torch.float8_e4m3fn).float()
        right = a.double() @ b.double().t()
        for name, fast in {"fast": True, "promoted every 128": False}.items():
            error = (hopper_matmul(a, b, fast=fast) - right).abs() / right
            facts[f"K = {k}, {name}"] = error.mean().item()
    return facts


def tensor_core_accumulation(device):
    """Sum K products of numbers in [0, 1) by the device's own scaled matmul."""
    given = (torch.ones(1, device=device), F.ScalingType.TensorWise) * 2
    facts, wanted = {}, {"output_dtype": torch.float32}
    for k in (512, 8192):
        x = torch.rand(2, 32, k, generator=torch.Generator().manual_seed(0))
        a, b = x.to(torch.float8_e4m3fn).to(device)
        right = a.double() @ b.double().t()
        for name, fast in {"fast": True, "promoted": False}.items():
            y = F.scaled_mm(a, b.t(), *given, use_fast_accum=fast, **wanted)  # pyright: ignore
            error = (y.double() - right).abs() / right
            facts[f"K = {k}, {name}"] = error.mean().item()
    return facts


def needs_scaled_mm(device: str) -> str | None:
    """Say that torch has no scaled matmul for a device, where it has none."""
    error = attempt(Problem(), device).error
    if isinstance(error, NotImplementedError):
        release = ".".join(torch.__version__.split(".")[:2])
        return f"torch {release} has no torch.nn.functional.scaled_mm for {device}"
    return None


def needs_fp8_gpu(device: str) -> str | None:
    """Say that a CUDA device cannot multiply FP8, where it cannot."""
    if torch.cuda.get_device_capability() < (8, 9) and torch.version.hip is None:
        return "the GPU has no FP8 tensor cores"
    return None


_LAX = ("e5m2 x e5m2", "K not a multiple of 16", "row-major second operand")
_HOPPER = {
    "K = 512, fast": Between(low=0.004, high=0.007),
    "K = 512, promoted every 128": Between(low=0.0003, high=0.0008),
    "K = 2048, fast": Between(low=0.025, high=0.036),
    "K = 2048, promoted every 128": Between(low=0.0003, high=0.0008),
    "K = 8192, fast": Between(low=0.12, high=0.15),
    "K = 8192, promoted every 128": Between(low=0.0003, high=0.0008),
}

TRAPS = (
    Trap(
        name="scaled-mm-on-a-cpu",
        belief="What `scaled_mm` takes on a CPU, a GPU takes too.",
        truth="From torch 2.12 on a CPU multiplies e5m2 by e5m2, any K and any layout; a Hopper "
        "GPU refuses all three. In torch 2.11 a CPU has no such function.",
        experiment=accepted_on_a_cpu,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                before=(2, 12),
                expected=dict.fromkeys(("e4m3fn x e4m3fn", *_LAX), "rejected"),
            ),
            Documented(
                since=(2, 12),
                expected=dict.fromkeys(("e4m3fn x e4m3fn", *_LAX), "accepted"),
            ),
            Documented(
                device="sm_90",
                expected={"e4m3fn x e4m3fn": "accepted"} | dict.fromkeys(_LAX, "rejected"),
                source="cuBLAS's documentation; not run here",
            ),
        ),
        cost="Code that was proven on a laptop stops at the first step on the rented GPU.",
        remedy="GEMMs pad K, lay operands out as a GPU wants them and dequantise e5m2 by e5m2, on "
        "every device; `unclamp doctor` says what a device takes.",
        see="docs/gpu.md",
        telling="e5m2 x e5m2",
    ),
    Trap(
        name="fast-accumulation",
        belief="`use_fast_accum` is tried on a CPU as well as anywhere.",
        truth="A CPU ignores it: not a bit changes. On a Hopper GPU it changes long sums by "
        "percents.",
        experiment=fast_accumulation,
        devices=("cpu", "cuda"),
        needs=needs_scaled_mm,
        documented=(
            Documented(since=(2, 12), expected={"largest change over K = 4096": 0.0}),
            Documented(
                device="sm_90",
                expected={"largest change over K = 4096": Between(low=0.001, high=0.2)},
                source="the published model; not run here",
            ),
        ),
        cost="The accuracy that was tested is not the one that trains.",
        remedy='Recipes choose `accumulate="hopper_fast"`, which emulates it on a CPU and sets '
        "it on a GPU.",
        see="docs/scaling.md",
    ),
    Trap(
        name="scale-or-inverse",
        belief="`scaled_mm` undoes the scale that it is given.",
        truth="It multiplies by it. What the operands were multiplied by has to be given as its "
        "inverse; otherwise the result is wrong by the fourth power of the scale, without an "
        "error.",
        experiment=scale_or_inverse,
        devices=("cpu", "cuda"),
        needs=needs_scaled_mm,
        documented=(
            Documented(
                since=(2, 12),
                expected={
                    "error with 1 / scale": Between(low=0.005, high=0.06),
                    "error with scale, over scale**4": Between(low=0.9, high=1.1),
                },
            ),
        ),
        cost="With scales near 1 nothing is noticed in tests; with real ones the loss explodes.",
        remedy="`scale` multiplies and `scale_inv` is stored, in every name of the package.",
        see="unclamp.numerics.Quantized",
        telling="error with scale, over scale**4",
    ),
    Trap(
        name="grouped-mm",
        belief="`grouped_mm` is a loop of matmuls.",
        truth="Its values are; but its backward raises for a gradient without strides, as "
        "`sum()` makes one, and FLOP counters see none of it.",
        experiment=grouped_mm,
        documented=(
            Documented(
                expected={
                    "equals a loop": "True",
                    "FLOPs counted of 294,912": 0,
                    "backward of y.sum()": "raises",
                    "backward of (y * 1).sum()": "works",
                }
            ),
        ),
        cost="A mixture's experts are missing from counted FLOPs (in Mixtral-8x7B 82 % of a step), "
        "and a test that calls `sum().backward()` fails where training works.",
        remedy="`unclamp.coverage` counts the FLOPs of experts by their shapes. The limit of the "
        "backward is torch's own, and stays where a model is not converted.",
        see="docs/experts.md",
        telling="backward of y.sum()",
    ),
    Trap(
        name="hopper-accumulation",
        belief="FP8 tensor cores add in float32.",
        truth="A Hopper tensor core aligns 32 products to the largest exponent and keeps 13 bits: "
        "with fast accumulation the error of a sum grows with K, to 13 % at 8192; promoted to "
        "float32 every 128 it stays at 0.05 %. (By the published model, on any machine.)",
        experiment=hopper_like_accumulation,
        documented=(Documented(expected=_HOPPER, source="arXiv 2412.19437, 2512.07004"),),
        cost="A float32 emulation hides the second suspect in a spike; long K loses most.",
        remedy='`accumulate="hopper"` and "hopper_fast" add so on a CPU.',
        see="docs/scaling.md",
        telling="K = 8192, fast",
    ),
    Trap(
        name="tensor-core-accumulation",
        belief="This GPU adds FP8 products in float32.",
        truth="By the published model a Hopper GPU would show errors of 0.5 % at K = 512 and 13 % "
        "at 8192 with fast accumulation, and 0.05 % without.",
        experiment=tensor_core_accumulation,
        devices=("cuda",),
        needs=needs_fp8_gpu,
        documented=(
            Documented(
                device="sm_90",
                expected={
                    "K = 512, fast": Between(low=0.002, high=0.01),
                    "K = 8192, fast": Between(low=0.05, high=0.2),
                    "K = 512, promoted": Between(low=0.0, high=0.002),
                    "K = 8192, promoted": Between(low=0.0, high=0.002),
                },
                source="the published model; not run here",
            ),
        ),
        cost="Gradients of weights sum over all tokens of a batch: their K is the longest.",
        remedy="GEMMs promote unless the recipe says `hopper_fast`.",
        see="docs/gpu.md",
    ),
)
