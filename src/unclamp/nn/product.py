"""One matrix product in FP8: three casts a step, three GEMMs.

With tokens T, in features K, out features N, and a hat for a tensor that went through FP8:

    output       [T, N] = input_hat [T, K] @ weight_hat [N, K].T + bias
    grad_input   [T, K] = grad_output_hat [T, N] @ weight_hat [N, K]
    grad_weight  [N, K] = grad_output_hat [T, N].T @ input_hat [T, K]
    grad_bias    [N]    = sum of grad_output over T, in high precision

The codes of input and weight that the forward made are what backward uses: three casts and not
six, one byte an element kept for backward, and no chance of two scales for one tensor. On a GPU
the codes of a weight that would be most of what is kept are made again in backward. A re-computed
forward (activation checkpointing) finds the same scales, since they change only after an
optimizer step.

Statistics are kept with the graph node and committed to the ledger when its backward runs,
once. So an evaluation forward changes nothing, and a forward that runs twice for one backward
counts once. A product that takes part in training without needing a gradient itself (frozen, at
the bottom of the model) has no backward: it commits in the forward (`when_to_commit`).

A zero-bubble pipeline runs a node twice, for one gradient at a time: each run makes the GEMM that
is asked for, and a gradient's cast counts in the first run that needs it.

Where casts are only counted (warm-up, an observed model) autograd's own graph computes, and the
counting hangs on it: second derivatives, vmap and jvp work as for the plain layer. A compiled
graph has the function of its own all the same, with GEMMs in high precision: its bits are those
of eager mode, and a compiler's own sum over tokens would not be.

The emulation computes in float32 on the dequantised values. A GEMM in high precision is the one
of `nn.Linear`.

A *smoothed* product multiplies each channel of its input by a power of two that brings the
channel's amax into (1/2, 1], and the weight's column by the inverse, before the casts:

    input @ weight.T = (input * s) @ (weight / s).T        exact for powers of two

On the down projection of a gated MLP that is Smooth-SwiGLU (arXiv 2409.12517): the channel's
scale, folded into the up projection whose output it multiplies, and into the down projection.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from unclamp.errors import ConvertError, UnsupportedError
from unclamp.names import GEMMS, Gemm, Role, shown
from unclamp.nn.accounts import accounted
from unclamp.nn.agreed import WHOLE, Splits, smoothing, splits_at
from unclamp.nn.casts import Hat, Seen
from unclamp.nn.checkpointed import is_in_a_function, is_second_of_two, runs_once
from unclamp.nn.counting import count
from unclamp.nn.first import first_scale
from unclamp.nn.gradient import cast_gradient, with_look
from unclamp.nn.groups import Groups, is_distributed
from unclamp.nn.layout import Axis
from unclamp.nn.nested import on_tokens
from unclamp.nn.noted import Doubt
from unclamp.nn.operands import Operands
from unclamp.nn.parts import is_sharded
from unclamp.nn.rehearsal import rehearses
from unclamp.nn.sharded import on_shards
from unclamp.nn.split import asked, uncounted
from unclamp.numerics import CastPlan, GemmOperand
from unclamp.numerics.operators import gemm, quantize_operand, sum_tokens

WANTS_A_VIEW = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Where a compiled function returns an operator's very result, torch 2.11 takes the gradient for
zeros. A view helps, at the price that nobody may write into it; 2.13 needs none."""
Commit = Literal["in backward", "now"] | None
"""When a forward's statistics reach the ledger; None: never, it is an evaluation."""


