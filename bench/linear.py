"""One linear layer, forward, backward and ledger: time, and memory kept and at the peak."""

import argparse
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

import unclamp
from bench.memory import peak_mib
from bench.timing import compare
from unclamp.scaling import PerBlock, PerRow

TOKENS, IN_FEATURES, OUT_FEATURES = 2048, 1024, 4096
PLAIN, EMULATED = "fp32 nn.Linear", "torchao tensorwise, emulated"
_TILES = unclamp.Dynamic(PerBlock(1, 128))
RECIPES = {
    "unclamp delayed, all counters": unclamp.Recipe.uniform(unclamp.Delayed()),
    "unclamp guarded, all counters": unclamp.Recipe.uniform(unclamp.Guarded()),
    "unclamp dynamic, all counters": unclamp.Recipe.uniform(unclamp.Dynamic()),
    "unclamp rows, all counters": unclamp.Recipe.uniform(unclamp.Dynamic(PerRow())),
    "unclamp blocks, all counters": unclamp.Recipe(
        input=_TILES, weight=unclamp.Dynamic(PerBlock(128, 128)), grad_output=_TILES
    ),
}
"""Blocks are those of DeepSeek-V3: 1x128 of what tokens have, and 128x128 of a weight."""
TARGETS = dict(zip(RECIPES, (1.06, 1.06, 1.08, 1.20, 1.20), strict=True))


def layers(only: str | None = None) -> dict[str, nn.Module]:
    """Return the layers to compare, fp32 first; torchao's emulation where it is installed.

    With `only`, that one alone, and nothing else is made or imported.
    """
    names = [PLAIN, *RECIPES]
    if only is not None:
        names = [only]
    elif importlib.util.find_spec("torchao") is not None:
        names.append(EMULATED)
    return {name: _layer(name) for name in names}


def _layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES))
    if name in RECIPES:
        unclamp.convert(layer, RECIPES[name])
    elif name == EMULATED:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]  # noqa: PLC0415
            Float8LinearConfig,
            convert_to_float8_training,
        )

        return convert_to_float8_training(layer, config=Float8LinearConfig(emulate=True))
    return layer


def step(model: nn.Module) -> Callable[[], None]:
    """Return one optimizer step on a fixed batch."""
    x = torch.randn(TOKENS, IN_FEATURES, requires_grad=True)
    grad = torch.randn(TOKENS, OUT_FEATURES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).backward(grad)
        optimizer.step()

    return run


def kept_bytes(model: nn.Module) -> int:
    """Return what the forward saves for backward, parameters left out."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(TOKENS, IN_FEATURES, requires_grad=True))
    return sum(kept.values())


def measure() -> dict[str, dict[str, float]]:
    """Time each layer; print what it keeps for backward and the peak of a step's memory."""
    found = layers()
    results = compare(
        f"Linear {IN_FEATURES} -> {OUT_FEATURES}, {TOKENS} tokens, forward and backward",
        {name: step(layer) for name, layer in found.items()},
        target=TARGETS,
    )
    print(
        "\nkept for backward (the weight aside), and the peak of a step in a process of its own, "
        "target 1.25x of fp32's"
    )
    for name, layer in found.items():
        results[name] |= {"kept_bytes": kept_bytes(layer), "peak_mib": peak_mib(name)}
        print(f"{name:36} {results[name]['kept_bytes'] / 2**20:6.1f} MiB "
              f"{results[name]['peak_mib']:8.0f} MiB")  # fmt: skip
    return results


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__).parse_args()
    measure()
