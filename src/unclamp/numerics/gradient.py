"""What clamping a gradient does to the gradient of the weight that is made of it.

With tokens T, out features N and in features K, and a hat for what went through FP8:

    taken    [T, N] = x - sign(x) * max / scale where an element was clamped, else 0
    change   [N, K] = taken.T @ input_hat
    weight's gradient without clamping = the gradient as it was computed + change

Nothing is rounded anew: the change is that of clamping alone. The result is four sums that travel
and add up with a closer look (`inspection`):

    GRADIENTS         gradients looked at
    GRADIENT_SQUARE   sum of squares of the weight's gradient as it was computed
    CHANGE_SQUARE     sum of squares of the change
    CHANGE_PRODUCT    sum of products of both

The last three are of the calls in which something was clamped; of others nobody computes them.
On a CPU only the tokens with a clamped element are multiplied. Elsewhere the host does not know
which these are, and all of them are, in bfloat16 where the gradient has half precision.

Who looks at every step asks for `few_tokens`: where more than `FEW` of the tokens have a clamped
element, the three sums are NaN, which stands for "not measured" and stays so in a sum of calls. It
keeps the product within that share of the one that made the gradient.
"""

import torch
from torch import Tensor

from unclamp.numerics.blocks import orient, spread
from unclamp.numerics.cast import dequantize_codes
from unclamp.numerics.gemm import values_of
from unclamp.numerics.inspection import (
    CHANGE_PRODUCT,
    DETAILS,
    GRADIENT_SQUARE,
    GRADIENTS,
)
from unclamp.numerics.record import CastPlan, GemmOperand
from unclamp.numerics.stats import Stat

FEW = 1 / 8
"""Share of the tokens."""
ALWAYS_FEW = 16
"""As many tokens are few in any batch: beside the casts of a weight their product is small."""
CHUNK = 1 << 15
"""Elements that are added up at a time on a CPU: 256 KiB in float64, which caches hold. Through
whole float64 copies the sums took longer than the GEMM, where tokens are few."""


def look_at_gradient(
    dy: Tensor,
    scale_inv: Tensor,
    stats: Tensor,
    plan: CastPlan,
    axis: int,
    x: GemmOperand,
    grad: Tensor,
    smooth: Tensor | None,
    *,
    few_tokens: bool = False,
) -> Tensor:
    """Return the vector of one weight's gradient, float64 `[DETAILS]`.

    Args:
        dy: The gradient of the product's output that was cast, `[T, N]`.
        scale_inv: As in `Quantized`, of the cast that the weight's gradient was made of.
        stats: Its statistics.
        plan: How it was cast.
        axis: As in `Quantized`.
        x: The input as it was multiplied, `[T, K]`, contracted along T.
        grad: The weight's gradient, `[N, K]`.
        smooth: What the columns of the weight's gradient are divided by; None for nothing.
        few_tokens: Measure only where few tokens have a clamped element; NaN elsewhere. It is for
            a CPU.

    Numerics: Inf and NaN elements were not clamped and take nothing away. A weight's gradient that
    is not finite makes its sums NaN or Inf.
    """
    if dy.device.type == "cpu":
        return _vector(_sums_on_cpu(dy.detach(), scale_inv, stats, plan, axis, x, grad, smooth,
                                    few_tokens=few_tokens))  # fmt: skip
    change = change_of(dy.detach(), scale_inv, plan, axis, x)
    # A call that clamped nothing adds nothing, whatever the device.
    return _vector(torch.where(stats[Stat.SATURATED] > 0, _sums(grad.detach(), change, smooth), 0))


