"""The three GEMMs of a product, as parts of a node of autograd's graph; see `nn.product`.

A node may be one product (`Product`), or hold several (`nn.grouped`): what a product keeps from
its forward for its backward hangs on a `Part` of the node, and the tensors among it come back for
`save_for_backward`. Results are written to where they are wanted, if that is said.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unclamp.names import Gemm, Role
from unclamp.nn.agreed import WHOLE, Splits, smoothing
from unclamp.nn.casts import Hat, Seen
from unclamp.nn.first import first_scale
from unclamp.nn.gradient import cast_gradient, with_look
from unclamp.nn.groups import Groups
from unclamp.nn.layout import Axis
from unclamp.nn.noted import Doubt
from unclamp.nn.operands import Operands
from unclamp.nn.priced import SHARES, Wanted, has_prices, set_aside, with_prices
from unclamp.nn.split import asked, uncounted
from unclamp.numerics import CastPlan, GemmOperand, panels, plain_operand
from unclamp.numerics.operators import gemm, quantize_operand, sum_tokens

WANTS_A_VIEW = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Where a compiled function returns an operator's very result, torch 2.11 takes the gradient for
zeros. A view helps, at the price that nobody may write into it; 2.13 needs none."""
Commit = Literal["in backward", "now"] | None
"""When a forward's statistics reach the ledger; None: never, it is an evaluation."""
Saved = tuple[Any, ...]
"""Codes and scales of the input, those of the weight, the smoothing, and what prices want."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias; None of what nobody asks for."""
OUTPUT_ALONE: tuple[Gemm, ...] = ("output",)
ENTERED_BY_INPUT: tuple[Gemm, ...] = ("output", "grad_weight")
ENTERED_BY_WEIGHT: tuple[Gemm, ...] = ("output", "grad_input")
NOTHING: tuple[None, None] = (None, None)
"""Stands for an operand that backward does not need."""


class Meets(NamedTuple):
    """What is decided of a forward before anything is cast.

    Attributes:
        commit: When its statistics reach the ledger.
        evaluates: Whether its casts are counted apart.
        together: With whom it agrees on first scales.
        splits: How it is spread over ranks.
        is_part: Whether ranks have parts of its tensors.
    """

    commit: Commit
    evaluates: bool
    together: Groups = ()
    splits: Splits = WHOLE
    is_part: bool = False


class Product(torch.autograd.Function):
    """A product that is a node by itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operands: Operands, meets: Meets
    ) -> Tensor:
        """Return the output."""
        output, saved = run_forward(ctx, x, weight, bias, operands, meets, ctx.needs_input_grad)
        # Nothing of the codes may stay outside of `save_for_backward`, or checkpointing keeps it.
        ctx.save_for_backward(*saved)
        return output.view_as(output) if WANTS_A_VIEW and torch.compiler.is_compiling() else output

    # A second derivative would silently miss everything that goes through a cast: raise.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients that are asked for."""
        (dy,) = grad_outputs
        saved = ctx.saved_tensors  # once: under checkpointing each read unpacks, and may only once
        return *run_backward(ctx, saved, dy, dy, asked(ctx)), None, None


