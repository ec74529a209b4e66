"""One product by torch's scaled matmul, whose right result is known to the bit.

Operands are small integers and scales are powers of two, so that every sum is exact and an
accepted product can be checked. `unclamp.doctor` tries all of its cases by these lines too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unclamp.formats import FORMATS
from unclamp.numerics import torch_dtype

ACCEPTED = "accepted"
REJECTED = "rejected"
WRONG = "wrong result"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A product `[32, k] @ [k, 32]`; the second operand is column-major unless said."""

    a: str = "e4m3fn"
    b: str = "e4m3fn"
    k: int = 64
    row_scales: bool = False
    row_major: bool = False


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Whether a product was accepted and right; `error` is what was raised."""

    outcome: str
    error: Exception | None = None


def attempt(problem: Problem, device: str) -> Attempt:
    """Try a product; what raises is an answer."""
    a = _integers(32, problem.k, 7)
    b = _integers(problem.k, 32, 3)
    rows = 32 if problem.row_scales else 1
    scale_a = torch.exp2(_integers(rows, 1, 3))
    scale_b = torch.exp2(_integers(1, rows, 7))
    try:
        got = multiply(problem, a, b, scale_a, scale_b, device)
    except Exception as error:
        return Attempt(outcome=REJECTED, error=error)
    right = torch.equal(got, (a @ b) * scale_a * scale_b)
    return Attempt(outcome=ACCEPTED if right else WRONG)


def multiply(
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


def eighths(k: int) -> Tensor:
    """Return `[32, k]` of 1 to 1.875: products of one sign, whose sums show how they are added."""
    return 1 + torch.arange(32 * k).reshape(32, k) % 8 / 8


def _integers(rows: int, columns: int, stride: int) -> Tensor:
    """Return a fixed pattern of -2 .. 2: every format holds it, bfloat16 holds the sums."""
    return (torch.arange(rows * columns) * stride // 2 % 5 - 2).reshape(rows, columns).float()