def _sums_on_cpu(
    dy: Tensor, scale_inv: Tensor, stats: Tensor, plan: CastPlan, axis: int, x: GemmOperand,
    grad: Tensor, smooth: Tensor | None, *, few_tokens: bool,
) -> Tensor:  # fmt: skip
    sums = torch.zeros(3, dtype=torch.float64)
    if not stats[Stat.SATURATED] > 0:
        return sums
    tokens = _clamped_tokens(dy, inverse_of_each(scale_inv, dy, plan, axis), plan)
    if few_tokens and len(tokens) > max(ALWAYS_FEW, FEW * len(dy)):
        return sums.fill_(torch.nan)
    change = change_of(dy, scale_inv, plan, axis, x, tokens=tokens)
    rows = max(1, CHUNK // max(1, grad.shape[1]))
    for some, changed in zip(grad.detach().split(rows), change.split(rows), strict=True):
        sums += _sums(some, changed, smooth)
    return sums


def _sums(grad: Tensor, change: Tensor, smooth: Tensor | None) -> Tensor:
    """Return sums of squares of the gradient and of the change, and that of their products."""
    computed, changed = grad.double(), change.double()
    if smooth is not None:
        changed = changed / smooth
    computed, changed = computed.flatten(), changed.flatten()
    # A dot product makes no copy of its own.
    pairs = ((computed, computed), (changed, changed), (computed, changed))
    return torch.stack([torch.dot(one, other) for one, other in pairs])


def _vector(sums: Tensor) -> Tensor:
    """Return a closer look that holds these sums and nothing else."""
    looked = torch.zeros(DETAILS, dtype=torch.float64, device=sums.device)
    looked[GRADIENTS] = 1
    looked[GRADIENT_SQUARE : CHANGE_PRODUCT + 1] = sums
    return looked


def change_of(
    dy: Tensor,
    scale_inv: Tensor,
    plan: CastPlan,
    axis: int,
    x: GemmOperand,
    *,
    tokens: Tensor | None = None,
) -> Tensor:
    """Return what clamping took from the weight's gradient, `[N, K]`.

    Without the numbers of the `tokens` that matter all are multiplied, and no element is looked at
    by the host.
    """
    if torch.is_autocast_enabled(dy.device.type):  # the product would leave float32
        with torch.autocast(dy.device.type, enabled=False):
            return change_of(dy, scale_inv, plan, axis, x, tokens=tokens)
    each_inv = inverse_of_each(scale_inv, dy, plan, axis)
    if tokens is None:
        dtype = torch.float32 if dy.dtype in (torch.float32, torch.float64) else torch.bfloat16
        taken = _taken(dy, each_inv, plan).to(dtype)
        return taken.t() @ values_of(x).t().to(dtype)
    some_inv = each_inv[tokens] if each_inv.shape[0] > 1 else each_inv
    return _taken(dy[tokens], some_inv, plan).t() @ _values_at(x, tokens)


def inverse_of_each(scale_inv: Tensor, x: Tensor, plan: CastPlan, axis: int) -> Tensor:
    """Return 1 / scale of each element: a matrix that broadcasts against `x`."""
    if plan.granularity.is_whole:
        return scale_inv.reshape(1, 1)
    each = spread(scale_inv, orient(x, axis).shape, plan.granularity.block)
    return each if axis % 2 else each.t()


def _clamped_tokens(dy: Tensor, each_inv: Tensor, plan: CastPlan) -> Tensor:
    """Return the numbers of tokens that may have a clamped element, and of none with a NaN."""
    # Two passes: `torch.aminmax` over rows takes fourteen times as long.
    largest = torch.maximum(dy.amax(1), -dy.amin(1)).to(torch.float32)
    return (largest > plan.format.max * each_inv.amin(1)).nonzero().squeeze(1)


def _taken(dy: Tensor, each_inv: Tensor, plan: CastPlan) -> Tensor:
    """Return what clamping took away of each element, float32."""
    values = dy.to(torch.float32)
    scaled = values.abs() * each_inv.reciprocal()
    is_clamped = (scaled > plan.format.overflow_limit) & values.isfinite()
    return torch.where(is_clamped, values - torch.copysign(plan.format.max * each_inv, values), 0)


def _values_at(x: GemmOperand, tokens: Tensor) -> Tensor:
    """Return the input of some tokens as it was multiplied, float32."""
    if x.scale_inv is None:
        return x.tensor[tokens].to(torch.float32)
    if not x.granularity.is_whole:
        return values_of(x).t()[tokens]
    codes = x.tensor.view(torch.uint8)[tokens].view(x.tensor.dtype)
    return dequantize_codes(codes, x.scale_inv, granularity=x.granularity, axis=1)