def multiply(
    operands: Operands,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
    splits: Splits = WHOLE,
    plain: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return `x @ weight.T + bias` with the operands cast as their plan says.

    Where they are not cast, by `plain`, if the layer has another operation for it than a linear
    layer's.

    Shapes: `x` `[..., K]`, any leading shape, empty or nested too; `weight` `[N, K]`; the result
    `[..., N]` in the dtype of `x`, under autocast in autocast's. Of DTensors each rank multiplies
    its parts (`nn.sharded`), which are spread as `splits` says.

    Raises:
        ValueError: The last dimension of `x` is not K.
        ConvertError: The scaling state lies on another device than the weight.
        RuntimeError: `x` and weight differ in dtype outside of autocast, as for `nn.Linear`.
    """
    if operands.is_plain:
        return F.linear(x, weight, bias) if plain is None else plain()
    if (account := accounted(operands)) is not None:
        with account:
            return F.linear(x, weight, bias) if plain is None else plain()
    if x.is_nested:
        return on_tokens(x, lambda t: multiply(operands, t, weight, bias, training=training))
    if operands.shares and torch.compiler.is_compiling() and is_distributed():
        return _eagerly(operands, x, weight, bias, training=training)
    if is_sharded(x, weight):
        return on_shards(operands, x, weight, bias, multiply, when_to_commit, training=training)
    if not torch.compiler.is_compiling():
        check_device(operands, weight)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(
            f"{shown(operands.fqn)}: expected an input of the weight's dtype, {weight.dtype}, got "
            f"{x.dtype}; convert one of them, or compute under torch.autocast"
        )
    commit = when_to_commit(operands, x, weight, bias, training=training)
    together: Groups = ()
    if not (torch.compiler.is_compiling() or rehearses()):
        ledger, commits = operands.ledger, commit is not None
        if commits:
            ledger.clock.unseen.look(operands.number, weight, ledger)
        else:
            operands.silent_forwards += 1
        together = ledger.shared.first_groups(
            ledger, operands.number, commits=commits, training=training
        )
    evaluates = is_evaluation(operands, commit, training=training)
    if operands.shares:
        splits = splits_at(operands, splits, x.shape[:-1].numel(), evaluates=evaluates)
    if operands.counts_only and not torch.compiler.is_compiling():
        output = F.linear(x, weight, bias) if plain is None else plain()
        if commit is None:
            return output
        return count(operands, output, x, weight, commit=commit, splits=splits)
    # Not before: in a trace sizes are no numbers, and the plain layer has an error of its own.
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        return _traced(operands, x, weight, bias)
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{operands.fqn}: expected an input [..., {weight.shape[1]}], got {list(x.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # Reshaped out here: an in-place operation on a view made inside the function would fail.
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    output = _Product.apply(tokens, weight, bias, operands, commit, evaluates, together, splits)
    # As `nn.Linear` does it: no view, of which FSDP warns because it may not be written into.
    return torch.ops.aten._unsafe_view(output, [*x.shape[:-1], weight.shape[0]])


# Between graphs: in one, ranks would not agree. torch's own name, for the public one loads the
# compiler at once.
_eagerly: Any = _disable_dynamo(multiply)


def check_device(operands: Operands, weight: Tensor) -> None:
    """Raise where a part of a model was moved: all layers of a ledger have its device."""
    there = operands.pending.device
    if weight.device != there and weight.device.type != "meta":
        raise ConvertError(
            f"{shown(operands.fqn)}: its weight is on {weight.device} and the scaling state of the "
            f"model on {there}, so a part of the model was moved after unclamp.convert; move the "
            "whole model, or move its parts first and convert each by itself"
        )


def when_to_commit(
    operands: Operands, x: Tensor, weight: Tensor, bias: Tensor | None, *, training: bool
) -> Commit:
    """Return when what a forward's casts saw is to count.

    Gradients decide whether a forward trains, and not the module's mode: a frozen base in `eval()`
    under an adapter trains like any other. Only where a product sees no gradient itself, at the
    bottom of such a base, something else has to tell: a parameter of the model that wants one,
    or else the mode. Where a frozen product is checkpointed (reentrant), and no input wants a
    gradient, it is the mode: `nn.checkpointed`. Of a pipeline's run for shapes nothing counts.
    """
    if rehearses():
        return None
    wants = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not torch.is_grad_enabled():
        if wants or not training or torch.compiler.is_compiling():
            return None
        return "now" if operands.is_at_the_bottom and runs_once() else None
    if torch.compiler.is_compiling():
        return "in backward" if wants else "now" if training else None
    if wants:
        if not weight.requires_grad:
            operands.last_passed = operands.ledger.turns.made
        return "in backward"
    if not (training or operands.ledger.clock.someone_trains(operands.ledger)):
        return None
    # Without a backward of its own, a forward that backward re-computes must not count again.
    counts = torch._C._current_graph_task_id() == -1 or is_second_of_two()
    return "now" if counts else None


def _traced(operands: Operands, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a product whose casts and GEMM are nodes of a `torch.jit` graph.

    It is a forward for inference: nothing is counted, and its operators refuse a backward.

    Raises:
        UnsupportedError: The product is smoothed, for which such a graph has no operations.
    """
    if operands.smooth:
        raise UnsupportedError(
            f"{shown(operands.fqn)}: expected a layer that is not smoothed under torch.jit.trace; "
            "use torch.export"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    tokens = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    doubt = operands.doubt(weight)  # as an evaluation: a graph without it would clamp
    output, *_ = _forward(operands, tokens, weight, bias, ["output"], ["output"], doubt)
    return output.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _forward(
    operands: Operands,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_gemms: list[Gemm],
    w_gemms: list[Gemm],
    doubt: Doubt = None,
    together: Groups = (),
    splits: Splits = WHOLE,
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
        output = _plain_gemm(GemmOperand(x), GemmOperand(weight), bias)
    else:
        output = _gemm(operands, "output", x_hat.along(1), w_hat.along(1), bias, x.dtype)
    return output, x_hat, w_hat, smooth, w_scale


def is_evaluation(operands: Operands, commit: Commit, *, training: bool) -> bool:
    """Whether a forward is an evaluation, whose casts are counted apart.

    Forwards that train nothing are, in `eval()`. Those inside of the forward of an autograd
    function are not: reentrant checkpointing runs them there first, without gradients, and again
    in backward, with the same bits, or not at all (`nn.checkpointed`). In training mode there may
    be other reasons to run a forward without gradients; only a copy that never trained can do
    nothing but evaluate, and does so with gradients enabled too.
    """
    if rehearses():
        return False
    if torch.compiler.is_compiling():
        return commit is None and not training
    if torch._C._current_graph_task_id() != -1 or (is_in_a_function() and not runs_once()):
        return False
    if operands.ledger.evaluated.source is not None:
        return commit is None or not training
    return commit is None and not training


class _Product(torch.autograd.Function):
    """Forward and backward as three GEMMs; see the module's equations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Operands,
        commit: Commit,
        evaluates: bool,
        together: Groups,
        splits: Splits,
    ) -> Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        # What may be trained by a backward has the bits of a training, whatever its mode.
        doubt = operands.doubt(weight) if evaluates and commit is None else None
        remakes = needs_input and doubt is None and operands.remakes_weight(weight, x.shape[0])
        x_gemms: list[Gemm] = ["output", "grad_weight"] if needs_weight else ["output"]
        # A cast along the other axis is made in any case, to be counted.
        casts_once = not needs_input or (remakes and operands.square["weight"])
        w_gemms: list[Gemm] = ["output"] if casts_once else ["output", "grad_input"]
        output, x_hat, w_hat, smooth, w_scale = _forward(
            operands, x, weight, bias, x_gemms, w_gemms, doubt, together, splits
        )

        # grad_weight will contract T, axis 0 of the input; grad_input N, axis 0 of the weight.
        kept_x = _kept(operands, "grad_weight", x, x_hat) if needs_weight else None
        kept_w = _kept(operands, "grad_input", weight, w_hat) if needs_input else None
        ctx.remade = operands.plans["weight"] if remakes else None
        if remakes:
            kept_w = GemmOperand(weight, _scale_of(operands, w_hat) if w_scale is None else w_scale)
        seen: dict[Role, Seen] = {
            "input": operands.seen("input", x_hat),
            "weight": operands.seen("weight", w_hat),
        }
        if commit == "now":
            operands.commit(seen)
        if evaluates:
            operands.evaluate(seen, weight)
        # Nothing of the codes may stay outside of `save_for_backward`, or checkpointing keeps it.
        ctx.save_for_backward(*(kept_x or NOTHING)[:2], *(kept_w or NOTHING)[:2], smooth)
        ctx.operands, ctx.commit, ctx.seen, ctx.meets = operands, commit, seen, (together, splits)
        ctx.counted = None, frozenset()
        ctx.grains = tuple(None if k is None else k.granularity for k in (kept_x, kept_w))
        ctx.high = {name: operands.is_high(name) for name in GEMMS}
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        output = output.to(x.dtype)
        return output.view_as(output) if WANTS_A_VIEW and torch.compiler.is_compiling() else output

    # A second derivative would silently miss everything that goes through a cast: raise.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        operands: Operands = ctx.operands
        saved = ctx.saved_tensors  # once: under checkpointing each read unpacks, and may only once
        x_codes, x_inv, w_codes, w_inv, smooth = saved
        needs_input, needs_weight, needs_bias = asked(ctx)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wanted: dict[Gemm, bool] = {"grad_input": needs_input, "grad_weight": needs_weight}
        gemms: list[Gemm] = [gemm for gemm, is_on in wanted.items() if is_on]
        dy_hat, seen = cast_gradient(operands, dy, gemms, *ctx.meets)
        if ctx.commit == "in backward" and not torch.compiler.is_compiling():
            seen = uncounted(ctx, dy, dy_hat, seen)

        grad_input = grad_weight = grad_bias = None
        if needs_input:
            # grad_input [T, K] = dy_hat [T, N] @ w_hat [N, K], contracting N: axes 1 and 0.
            if ctx.remade is not None:
                w_cast = w_codes if smooth is None else w_codes.to(torch.float32) / smooth
                axis: Axis = 1 if operands.square["weight"] else 0
                w_hat = _remade(w_cast, w_inv, ctx.remade, axis)
            else:
                w_hat = GemmOperand(w_codes, w_inv, ctx.grains[1], 0)
            if ctx.high["grad_input"]:
                grad_input = _plain_gemm(GemmOperand(dy), w_hat)
            else:
                dtype = x_dtype if smooth is None else torch.float32
                grad_input = _gemm(operands, "grad_input", dy_hat.along(1), w_hat, None, dtype)
                # Smoothing comes after the sum, and before it is rounded.
                grad_input = grad_input if smooth is None else grad_input * smooth
            grad_input = grad_input.to(x_dtype)
        if needs_weight:
            # grad_weight [N, K] = dy_hat [T, N].T @ x_hat [T, K], contracting T: axis 0 of both.
            x_hat = GemmOperand(x_codes, x_inv, ctx.grains[0], 0)
            if ctx.high["grad_weight"]:
                grad_weight = _plain_gemm(GemmOperand(dy, axis=0), x_hat)
            else:
                dtype = weight_dtype if smooth is None else torch.float32
                grad_weight = _gemm(operands, "grad_weight", dy_hat.along(0), x_hat, None, dtype)
                grad_weight = grad_weight if smooth is None else grad_weight / smooth
            grad_weight = grad_weight.to(weight_dtype)
            if ctx.commit == "in backward" and not ctx.high["grad_weight"]:
                seen = with_look(operands, seen, dy, dy_hat, x_hat, grad_weight, smooth)
        if needs_bias:
            grad_bias = sum_tokens(dy).to(bias_dtype)
        if ctx.commit == "in backward":
            operands.commit({**ctx.seen, "grad_output": seen})
            ctx.seen = {}  # a graph that is kept makes one cast more, and not three
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


NOTHING: tuple[None, None] = (None, None)
"""Stands for an operand that backward does not need."""


def _kept(operands: Operands, name: Gemm, plain: Tensor, hat: Hat) -> GemmOperand:
    """Return what backward's GEMM keeps of an operand that it contracts along axis 0."""
    if operands.is_high(name):
        return GemmOperand(plain, axis=0)
    return hat.along(0)


def _scale_of(operands: Operands, hat: Hat) -> Tensor | None:
    """Return the scale by which the weight can be cast again; None where it takes its own."""
    axis: Axis = 1 if operands.square["weight"] else 0
    scale = hat.agreed.get(axis, operands.scales["weight", axis])
    return None if scale is None else scale.clone()


def _remade(weight: Tensor, scale: Tensor | None, plan: CastPlan, axis: Axis) -> GemmOperand:
    """Return the weight as the forward cast it, for `grad_input`; it is not counted again.

    What a cast does is a function of tensor, scale and plan: the codes are the same.
    """
    return quantize_operand(weight, scale, plan, axis, turned=axis == 1).along(0)


def _gemm(
    operands: Operands,
    name: Gemm,
    a: GemmOperand,
    b: GemmOperand,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return gemm(a, b, bias, operands.modes[name], dtype)


def _plain_gemm(a: GemmOperand, b: GemmOperand, bias: Tensor | None = None) -> Tensor:
    """Multiply in high precision as `nn.Linear` does, in the dtype of the first operand."""
    left, right = (x.tensor if x.axis == 1 else x.tensor.t() for x in (a, b))
    with torch.autocast(left.device.type, enabled=False):
        bias = None if bias is None else bias.to(left.dtype)
        return F.linear(left, right.to(left.dtype), bias)
