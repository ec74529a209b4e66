"""Which kernels would run on a device, for each scaling and granularity: asked of who decides it.

Nothing is launched: `numerics.paths` says what casts a tensor, and `numerics.gpu.gemm` how a GEMM
of given formats and granularities is done. Sizes are multiples of 128, as blocks want them.
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unclamp.errors import UnclampWarning
from unclamp.formats import E4M3FN, E5M2
from unclamp.numerics.gpu import architecture
from unclamp.numerics.gpu.gemm import Given, plan_gemm
from unclamp.numerics.paths import Path, path_of
from unclamp.scaling import Delayed, Dynamic, Guarded, Scaling, Static, parse_granularity
from unclamp.traps.answers import one_line

SIZE = 4096
EMULATED = "float32, of dequantised values"
ROUTES = {
    "tensor": "scaled_mm, scales of tensors",
    "row": "scaled_mm, scales of rows",
    "block": "scaled_mm, scales of blocks",
}
HOW = {Dynamic.kind: ", amax first", Guarded.kind: ", again where it would clamp"}
"""What a kind of scaling adds to a cast."""
KINDS: tuple[type[Scaling], ...] = (Dynamic, Delayed, Guarded, Static)
GRANULARITIES = (("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("mx", "mx"))
"""Those of input and output gradient, and of the weight."""


@dataclass(frozen=True, kw_only=True)
class KernelAnswer:
    """What runs for one scaling and granularity of a layer's operands.

    Attributes:
        scaling: Kind of scaling.
        granularity: Of input and output gradient; of the weight too, if it has another.
        cast: What casts.
        output: How the GEMM of the output is done, e4m3fn by e4m3fn.
        grad_input: That of the input's gradient, e5m2 by e4m3fn.
        grad_weight: That of the weight's gradient, e5m2 by e4m3fn.
    """

    scaling: str
    granularity: str
    cast: str
    output: str
    grad_input: str
    grad_weight: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def kernels_by_scaling(device: str) -> tuple[KernelAnswer, ...]:
    """Return what runs on a device, for each kind of scaling and each granularity."""
    return tuple(
        KernelAnswer(
            scaling=kind.kind,
            granularity=x if x == w else f"{x}, weight {w}",
            cast=cast_of(device, x) + HOW.get(kind.kind, ""),
            output=gemm_of(device, Given(E4M3FN.name, x), Given(E4M3FN.name, w)),
            grad_input=gemm_of(device, Given(E5M2.name, x), Given(E4M3FN.name, w)),
            grad_weight=gemm_of(device, Given(E5M2.name, x), Given(E4M3FN.name, x)),
        )
        for kind in KINDS
        for x, w in GRANULARITIES
    )


def cast_of(device: str, granularity: str) -> str:
    """Return what casts a matrix of bfloat16 in this granularity."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnclampWarning)
            path = path_of(torch.ones(16, 16, dtype=torch.bfloat16, device=device))
        if path is Path.TRITON and granularity != "tensor":
            from unclamp.numerics.gpu.cast_blocks import tiling  # noqa: PLC0415 - loads Triton

            if tiling(SIZE, SIZE, parse_granularity(granularity).block) is None:
                path = Path.PLAIN
        return path.value
    except Exception as error:
        return one_line(error)


def gemm_of(device: str, a: Given, b: Given) -> str:
    """Return how a GEMM of operands like these is done."""
    if not device.startswith("cuda"):
        return EMULATED
    try:
        plan = plan_gemm(a, b, m=SIZE, n=SIZE, k=SIZE, arch=architecture(torch.device(device)))
    except Exception as error:
        return one_line(error)
    return ROUTES.get(plan.route, f"bfloat16, of dequantised values: {plan.why}")