def run_forward(
    part: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Operands,
    meets: Meets,
    needs: tuple[bool, ...],
    out: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    """Return a product's output, and the tensors that its backward wants.

    Args:
        part: What is to be kept for backward hangs on it.
        x: Input `[T, K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.
        operands: The product's.
        meets: What is decided of it.
        needs: Whether input, weight and bias want a gradient.
        out: Where the output goes, `[T, N]` in the dtype of `x`; fresh memory without it.
    """
    needs_input, needs_weight = needs[:2]
    commit, evaluates, together, splits, is_part = meets
    # What may be trained by a backward has the bits of a training, whatever its mode.
    doubt = operands.doubt(weight) if evaluates and commit is None else None
    remakes = needs_input and doubt is None and operands.remakes_weight(weight, x.shape[0])
    x_gemms = ENTERED_BY_INPUT if needs_weight else OUTPUT_ALONE
    # A cast along the other axis is made in any case, to be counted.
    casts_once = not needs_input or (remakes and operands.square["weight"])
    w_gemms = OUTPUT_ALONE if casts_once else ENTERED_BY_WEIGHT
    output, x_hat, w_hat, smooth, w_scale = cast_and_multiply(
        operands, x, weight, bias, x_gemms, w_gemms, doubt, together, splits, out
    )

    # grad_weight will contract T, axis 0 of the input; grad_input N, axis 0 of the weight.
    kept_x = _kept(operands, "grad_weight", x, x_hat) if needs_weight else None
    kept_w = _kept(operands, "grad_input", weight, w_hat) if needs_input else None
    part.remade = operands.plans["weight"] if remakes else None
    if remakes:
        by = _scale_of(operands, w_hat) if w_scale is None else w_scale
        kept_w = GemmOperand(weight, by, w_hat.along(1).granularity)
    seen: dict[Role, Seen] = {
        "input": operands.seen("input", x_hat),
        "weight": operands.seen("weight", w_hat),
    }
    part.aside, kept = None, ()
    if commit is not None and has_prices(operands):
        hats: dict[Role, Hat] = {"input": x_hat, "weight": w_hat}
        plain: dict[Role, Tensor] = {"input": x, "weight": weight}
        wanted: dict[Role, Wanted] = dict.fromkeys(SHARES, "never")
        if commit == "in backward" and not (is_part or splits.told):
            wanted["input"] = "comes" if needs_input else "to be made"
            wanted["weight"] = "comes" if needs_weight else "never"
        part.aside, kept = set_aside(operands, seen, hats, plain, wanted, smooth)
    if commit == "now":
        operands.commit(seen)
    if evaluates:
        operands.evaluate(seen, weight)
    part.operands, part.commit, part.seen, part.meets = operands, commit, seen, (together, splits)
    part.counted = None, frozenset()
    part.grains = kept_x and kept_x.granularity, kept_w and kept_w.granularity
    part.high = operands.is_high("grad_input"), operands.is_high("grad_weight")
    part.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    saved = (*(kept_x or NOTHING)[:2], *(kept_w or NOTHING)[:2], smooth, *kept)
    return output if output.dtype == x.dtype else output.to(x.dtype), saved


def cast_and_multiply(
    operands: Operands,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_gemms: Sequence[Gemm],
    w_gemms: Sequence[Gemm],
    doubt: Doubt = None,
    together: Groups = (),
    splits: Splits = WHOLE,
    out: Tensor | None = None,
) -> tuple[Tensor, Hat, Hat, Tensor | None, Tensor | None]:
    """Return the output, both operands after their casts for some GEMMs, and the smoothing.

    Then the weight's scale, where it has a first one that was agreed on `together` with others.
    """
    smooth = smoothing(operands, x, splits) if operands.smooth else None
    x_cast, w_cast = x, weight
    if smooth is not None:  # float32 holds the products with a power of two exactly
        x_cast, w_cast = x.to(torch.float32) * smooth, weight.to(torch.float32) / smooth
    x_scale = first_scale(operands, "input", x_cast, together)
    w_scale = first_scale(operands, "weight", w_cast, together)
    x_hat = operands.cast("input", x_cast, x_gemms, scale=x_scale, splits=splits)
    w_hat = operands.cast("weight", w_cast, w_gemms, doubt=doubt, scale=w_scale, splits=splits)
    # output [T, N] = x_hat [T, K] @ w_hat [N, K].T + bias, contracting K: axis 1 of both.
    if operands.is_high("output"):
        output = written(plain_gemm(plain_operand(x), plain_operand(weight), bias), out)
    else:
        mode = operands.modes["output"]
        output = gemm(x_hat.along(1), w_hat.along(1), bias, mode, x.dtype, out)
    return output, x_hat, w_hat, smooth, w_scale


def run_backward(
    part: Any,
    saved: Saved,
    dy: Tensor,
    whole: Tensor,
    needs: tuple[bool, bool, bool],
    outs: Gradients = (None, None, None),
) -> Gradients:
    """Return a product's gradients.

    Args:
        part: What `run_forward` hung things on.
        saved: The tensors that it gave.
        dy: The gradient of the output, `[T, N]`.
        whole: The gradient that the node was given, of which `dy` is what concerns the product.
        needs: Which gradients are asked for.
        outs: Where they go, in the dtypes of their tensors; fresh memory where there is None.
    """
    operands: Operands = part.operands
    x_codes, x_inv, w_codes, w_inv, smooth, *kept = saved
    needs_input, needs_weight, needs_bias = needs
    x_dtype, weight_dtype, bias_dtype = part.dtypes
    input_is_high, weight_is_high = part.high
    gemms: list[Gemm] = ["grad_input"] if needs_input else []
    if needs_weight:
        gemms.append("grad_weight")
    dy_hat, seen = cast_gradient(operands, dy, gemms, *part.meets)
    if part.commit == "in backward" and not torch.compiler.is_compiling():
        seen = uncounted(part, whole, dy_hat, seen)

    grad_input = grad_weight = grad_bias = early = None
    prices: dict[Role, Tensor] = {}
    if needs_input:
        # grad_input [T, K] = dy_hat [T, N] @ w_hat [N, K], contracting N: axes 1 and 0.
        if part.remade is not None:
            w_cast = w_codes if smooth is None else w_codes.to(torch.float32) / smooth
            axis: Axis = 1 if operands.square["weight"] else 0
            w_hat = _remade(w_cast, w_inv, part.remade, axis, measured=operands.is_measured)
        else:
            w_hat = GemmOperand(w_codes, w_inv, part.grains[1], 0)
        if input_is_high:
            grad_input = written(plain_gemm(plain_operand(dy), w_hat), outs[0])
        else:
            mode = operands.modes["grad_input"]
            early, scratch = _early(part, w_hat, outs[1], is_wanted=needs_weight)
            if smooth is None:
                grad_input = gemm(dy_hat.along(1), w_hat, None, mode, x_dtype, outs[0], scratch)
            else:  # smoothing comes after the sum, and before it is rounded
                grad_input = gemm(dy_hat.along(1), w_hat, None, mode, torch.float32, None, scratch)
                grad_input = written(grad_input * smooth, outs[0])
        grad_input = grad_input if grad_input.dtype == x_dtype else grad_input.to(x_dtype)
        if part.aside is not None and part.aside.waits_for("input"):
            prices["input"] = part.aside.look("input", grad_input, kept, smooth)
    elif part.aside is not None and part.aside.makes_input:
        prices["input"] = part.aside.made_look(dy, kept, smooth)
    if needs_weight:
        # grad_weight [N, K] = dy_hat [T, N].T @ x_hat [T, K], contracting T: axis 0 of both.
        x_hat = GemmOperand(x_codes, x_inv, part.grains[0], 0)
        if weight_is_high:
            grad_weight = written(plain_gemm(plain_operand(dy, 0), x_hat), outs[1])
        else:
            mode = operands.modes["grad_weight"]
            if smooth is None:
                out = early if outs[1] is None else outs[1]
                grad_weight = gemm(dy_hat.along(0), x_hat, None, mode, weight_dtype, out)
            else:
                grad_weight = gemm(dy_hat.along(0), x_hat, None, mode, torch.float32)
                grad_weight = written(grad_weight / smooth, outs[1])
        if grad_weight.dtype != weight_dtype:
            grad_weight = grad_weight.to(weight_dtype)
        if part.commit == "in backward" and not weight_is_high:
            seen = with_look(operands, seen, dy, dy_hat, x_hat, grad_weight, smooth)
        if part.aside is not None and part.aside.waits_for("weight"):
            prices["weight"] = part.aside.look("weight", grad_weight, kept, smooth)
    if needs_bias:
        grad_bias = written(sum_tokens(dy).to(bias_dtype), outs[2])
    if part.commit == "in backward":
        seen_of: dict[Role, Seen] = {**part.seen, "grad_output": seen}
        operands.commit(with_prices(seen_of, prices) if prices else seen_of, dy)
        part.seen = {}  # a graph that is kept makes one cast more, and not three
    return grad_input, grad_weight, grad_bias


def _early(
    part: Any, weight: GemmOperand, out: Tensor | None, *, is_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the memory of the weight's gradient before there is one, and where to decode in it.

    A weight that is large is decoded where its gradient will be, which is as large and comes last:
    `grad_input` then needs no memory for it that the step does not take anyway.
    """
    dtype = part.dtypes[1]
    if torch.compiler.is_compiling() or not is_wanted or dtype != torch.float32:
        return None, None
    if weight.tensor.device.type != "cpu" or weight.tensor.numel() <= panels.ONE_PANEL:
        return None, None
    if out is not None:
        return None, out if out.is_contiguous() and out.dtype == torch.float32 else None
    early = torch.empty(weight.tensor.shape, dtype=dtype, device=weight.tensor.device)
    return early, early


def written(made: Tensor, out: Tensor | None) -> Tensor:
    """Return a result in the memory where it is wanted."""
    return made if out is None else out.copy_(made)


def _kept(operands: Operands, name: Gemm, plain: Tensor, hat: Hat) -> GemmOperand:
    """Return what backward's GEMM keeps of an operand that it contracts along axis 0."""
    if operands.is_high(name):
        return plain_operand(plain, 0)
    return hat.along(0)


def _scale_of(operands: Operands, hat: Hat) -> Tensor | None:
    """Return the scale by which the weight can be cast again; None where it takes its own."""
    axis: Axis = 1 if operands.square["weight"] else 0
    scale = hat.agreed.get(axis, operands.scales["weight", axis])
    return None if scale is None else scale.clone()


def _remade(
    weight: Tensor, scale: Tensor | None, plan: CastPlan, axis: Axis, *, measured: bool
) -> GemmOperand:
    """Return the weight as the forward cast it, for `grad_input`; it is not counted again.

    What a cast does is a function of tensor, scale and plan: the codes are the same.
    """
    turned = axis == 1
    return quantize_operand(weight, scale, plan, axis, turned=turned, measured=measured).along(0)


def plain_gemm(a: GemmOperand, b: GemmOperand, bias: Tensor | None = None) -> Tensor:
    """Multiply in high precision as `nn.Linear` does, in the dtype of the first operand."""
    left, right = (x.tensor if x.axis == 1 else x.tensor.t() for x in (a, b))
    with torch.autocast(left.device.type, enabled=False):
        bias = None if bias is None else bias.to(left.dtype)
        return F.linear(left, right.to(left.dtype), bias)
