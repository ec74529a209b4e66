"""What torch's scaled matmul accepts on a device: each case is a tiny product, tried.

Operands are small integers and scales are powers of two, so that every sum is exact and an
accepted product can be checked to the bit.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclamp.doctor.casts import one_line
from unclamp.formats import FORMATS
from unclamp.numerics.cast import torch_dtype

ACCEPTED = "accepted"
REJECTED = "rejected"
WRONG = "wrong result"
NO_CHANGE = "changes nothing"
FAST_K = 4096


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A product `[32, k] @ [k, 32]`; the second operand is column-major unless said."""

    a: str = "e4m3fn"
    b: str = "e4m3fn"
    k: int = 64
    row_scales: bool = False
    row_major: bool = False


@dataclass(frozen=True, kw_only=True)
class MatmulAnswer:
    """Whether a case was accepted; `detail` is the error, or what else was seen."""

    case: str
    outcome: str
    detail: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


CASES = {
    "per-tensor scales": Problem(),
    "row scales": Problem(row_scales=True),
    "K not a multiple of 16": Problem(k=40),
    "row-major second operand": Problem(row_major=True),
    **{f"{a} x {b}": Problem(a=a, b=b) for a in FORMATS for b in FORMATS},
}


def api() -> str:
    """Return the name of the function that is probed."""
    return "torch.nn.functional.scaled_mm"


def probe_matmul(device: str) -> tuple[MatmulAnswer, ...]:
    """Try every case on a device, the format pairs and fast accumulation last."""
    tried = [_try_product(case, problem, device) for case, problem in CASES.items()]
    return (*tried, _try_fast_accumulation(device))


def _try_product(case: str, problem: Problem, device: str) -> MatmulAnswer:
    a = _integers(32, problem.k, 7)
    b = _integers(problem.k, 32, 3)
    rows = 32 if problem.row_scales else 1
    scale_a = torch.exp2(_integers(rows, 1, 3))
    scale_b = torch.exp2(_integers(1, rows, 7))
    try:
        got = _multiply(problem, a, b, scale_a, scale_b, device)
    except Exception as error:
        return MatmulAnswer(case=case, outcome=REJECTED, detail=one_line(error))
    right = torch.equal(got, (a @ b) * scale_a * scale_b)
    return MatmulAnswer(case=case, outcome=ACCEPTED if right else WRONG)


def _try_fast_accumulation(device: str) -> MatmulAnswer:
    """Sum many positive products both ways: with fast accumulation a Hopper GPU loses bits."""
    problem, one = Problem(k=FAST_K), torch.ones(1, 1)
    a = 1 + torch.arange(32 * FAST_K).reshape(32, FAST_K) % 8 / 8
    try:
        slow = _multiply(problem, a, a.t(), one, one, device)
        fast = _multiply(problem, a, a.t(), one, one, device, use_fast_accum=True)
    except Exception as error:
        return MatmulAnswer(case="use_fast_accum", outcome=REJECTED, detail=one_line(error))
    change = float(((fast - slow) / slow).abs().max())
    detail = f"changes sums over K = {FAST_K} by up to {100 * change:.2g} %"
    return MatmulAnswer(
        case="use_fast_accum", outcome=ACCEPTED, detail=detail if change else NO_CHANGE
    )


def _multiply(
    problem: Problem,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    device: str,
    *,
    use_fast_accum: bool = False,
) -> Tensor:
    """Return `(a * scale_a) @ (b * scale_b)` by the scaled matmul, as float32 on the CPU."""
    a = a.to(torch_dtype(FORMATS[problem.a])).to(device)
    b = b.to(torch_dtype(FORMATS[problem.b]))
    b = b.contiguous().to(device) if problem.row_major else b.t().contiguous().to(device).t()
    scale_a, scale_b = scale_a.to(device), scale_b.to(device)
    recipe = F.ScalingType.RowWise if problem.row_scales else F.ScalingType.TensorWise
    product = F.scaled_mm(a, b, scale_a, recipe, scale_b, recipe, use_fast_accum=use_fast_accum)
    return product.cpu().float()


def _integers(rows: int, columns: int, stride: int) -> Tensor:
    """Return a fixed pattern of -2 .. 2: every format holds it, bfloat16 holds the sums."""
    return (torch.arange(rows * columns) * stride // 2 % 5 - 2).reshape(rows, columns).float()
