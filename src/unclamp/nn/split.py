"""A product's backward that runs for one gradient at a time: what is asked for, what has counted.

A zero-bubble pipeline splits backward: the node of a product runs for the gradient of its input,
which another stage waits for, and later for that of its weight, which nobody does.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from unclamp.nn.casts import Hat, Seen


def asked(ctx: Any) -> tuple[bool, bool, bool]:
    """Return which gradients the running backward asks for: of input, weight and bias.

    torch's own functions know, and one in Python is not told. Zero-bubble schedules run a node
    twice, for the input's gradient and later for the weight's: without the question each run
    would cost as much as both.
    """
    needs = ctx.needs_input_grad[:3]
    if torch.compiler.is_compiling():
        return needs
    nodes = [node for node, _ in ctx.next_functions]  # of tensors: without a bias there are two
    x, weight, *bias = (n and _runs(node) for n, node in zip(needs, nodes, strict=False))
    return x, weight, any(bias)


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is captured: it is asked for
        return True


def uncounted(ctx: Any, dy: Tensor, hat: Hat, seen: Seen) -> Seen:
    """Return what was seen of a gradient less what an earlier run for the same one has counted.

    The second run of a zero-bubble schedule hands in the very tensor of the first. In a graph that
    is kept each backward makes a gradient of its own, which counts.
    """
    gradient, axes = ctx.counted
    if gradient is None or gradient() is not dy:
        ctx.counted = weakref.ref(dy), frozenset(hat.casts)
        return seen
    ctx.counted = gradient, axes | hat.casts.keys()
    left = Hat(hat.tensor, {axis: q for axis, q in hat.casts.items() if axis not in axes})
    return ctx.operands.seen("grad_output", left)
