"""What torch.compile changes in the numbers of bfloat16 code."""

import shutil

import torch
from torch._inductor import config

from unclamp.traps.trap import Between, Documented, Fact, Trap


def fused_in_float32(device: str) -> dict[str, Fact]:
    """Compile three bfloat16 operations, as they are and with eager's casts emulated."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1 << 14, generator=generator).bfloat16().to(device) for _ in "xy")

    def fused(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y + x) * y

    facts = {}
    for emulate in (False, True):
        options = {"emulate_precision_casts": emulate}
        with config.patch(cpp_cache_precompile_headers=False):  # which take longer than the rest
            compiled = torch.compile(fused, options=options)(x, y)
        share = (compiled != fused(x, y)).float().mean().item()
        facts[f"elements that differ, emulate_precision_casts={emulate}"] = share
        torch._dynamo.reset()
    return facts


def needs_compiler(device: str) -> str | None:
    """Say that torch.compile finds no C++ compiler, where there is none."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "torch.compile needs a C++ compiler"
    return None


_FUSED = {"elements that differ, emulate_precision_casts=False": Between(low=0.2, high=0.6)}

TRAPS = (
    Trap(
        name="compile-keeps-float32",
        belief="`torch.compile` gives the numbers of eager mode, faster.",
        truth="Fused bfloat16 operations keep float32 between them: 40 % of the elements differ. "
        "`emulate_precision_casts` rounds as eager does.",
        experiment=fused_in_float32,
        devices=("cpu", "cuda"),
        apart=True,
        needs=needs_compiler,
        documented=(
            Documented(
                since=(2, 13),
                expected=_FUSED | {"elements that differ, emulate_precision_casts=True": 0.0},
            ),
        ),
        cost="Activations, amaxes and so scales differ between a compiled run and its eager "
        "replay; no bug need be there.",
        remedy="Casts and their counts are operators of their own, alike in both; replays run as "
        "the run did.",
        see="docs/scaling.md",
    ),
)
