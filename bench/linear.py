"""One linear layer, forward, backward and ledger: time, and memory kept and at the peak."""

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

import unclamp
from bench.memory import peak_mib
from bench.timing import compare

TOKENS, IN_FEATURES, OUT_FEATURES = 2048, 1024, 4096
KINDS = (unclamp.Delayed(), unclamp.Guarded(), unclamp.Dynamic())


def layers(only: str | None = None) -> dict[str, nn.Module]:
    """Return the layers to compare, fp32 first; torchao's emulation where it is installed.

    With `only`, that one alone.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES))
    found: dict[str, nn.Module] = {"fp32 nn.Linear": base}
    for kind in KINDS:
        layer = copy.deepcopy(base)
        unclamp.convert(layer, unclamp.Recipe.uniform(kind))
        found[f"unclamp {kind.kind}, all counters"] = layer
    if importlib.util.find_spec("torchao") is not None:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]  # noqa: PLC0415
            Float8LinearConfig,
            convert_to_float8_training,
        )

        config = Float8LinearConfig(emulate=True)
        layer = convert_to_float8_training(copy.deepcopy(base), config=config)
        found["torchao tensorwise, emulated"] = layer
    return found if only is None else {only: found[only]}


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
        target={"unclamp delayed, all counters": 1.10},
    )
    print("\nkept for backward (the weight aside), and the peak of a step in a process of its own")
    for name, layer in found.items():
        results[name] |= {"kept_bytes": kept_bytes(layer), "peak_mib": peak_mib(name)}
        print(f"{name:36} {results[name]['kept_bytes'] / 2**20:6.1f} MiB "
              f"{results[name]['peak_mib']:8.0f} MiB")  # fmt: skip
    return results
