"""What it costs a step to measure what clamping took from a weight's gradient, on one thread.

One layer, forward and backward, of which a share of the tokens has a gradient that clamps in each
step: not measured, measured as between inspected steps, and measured whatever it costs.
`python -m bench.gradients`.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

import unclamp
from bench.timing import compare
from unclamp.nn import find_ledgers
from unclamp.nn.update import Inspection

LAYERS = {  # tokens, in features and out features, and the shares of tokens that clamp
    (2048, 512): (0.0, 0.005, 1 / 8, 1.0),
    (64, 2048): (1 / 32, 1 / 4, 1.0),
}
MODES: dict[str, Inspection] = {
    "not measured": "never",
    "between inspected steps": "gradients",
    "or_clamped": "clamped",
}
HEAVY = 200
"""Times the normal gradient, of which 57,344 / 512 = 112 fits."""


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds and ratios by layer and share."""
    return {
        title: compare(title, {name: _step(*layer, share, mode) for name, mode in MODES.items()})
        for layer, shares in LAYERS.items()
        for share in shares
        for title in [f"{layer[0]:,} tokens, {layer[1]} x {layer[1]}, {share:.1%} clamp"]
    }


def _step(tokens: int, width: int, share: float, mode: Inspection) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = nn.Linear(width, width)
    unclamp.convert(layer, unclamp.Recipe(grad_output=unclamp.Static(scale=512.0)))
    (ledger,) = find_ledgers(layer)
    ledger.inspect(mode)
    ledger.subscribe(lambda update: None)
    x, dy = torch.randn(tokens, width), torch.randn(tokens, width)
    dy[: round(share * tokens)] *= HEAVY

    def step() -> None:
        layer(x).backward(dy)
        layer.weight.grad = None
        ledger.update()

    return step


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.gradients", description=__doc__).parse_args()
    torch.set_num_threads(1)
    measure()
