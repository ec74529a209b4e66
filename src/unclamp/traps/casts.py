"""What casts to FP8 do that nobody asked for: overflow, gradients, rounding twice, operators."""

import torch

from unclamp.formats import FORMATS, Format
from unclamp.numerics import torch_dtype
from unclamp.traps.trap import Between, Documented, Fact, Trap


def every_bfloat16() -> torch.Tensor:
    """Return all 65,536 bfloat16 values, each at its bit pattern."""
    bits = torch.arange(0x10000, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16)


def codes_of(x: torch.Tensor, fmt: Format, device: str) -> torch.Tensor:
    """Return the codes that a plain cast on a device gives."""
    return x.to(device).to(torch_dtype(fmt)).view(torch.uint8).cpu()


def plain_cast(device):
    """Count what becomes of finite values too large for every format."""
    x = every_bfloat16()
    too_large = x.isfinite() & (x.float().abs() > 61440)
    facts = {}
    for name, fmt in FORMATS.items():
        values = torch.tensor([fmt.decode(code) for code in range(256)])
        got = values[codes_of(x, fmt, device).long()][too_large]
        facts[f"{name}: saturate"] = int((got.abs() == fmt.max).sum())
        facts[f"{name}: Inf"] = int(got.isinf().sum())
        facts[f"{name}: NaN"] = int(got.isnan().sum())
    return facts


def gradient_cast(device):
    """Send three gradients backward through a cast to FP8."""
    x = torch.ones(3, device=device, requires_grad=True)
    y = x.to(torch.float8_e4m3fn).to(torch.float32)
    sent = torch.tensor([4e-4, 300.0, 1e6], device=device)
    (back,) = torch.autograd.grad(y, x, sent)
    return dict(zip(["0.0004", "300", "1e6"], back.tolist(), strict=True))


def double_rounding(device):
    """Cast float32 numbers, also by way of bfloat16; cast one float64."""
    e4m3, seeded = torch.float8_e4m3fn, torch.Generator().manual_seed(0)
    x = torch.empty(1 << 18).uniform_(-400, 400, generator=seeded).to(device)
    twice = x.bfloat16().to(e4m3).float()
    changed = x.to(e4m3).float() != twice
    tie = torch.tensor(1.0625, dtype=torch.float64, device=device)
    return {
        "codes changed by way of bfloat16": changed.float().mean().item(),
        "1.0625 + 2**-40, right: 1.125": (tie + 2**-40).to(e4m3).item(),
    }


def missing_operators(device):
    """Try what people do with a tensor on one in FP8."""
    x = torch.tensor([1.0, -2.0], device=device).to(torch.float8_e4m3fn)
    tried = {
        "x.float()": lambda: x.float(),
        "x.abs()": lambda: x.abs(),
        "x == x": lambda: x == x,
        "torch.cat": lambda: torch.cat([x, x]),
        "x + x": lambda: x + x,
        "x * 2": lambda: x * 2,
        "x.max()": lambda: x.max(),
        "x.clamp": lambda: x.clamp(-1, 1),
        "x @ x": lambda: x @ x,
        "torch.equal": lambda: torch.equal(x, x),
    }
    facts = dict.fromkeys(tried, "works")
    for name, operator in tried.items():
        try:
            operator()
        except NotImplementedError:
            facts[name] = "raises"
    return facts


def _fates(**fates: str) -> dict[str, Fact]:
    """Return the facts of `plain_cast`: 28,702 values have one fate in each format."""
    return {
        f"{name}: {fate}": 28_702 if fate == mine else 0
        for name, mine in fates.items()
        for fate in ("saturate", "Inf", "NaN")
    }


_WORK = ["x.float()", "x.abs()", "x == x", "torch.cat"]
_RAISE = ["x + x", "x * 2", "x.max()", "x.clamp", "x @ x", "torch.equal"]

TRAPS = (
    Trap(
        name="plain-cast",
        belief="A cast to FP8 clamps what is too large.",
        truth="It depends on format and version: `.to(float8_e4m3fn)` gave NaN until torch 2.12 "
        "and saturates since 2.13, without a trace; e5m2 gives Inf, and the fnuz formats NaN.",
        experiment=plain_cast,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                before=(2, 13),
                expected=_fates(e4m3fn="NaN", e5m2="Inf", e4m3fnuz="NaN", e5m2fnuz="NaN"),
            ),
            Documented(
                since=(2, 13),
                expected=_fates(e4m3fn="saturate", e5m2="Inf", e4m3fnuz="NaN", e5m2fnuz="NaN"),
                source="pytorch#178817",
            ),
        ),
        cost="The same script loses range silently on one torch and dies of NaN on another.",
        remedy="Every cast clamps explicitly and counts what it clamped, before the cast.",
        see="docs/telemetry.md",
    ),
    Trap(
        name="gradient-cast",
        belief="Casting an activation to FP8 in forward leaves its gradient in float32.",
        truth="Autograd casts the gradient to the same format on its way back: 300 becomes 288, "
        "4e-4 becomes 0, and 1e6 becomes 448 (NaN before torch 2.13).",
        experiment=gradient_cast,
        devices=("cpu", "cuda"),
        documented=(
            Documented(before=(2, 13), expected={"0.0004": 0.0, "300": 288.0, "1e6": "nan"}),
            Documented(since=(2, 13), expected={"0.0004": 0.0, "300": 288.0, "1e6": 448.0}),
        ),
        cost="Gradients are rounded to three bits without a scale of their own: small ones vanish "
        "and large ones are cut.",
        remedy="Products are autograd functions: the gradient is cast once, as grad_output, with "
        "a format and scale of its own.",
        see="docs/scaling.md",
        telling="1e6",
    ),
    Trap(
        name="double-rounding",
        belief="Going through bfloat16 or float32 on the way to FP8 changes nothing that FP8 has.",
        truth="Rounding twice is not rounding once: by way of bfloat16 about 3 % of e4m3 codes "
        "change, and torch casts float64 by way of float32.",
        experiment=double_rounding,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "codes changed by way of bfloat16": Between(low=0.025, high=0.035),
                    "1.0625 + 2**-40, right: 1.125": 1.0,
                }
            ),
        ),
        cost="One code in thirty is one step off, always where the value lay near the middle of "
        "two codes; twins that should agree bit for bit do not.",
        remedy="Casts multiply in float32 and round once; all bfloat16 and float16 values are "
        "tested against other libraries.",
        see="docs/scaling.md",
        telling="codes changed by way of bfloat16",
    ),
    Trap(
        name="missing-operators",
        belief="A float8 tensor is a tensor like others.",
        truth="It can be stored, moved, compared and converted; arithmetic, max, clamp and "
        "matmul raise.",
        experiment=missing_operators,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected=dict.fromkeys(_WORK, "works") | dict.fromkeys(_RAISE, "raises"),
            ),
        ),
        cost="An amax cannot be taken after the cast, and generic code (optimizers, averages, "
        "gloo) stops at the first FP8 tensor.",
        remedy="Statistics are taken in the pass that casts; parameters and state stay in dtypes "
        "that every tool can add and multiply.",
        see="docs/copies.md",
        telling="x + x",
    ),
)
