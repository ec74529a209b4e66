"""Which layers FP8 makes faster, by measuring them where they will run.

Small layers are slower in FP8: their casts and launches cost more than the GEMMs save. Where the
line lies depends on the device, the number of tokens, and torch; so no table knows it, and
`convert(..., where_it_pays=True)` asks the device. A shape is measured once in a process.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from unclamp.errors import ConvertError
from unclamp.nn.converted import Converted
from unclamp.rule import LayerPlan

ROUNDS = 7
REPEATS = 5
"""Steps a round: a few milliseconds for a large layer."""


class Case(NamedTuple):
    """What decides how long a layer takes."""

    tokens: int
    in_features: int
    out_features: int
    has_bias: bool
    dtype: torch.dtype
    device: torch.device
    plan: str


Timer = Callable[[nn.Module, Case], float]
"""Returns the milliseconds of a forward and backward of a layer."""
Install = Callable[[nn.Linear, LayerPlan], None]
"""Converts one layer."""

_ratios: dict[tuple[Case, Timer], float] = {}


def check_tokens(tokens: int | None) -> int:
    """Return the tokens of a step; raise a ConvertError where nobody said."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConvertError(
            "where_it_pays measures layers at the tokens of one step: expected tokens=batch * "
            f"sequence length, got {tokens!r}"
        )
    return tokens


def unprofitable(
    layers: Mapping[str, nn.Linear],
    plans: Mapping[str, LayerPlan],
    *,
    tokens: int,
    install: Install,
    timer: Timer | None = None,
) -> dict[str, str]:
    """Return the layers that FP8 does not make faster, and by how much it does not."""
    reasons = {}
    for fqn, layer in layers.items():
        case = Case(
            tokens, layer.in_features, layer.out_features, layer.bias is not None,
            layer.weight.dtype, layer.weight.device, _key(plans[fqn]),
        )  # fmt: skip
        ratio = _ratio(case, plans[fqn], install, timer or step_ms)
        if ratio < 1:
            reasons[fqn] = (
                f"FP8 does not pay: {ratio:.2f}x the speed of {str(case.dtype)[6:]} at "
                f"{tokens} tokens, {case.in_features} to {case.out_features}"
            )
    return reasons


def _ratio(case: Case, plan: LayerPlan, install: Install, timer: Timer) -> float:
    """Return how many times as fast a layer is in FP8."""
    key = (case, timer)
    if key not in _ratios:
        shape = (case.in_features, case.out_features, case.has_bias)
        plain, fp8 = (nn.Linear(*shape, device=case.device, dtype=case.dtype) for _ in range(2))
        install(fp8, plan)
        _ratios[key] = timer(plain, case) / timer(fp8, case)
    return _ratios[key]


def step_ms(layer: nn.Module, case: Case) -> float:
    """Return the median time of a forward and backward, by the device's own clock on a GPU."""
    options = {"device": case.device, "dtype": case.dtype}
    x = torch.randn(case.tokens, case.in_features, **options, requires_grad=True)
    grad = torch.randn(case.tokens, case.out_features, **options)

    def steps() -> None:
        for _ in range(REPEATS):
            layer(x).backward(grad)

    with torch.enable_grad():
        steps()  # compile kernels, choose algorithms
        if isinstance(layer, Converted):
            layer.sites.ledger.update()  # scales that are not measured yet cost a second read
        return statistics.median(_timed(steps, case.device) for _ in range(ROUNDS)) / REPEATS


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def _key(plan: LayerPlan) -> str:
    return repr((plan.operands, plan.gemms, plan.smooth))
