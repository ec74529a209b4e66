"""What FP8 would lose, counted beside a product that is computed without it.

Autograd's own graph computes; a hook on its result casts the gradient that comes back, counts, and
drops the codes. So everything that the plain layer can do the counted one can: second
derivatives, vmap, jvp, tracing. Where tensors are stand-ins for others (vmap, jvp, a trace) there
is nothing to cast: such a forward is not counted, and one warning says so.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore
from torch.autograd import forward_ad

from unclamp.errors import UnclampWarning
from unclamp.names import Gemm, Role
from unclamp.nn.agreed import WHOLE, Splits, smoothing
from unclamp.nn.casts import Hat, Seen
from unclamp.nn.operands import Operands
from unclamp.nn.priced import SHARES, Wanted, with_prices
from unclamp.nn.priced_plain import PlainPricing, has_input_at_hand, plain_pricing
from unclamp.nn.update import LOOKS_AT_ALL

COUNTED_EVERY = 10
"""Updates between two in which what is only observed is counted, where nobody inspects casts."""


def is_counted(operands: Operands) -> bool:
    """Whether a product that computes plainly, and casts to count, is counted now.

    One that is computed in FP8 later (a warm-up), or of an observed model, always. One that is only
    observed whatever its recipe, which has its operands made for it: where a `Recorder` inspects
    every cast, or every `COUNTED_EVERY` updates where nobody asks for closer looks: as many steps,
    where nothing else of the model is cast, and steps without a cast update nothing.
    """
    if operands.is_plain:
        return False
    if not operands.only_observed:
        return True
    if operands.inspection == "never":
        ledger = operands.ledger
        return ledger.updates % COUNTED_EVERY == 0 or ledger.clock.idle >= COUNTED_EVERY - 1
    return operands.inspection in LOOKS_AT_ALL


def count(
    operands: Operands,
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    commit: Literal["in backward", "now"],
    splits: Splits = WHOLE,
    part: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return a product's output, and have its casts counted: now, or when its backward runs.

    Of a product that is spread over ranks, `x` and `weight` are this rank's parts, `splits` says
    of what, and `part` takes its part of the gradient out of that of the output.
    """
    if any(is_stand_in(t) for t in (output, x, weight)):
        say_not_counted()
        return output
    # A batch of products (attention) is no one product of these two matrices: it has no price.
    is_one = part is None and operands.weight_name is not None
    with torch.no_grad():
        held, pricing = _cast_forward(
            operands, x, weight, splits, comes_back=commit == "in backward" and is_one
        )
    if commit == "now":
        operands.commit(held)
        return output
    wanted: dict[Gemm, bool] = {
        "grad_input": x.requires_grad,
        "grad_weight": weight.requires_grad,
    }
    needs: list[Gemm] = [gemm for gemm, is_wanted in wanted.items() if is_wanted]
    counted: weakref.ref[Tensor] | None = None

    def hook(dy: Tensor) -> None:
        nonlocal counted
        # The second run of a zero-bubble schedule hands in the very gradient of the first.
        if is_stand_in(dy) or (counted is not None and counted() is dy):
            return
        counted = weakref.ref(dy)
        with torch.no_grad():
            dy = dy.detach() if part is None else part(dy.detach())
            tokens = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
            hat = operands.cast("grad_output", tokens, needs, splits=splits)
            seen: dict[Role, Seen] = {**held, "grad_output": operands.seen("grad_output", hat)}
            operands.commit(seen if pricing is None else with_prices(seen, pricing.looks(tokens)))
        held.clear()  # a graph that is kept makes one cast more, and not three

    output.register_hook(hook)
    return output


def _cast_forward(
    operands: Operands, x: Tensor, weight: Tensor, splits: Splits, *, comes_back: bool
) -> tuple[dict[Role, Seen], PlainPricing | None]:
    tokens = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    matrix = weight.detach()
    if torch.is_autocast_enabled(x.device.type) and not operands.smooth:
        tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
    plain, smooth = (tokens, matrix), None
    if operands.smooth:
        smooth = smoothing(operands, tokens, splits)
        tokens, matrix = tokens.to(torch.float32) * smooth, matrix.to(torch.float32) / smooth
    x_gemms: list[Gemm] = ["output", "grad_weight"] if weight.requires_grad else ["output"]
    w_gemms: list[Gemm] = ["output", "grad_input"] if x.requires_grad else ["output"]
    x_hat = operands.cast("input", tokens, x_gemms, splits=splits)
    w_hat = operands.cast("weight", matrix, w_gemms, splits=splits)
    seen: dict[Role, Seen] = {
        "input": operands.seen("input", x_hat),
        "weight": operands.seen("weight", w_hat),
    }
    wanted: dict[Role, Wanted] = dict.fromkeys(SHARES, "never")
    if comes_back:
        wanted["input"] = "comes"
        # Where backward does not have the input at hand, it would be kept for this alone.
        if weight.requires_grad and has_input_at_hand(operands, x):
            wanted["weight"] = "comes"
    hats: dict[Role, Hat] = {"input": x_hat, "weight": w_hat}
    return seen, plain_pricing(operands, seen, hats, plain, wanted, smooth)


def is_stand_in(x: Tensor) -> bool:
    """Whether a tensor stands for others: under vmap, grad or jvp of torch.func, or in a trace."""
    if torch.compiler.is_compiling():
        return False
    # torch has no public question for the second one.
    if torch.jit.is_tracing() or functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@functools.cache
def say_not_counted() -> None:
    """Tell once in a process that some forwards are computed and not counted."""
    warnings.warn(
        "a product under torch.func, forward-mode differentiation or tracing is computed as the "
        "plain layer does, and its casts are not counted",
        UnclampWarning,
        stacklevel=2,
    )
