"""What FP8 matmuls accept, what their scales mean, and how tensor cores add."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unclamp.numerics.hopper import hopper_matmul
from unclamp.traps.products import Problem, attempt, eighths, multiply
from unclamp.traps.trap import Between, Documented, Fact, Trap


def accepted_on_a_cpu(device: str) -> dict[str, Fact]:
    """Try three products that a Hopper GPU refuses, and one that it takes."""
    return {
        "e4m3fn x e4m3fn": attempt(Problem(), device).outcome,
        "e5m2 x e5m2": attempt(Problem(a="e5m2", b="e5m2"), device).outcome,
        "K not a multiple of 16": attempt(Problem(k=40), device).outcome,
        "row-major second operand": attempt(Problem(row_major=True), device).outcome,
    }


def fast_accumulation(device: str, k: int = 4096) -> dict[str, Fact]:
    """Sum k positive products with `use_fast_accum` and without it."""
    x, one = eighths(k), torch.ones(1, 1)
    slow = multiply(Problem(k=k), x, x.t(), one, one, device)
    fast = multiply(Problem(k=k), x, x.t(), one, one, device, use_fast_accum=True)
    return {f"largest change over K = {k}": ((fast - slow) / slow).abs().max().item()}


def scale_or_inverse(device: str) -> dict[str, Fact]:
    """Give a scaled matmul the factors that the operands were multiplied by, and the inverses."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(device)
    scale = 448 / x.abs().max()
    codes = (x * scale).to(torch.float8_e4m3fn)
    whole, right = F.ScalingType.TensorWise, x @ x.t()

    def relative_error(factor: torch.Tensor) -> float:
        given = factor.reshape(1)
        y = F.scaled_mm(codes, codes.t(), given, whole, given, whole, output_dtype=torch.float32)
        return ((y - right).norm() / right.norm()).item()

    return {
        "error with 1 / scale": relative_error(1 / scale),
        "error with scale / scale**4": relative_error(scale) / scale.item() ** 4,
    }


def grouped_mm(device: str) -> dict[str, Fact]:
    """Multiply three groups of rows, one of them empty; go backward, and count FLOPs."""
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).to(device)
    w = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(1)).to(device)
    x.requires_grad_()
    ends = torch.tensor([32, 32, 96], dtype=torch.int32, device=device)
    with FlopCounterMode(display=False) as counter:
        y = F.grouped_mm(x, w, offs=ends)
    facts: dict[str, Fact] = {
        "equals a loop": str(torch.equal(y, torch.cat([x[:32] @ w[0], x[32:] @ w[2]]))),
        "FLOPs counted of 294,912": counter.get_total_flops(),
    }
    for name, gradient in {"sum().backward()": y.sum(), "(y * 1).sum()": (y * 1).sum()}.items():
        try:
            torch.autograd.grad(gradient, x, retain_graph=True)
            facts[name] = "works"
        except RuntimeError:
            facts[name] = "raises"
    return facts


def hopper_like_accumulation(device: str) -> dict[str, Fact]:
    """Sum K products of numbers in [0, 1) as a Hopper tensor core adds, by its published model."""
    facts = {}
    for k in (512, 2048, 8192):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.rand(16, k, generator=generator) for _ in "ab")
        a, b = (x.to(torch.float8_e4m3fn).float() for x in (a, b))
        right = a.double() @ b.double().t()
        for name, fast in {"fast": True, "promoted every 128": False}.items():
            error = (hopper_matmul(a, b, fast=fast) - right).abs() / right
            facts[f"K = {k}, {name}"] = error.mean().item()
    return facts


def tensor_core_accumulation(device: str) -> dict[str, Fact]:
    """Sum K products of numbers in [0, 1) by the device's own scaled matmul."""
    one, whole, facts = torch.ones(1, device=device), F.ScalingType.TensorWise, {}
    for k in (512, 8192):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.rand(32, k, generator=generator).to(torch.float8_e4m3fn) for _ in "ab")
        right = a.double() @ b.double().t()
        for name, fast in {"fast": True, "promoted": False}.items():
            y = F.scaled_mm(
                a.to(device), b.to(device).t(), one, whole, one, whole,
                output_dtype=torch.float32, use_fast_accum=fast,
            )  # fmt: skip
            facts[f"K = {k}, {name}"] = ((y.cpu() - right).abs() / right).mean().item()
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
                    "error with scale / scale**4": Between(low=0.9, high=1.1),
                },
            ),
        ),
        cost="With scales near 1 nothing is noticed in tests; with real ones the loss explodes.",
        remedy="`scale` multiplies and `scale_inv` is stored, in every name of the package.",
        see="unclamp.numerics.Quantized",
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
                    "sum().backward()": "raises",
                    "(y * 1).sum()": "works",
                }
            ),
        ),
        cost="Four fifths of a mixture of experts are missing from counted FLOPs, and a test "
        "that calls `sum().backward()` fails where training works.",
        remedy="`unclamp.grouped_mm` takes any gradient, and `unclamp.coverage` counts its FLOPs.",
        see="docs/experts.md",
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
