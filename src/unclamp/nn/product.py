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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from unclamp.errors import ConvertError, UnsupportedError
from unclamp.names import shown
from unclamp.nn.accounts import accounted
from unclamp.nn.agreed import WHOLE, Splits, splits_at
from unclamp.nn.checkpointed import is_in_a_function, is_second_of_two, runs_once
from unclamp.nn.counting import count
from unclamp.nn.gemms import Commit, Meets, Product, cast_and_multiply
from unclamp.nn.groups import Groups, is_distributed
from unclamp.nn.nested import on_tokens
from unclamp.nn.operands import Operands
from unclamp.nn.parts import is_sharded
from unclamp.nn.rehearsal import rehearses
from unclamp.nn.sharded import on_shards


def multiply(
    operands: Operands,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
    splits: Splits = WHOLE,
    plain: Callable[[], Tensor] | None = None,
    is_part: bool = False,
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
    check(operands, x, weight)
    meets = meeting(operands, x, weight, bias, training=training, splits=splits)
    if operands.counts_only and not torch.compiler.is_compiling():
        output = F.linear(x, weight, bias) if plain is None else plain()
        if meets.commit is None:
            return output
        return count(operands, output, x, weight, commit=meets.commit, splits=meets.splits)
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
    if is_part:
        meets = meets._replace(is_part=True)
    output = Product.apply(tokens, weight, bias, operands, meets)
    # As `nn.Linear` does it: no view, of which FSDP warns because it may not be written into.
    return _unsafe_view(output, [*x.shape[:-1], weight.shape[0]])


_unsafe_view = torch.ops.aten._unsafe_view.default  # not chosen among overloads at each call


def meeting(
    operands: Operands,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
    splits: Splits = WHOLE,
) -> Meets:
    """Return what is decided of a forward before anything is cast.

    Args:
        operands: The product's.
        x: Its input.
        weight: Its weight, the bank that it lies in, or an operand that is no parameter.
        bias: Its bias, or None.
        training: Whether the module is in training mode.
        splits: How it is spread over ranks, as far as tensors say.
    """
    commit = when_to_commit(operands, x, weight, bias, training=training)
    together: Groups = ()
    if not (torch.compiler.is_compiling() or rehearses()):
        ledger, commits = operands.ledger, commit is not None
        if not commits:
            operands.silent_forwards += 1
        elif operands.weight_name is not None:
            ledger.clock.unseen.look(operands.number, weight, ledger)
        together = ledger.shared.first_groups(
            ledger, operands.number, commits=commits, training=training
        )
    evaluates = is_evaluation(operands, commit, training=training)
    if operands.shares:
        splits = splits_at(operands, splits, x.shape[:-1].numel(), evaluates=evaluates)
    return Meets(commit, evaluates, together, splits)


# Between graphs: in one, ranks would not agree. torch's own name, for the public one loads the
# compiler at once.
_eagerly: Any = _disable_dynamo(multiply)


def check(operands: Operands, x: Tensor, weight: Tensor) -> None:
    """Raise where input or weight are of another dtype, or lie elsewhere, than is expected."""
    if not torch.compiler.is_compiling():
        check_device(operands, weight)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(
            f"{shown(operands.fqn)}: expected an input of the weight's dtype, {weight.dtype}, got "
            f"{x.dtype}; convert one of them, or compute under torch.autocast"
        )


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
    wants = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
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
    output, *_ = cast_and_multiply(operands, tokens, weight, bias, ["output"], ["output"], doubt)
    return output.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


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
