"""What torch.compile changes in the numbers of bfloat16 code."""

import shutil

import torch

from unclamp.traps.trap import Between, Documented, Trap


def fused_in_float32(device):
    """Compile three bfloat16 operations, also with eager's casts emulated."""
    from torch._inductor import config  # noqa: PLC0415 - takes long

    seeded = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1 << 14, generator=seeded).bfloat16().to(device)

    def fused(x, y):
        return (x * y + x) * y

    facts = {}
    for emulate in (False, True):
        options = {"emulate_precision_casts": emulate}
        with config.patch(cpp_cache_precompile_headers=False):  # they take long
            compiled = torch.compile(fused, options=options)  # pyright: ignore
            differ = compiled(x, y) != fused(x, y)
        facts[f"differ, emulate={emulate}"] = differ.float().mean().item()
        torch._dynamo.reset()
    return facts


def needs_compiler(device: str) -> str | None:
    """Say that torch.compile finds no C++ compiler, where there is none."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "torch.compile needs a C++ compiler"
    return None


_DIFFERS = Between(low=0.2, high=0.6)

TRAPS = (
    Trap(
        name="compile-keeps-float32",
        belief="`torch.compile` gives the numbers of eager mode, faster.",
        truth="Fused bfloat16 operations keep float32 between them: 40 % of the elements differ. "
        "`emulate_precision_casts` rounds as eager does; a CPU takes notice of it since torch "
        "2.13.",
        experiment=fused_in_float32,
        devices=("cpu", "cuda"),
        apart=True,
        needs=needs_compiler,
        documented=(
            Documented(
                before=(2, 13),
                expected={"differ, emulate=False": _DIFFERS, "differ, emulate=True": _DIFFERS},
            ),
            Documented(
                since=(2, 13),
                expected={"differ, emulate=False": _DIFFERS, "differ, emulate=True": 0.0},
            ),
        ),
        cost="Activations, amaxes and so scales differ between a compiled run and its eager "
        "replay; no bug need be there.",
        remedy="Casts and their counts are operators of their own, alike in both; replays run as "
        "the run did.",
        see="docs/scaling.md",
    ),
)
