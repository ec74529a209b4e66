"""The cast of a gradient: an Inf in it stays to be seen in all that is made of it."""

import torch
from torch import Tensor

from unclamp.names import Gemm
from unclamp.nn.agreed import Splits
from unclamp.nn.casts import Hat, Seen
from unclamp.nn.first import first_scale
from unclamp.nn.groups import Groups
from unclamp.nn.operands import Operands
from unclamp.nn.update import LOOKS_AT_ALL
from unclamp.numerics import GemmOperand, Quantized, Stat
from unclamp.numerics.gpu import host_may_look
from unclamp.numerics.operators import gemm, look_at_weight_gradient


def cast_gradient(
    operands: Operands, dy: Tensor, gemms: list[Gemm], together: Groups, splits: Splits
) -> tuple[Hat, Seen]:
    """Cast a gradient so that an Inf in it stays to be seen in what is made of it.

    The cast saturates Inf, and whoever skips steps whose gradients are not finite would take an
    overflow for a good step. On a CPU NaN takes its place before the cast, and ends in the rows
    that it belongs to. Elsewhere nobody waits for the device to learn of an Inf, and a pass over
    each gradient would cost as much as its cast: NaN takes the place of the scale, and ends in all
    that is made of the gradient.
    """
    is_cpu, is_compiling = host_may_look(dy), torch.compiler.is_compiling()
    if is_cpu and is_compiling:
        dy = torch.where(dy.isfinite(), dy, torch.nan)
    scale = first_scale(operands, "grad_output", dy, together)
    # Where the kernel does it, no more is launched. A closer look wants the scale as it was.
    shows = not (is_cpu or is_compiling) and operands.inspection in ("never", "gradients")
    hat = operands.cast("grad_output", dy, gemms, scale=scale, splits=splits, shows_wild=shows)
    seen = operands.seen("grad_output", hat)
    if seen.stats is None or (is_cpu and is_compiling):
        return hat, seen
    if not is_cpu:
        if all(q.shows_wild for q in hat.casts.values()):
            return hat, seen
        wild = seen.stats[Stat.NONFINITE] > 0
        return Hat(dy, {axis: as_nan(q, wild) for axis, q in hat.casts.items()}), seen
    if (
        seen.stats.tolist()[Stat.NONFINITE] > 0
    ):  # which is rare, so that nothing is spent on it before
        shown_wild = torch.where(dy.isfinite(), dy, torch.nan)
        # Other ranks may have nothing wild, and would not come by to agree again.
        hat = operands.cast("grad_output", shown_wild, gemms, scale=scale, agreed=hat.agreed)
    return hat, seen


def with_look(
    operands: Operands,
    seen: Seen,
    dy: Tensor,
    dy_hat: Hat,
    x_hat: GemmOperand,
    grad: Tensor,
    smooth: Tensor | None,
) -> Seen:
    """Return what was seen of a gradient, and what its clamping did to the weight's gradient.

    Where NaN took the place of an Inf, that gradient says nothing: one is measured that has the
    largest value there, as the cast makes it. It is rare, so that nothing is spent on it before.
    """
    if dy_hat.tensor is not dy and host_may_look(dy) and not torch.compiler.is_compiling():
        if operands.inspection == "never":
            return seen
        dy_hat = operands.cast("grad_output", dy, ["grad_weight"], agreed=dy_hat.agreed)
        dtype = grad.dtype if smooth is None else torch.float32
        grad = gemm(dy_hat.along(0), x_hat, None, operands.modes["grad_weight"], dtype)
        grad = grad if smooth is None else grad / smooth
    q = dy_hat.casts.get(0)
    if q is None or operands.inspection == "never":
        return seen
    if operands.inspection == "gradients" and dy_hat.tensor.device.type != "cpu":
        return seen
    few, some = operands.inspection == "gradients", operands.inspection not in LOOKS_AT_ALL
    look = look_at_weight_gradient(
        dy_hat.tensor, q, x_hat, grad, smooth, only_clamped=some, few_tokens=few
    )
    if look is None:
        return seen
    return seen._replace(details=look if seen.details is None else seen.details + look)


def as_nan(q: Quantized, wild: Tensor) -> Quantized:
    """Return a cast that stands for NaN alone if it is `wild`."""
    return q._replace(scale_inv=torch.where(wild, torch.nan, q.scale_inv), values=None)
