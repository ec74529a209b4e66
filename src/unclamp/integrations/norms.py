"""The norm of gradients, for trainers that do not say it: as torch's own clipping computes it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def grad_norm(optimizer: Optimizer) -> Tensor | None:
    """Return the 2-norm of the gradients that an optimizer holds; None where there are none.

    It is what `torch.nn.utils.clip_grad_norm_` returns for its parameters, waits for no device,
    and takes a pass over the gradients. NaN and Inf stay.
    """
    parameters = (each for group in optimizer.param_groups for each in group["params"])
    gradients = [each.grad for each in parameters if each.grad is not None]
    if not gradients:
        return None
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def unscaled(norm: Tensor, optimizer: Optimizer, scaler: Any) -> Tensor:
    """Return a norm without a gradient scaler's factor, where the optimizer's step takes it away.

    Such optimizers (fused ones) unscale in their kernel, so until then the gradients are scaled.
    """
    factor = getattr(scaler, "_scale", None)
    is_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
    return norm / factor.to(norm.device) if is_scaled and factor is not None else norm


def together(norms: Iterable[Tensor]) -> Tensor | None:
    """Return the norm over several optimizers' gradients; None of none."""
    found = list(norms)
    if len(found) <= 1:
        return found[0] if found else None
    return torch.linalg.vector_norm(torch.stack([each.to(found[0]) for each in found]))
