"""A product of tensors that are spread over ranks (DTensor): each rank multiplies its own parts.

`parallelize_module` makes the parameters of a layer DTensors, and its input one. DTensor is a way
in and a way out: what is cast, counted and multiplied are local tensors. For each dimension of the
mesh the weight `[N, K]` decides, as in DTensor's own linear:

    weight        input                      output       gradients of input, weight
    Shard(0)      Replicate                  Shard(-1)    Partial, Shard(0)        column-wise
    Shard(1)      Shard(-1)                  Partial      Shard(-1), Shard(1)      row-wise
    Replicate     Replicate or over tokens   as input     as input, Replicate

An input that is spread in another way is redistributed first: a cast of a partial sum would be one
of nothing. The bias of a row-wise layer comes after the sum, once. In a warm-up, and where a model
is observed, DTensor's own linear computes, and the casts of the parts are counted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.errors import UnsupportedError
from unclamp.names import shown
from unclamp.nn.agreed import WHOLE, Splits, splits_at
from unclamp.nn.counting import count
from unclamp.nn.holders import sharded_parameters, whole_spec
from unclamp.nn.operands import Operands
from unclamp.nn.parts import fit, is_sharded
from unclamp.nn.products import products_of


class Multiply(Protocol):
    """How a product is computed of local tensors: `nn.product.multiply`."""

    def __call__(
        self,
        operands: Operands,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        training: bool,
        splits: Splits,
        is_part: bool,
    ) -> Tensor:
        """Return the product."""
        ...


class Layout(NamedTuple):
    """How the tensors of a product are spread: one placement a dimension of the mesh.

    Attributes:
        x: The input.
        bias: The bias.
        output: What the parts make.
        summed: The output, once partial sums are summed.
        grad_x: The gradient of the input, as the parts make it.
        grad_weight: That of the weight.
        grad_bias: That of the bias.
    """

    x: tuple[Any, ...]
    bias: tuple[Any, ...]
    output: tuple[Any, ...]
    summed: tuple[Any, ...]
    grad_x: tuple[Any, ...]
    grad_weight: tuple[Any, ...]
    grad_bias: tuple[Any, ...]


def on_shards(
    operands: Operands,
    x: Any,
    weight: Any,
    bias: Any,
    multiply: Multiply,
    when_to_commit: Callable[..., Any],
    *,
    training: bool,
) -> Tensor:
    """Return a product of DTensors, as a DTensor.

    Shapes: global ones, as for the plain layer.

    Args:
        operands: The product's.
        x: Input.
        weight: Weight.
        bias: Bias, or None.
        multiply: Computes it of parts.
        when_to_commit: Says when what its casts saw is to count.
        training: Whether the module is in training mode.

    Raises:
        UnsupportedError: Only one of input and weight is a DTensor, their meshes differ, or a
            placement is none of those above.
        ValueError: The last dimension of `x` is not that of the weight.
    """
    _check(operands, x, weight, bias)
    layout = layout_of(x, weight)
    whole_x, whole_bias = x, bias
    x = _spread(x, layout.x)
    splits = _splits(x, weight) if operands.shares else WHOLE
    x_part, weight_part = (
        _part(x, layout.grad_x),
        _part(_summing(weight, layout), layout.grad_weight),
    )
    if torch.compiler.is_compiling():
        counts_only = False
    else:
        fit(operands, weight_part.shape)
        counts_only = operands.counts_only
    if counts_only:
        output = F.linear(whole_x, weight, whole_bias)
        commit = when_to_commit(operands, whole_x, weight, whole_bias, training=training)
        if commit is None:
            return output
        if operands.shares:
            tokens = x_part.shape[:-1].numel()
            splits = splits_at(operands, splits, tokens, evaluates=False)
        return count(
            operands, output, x_part, weight_part, commit=commit, splits=splits,
            part=lambda dy: _waited(_spread(dy, layout.summed).to_local()),
        )  # fmt: skip
    is_partial = layout.output != layout.summed
    bias_part = None
    if bias is not None and not is_partial:
        bias = _summing(_spread(bias, layout.bias), layout)
        bias_part = _part(bias, layout.grad_bias)
    made = multiply(
        operands, x_part, weight_part, bias_part,
        training=training, splits=splits, is_part=True,
    )  # fmt: skip
    output = _whole(made, weight.device_mesh, layout.output, (*x.shape[:-1], weight.shape[0]))
    if bias is None or not is_partial:
        return output
    return _spread(output, layout.summed) + _spread(bias, layout.bias).to(output.dtype)


def _check(operands: Operands, x: Any, weight: Any, bias: Any) -> None:
    tensors = {"input": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    placements = {name: getattr(t, "placements", None) for name, t in tensors.items()}
    meshes = {t.device_mesh for t in tensors.values() if hasattr(t, "device_mesh")}
    fits = None not in placements.values() and len(meshes) == 1
    kinds = ("Replicate", "Shard", "Partial")
    fits = fits and all(type(p).__name__ in kinds for p in placements["input"] or ())
    # What else there is would be cast in parts that nobody knows: strided, or to be summed.
    fits = fits and all(
        type(p).__name__ in ("Replicate", "Shard") for p in placements["weight"] or ()
    )
    if not fits:
        found = ", ".join(
            f"{name} {'no DTensor' if each is None else each}" for name, each in placements.items()
        )
        where = "" if len(meshes) < 2 else f" on {len(meshes)} meshes"
        raise UnsupportedError(
            f"{shown(operands.fqn)}: expected DTensors on one mesh, the weight Replicate, Shard(0) "
            f"or Shard(1), got {found}{where}; redistribute them, or leave the layer out by "
            "skip=[...]"
        )
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{operands.fqn}: expected an input [..., {weight.shape[1]}], got {list(x.shape)}"
        )


def layout_of(x: Any, weight: Any) -> Layout:
    """Return how the tensors of a product are spread, from the placements of its operands."""
    from torch.distributed.tensor import Partial, Replicate, Shard  # noqa: PLC0415

    whole, last, total = Replicate(), Shard(x.ndim - 1), Partial()
    rows = []
    for own, other in zip(weight.placements, x.placements, strict=True):
        if own.is_shard() and own.dim % 2 == 0:
            rows.append((whole, Shard(0), last, last, total, Shard(0), Shard(0)))
        elif own.is_shard():
            rows.append((last, whole, total, whole, last, Shard(1), whole))
        elif other.is_shard() and other.dim % x.ndim != x.ndim - 1:
            rows.append((other, whole, other, other, other, total, total))
        else:
            rows.append((whole,) * len(Layout._fields))
    return Layout(*zip(*rows, strict=True))


def _spread(x: Any, placements: tuple[Any, ...]) -> Any:
    """Return a DTensor spread so; itself if it is."""
    return x if tuple(x.placements) == placements else x.redistribute(placements=placements)


def _summing(parameter: Any, layout: Layout) -> Any:
    """Return a parameter whose gradients are summed over ranks with other tokens at once.

    DTensor would leave a partial sum in `.grad`, spread otherwise than the parameter.
    """
    if not any(p.is_partial() for p in layout.grad_weight):
        return parameter
    return parameter.redistribute(placements=parameter.placements)


def _part(x: Any, grad: tuple[Any, ...]) -> Tensor:
    """Return this rank's part, whose gradient will be spread as told."""
    return _waited(x.to_local(grad_placements=grad))


def _waited(x: Tensor) -> Tensor:
    """Return a tensor whose collective is over: kernels want its memory."""
    if torch.compiler.is_compiling() or type(x) in (Tensor, nn.Parameter):
        return x
    return _Waited.apply(x)


class _Waited(torch.autograd.Function):
    """Waits for a tensor that a collective is on its way to make; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        return x.trigger_wait() if hasattr(x, "trigger_wait") else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def _whole(part: Tensor, mesh: Any, placements: tuple[Any, ...], shape: Sequence[int]) -> Any:
    """Return the DTensor of which a rank has this part; parts may be of different sizes."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(size, 1))
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def _splits(x: Any, weight: Any) -> Splits:
    """Return how a product is spread over its mesh, once its input is spread as it wants it."""
    mesh = weight.device_mesh
    splits = Splits(mesh=tuple(mesh.get_group(number) for number in range(mesh.ndim)))
    for number, (own, other) in enumerate(zip(weight.placements, x.placements, strict=True)):
        group, count = (mesh.get_group(number),), mesh.size(number)
        if count == 1:
            continue
        if own.is_shard():
            name = "outputs" if own.dim % 2 == 0 else "inputs"
            piece = -(-weight.shape[own.dim] // count)
        elif other.is_shard():
            name = "tokens"
            # Tokens of one sequence lie beside each other, and those of the next come after.
            piece = -(-x.shape[other.dim] // count) * math.prod(x.shape[other.dim + 1 : -1])
        else:
            continue
        splits = splits._replace(**{name: getattr(splits, name).joined(group, piece)})
    return splits


# ---- rows of histories -------------------------------------------------------------------------


def fit_all(model: nn.Module) -> None:
    """Fit the rows of histories to this rank's parts, for all converted layers of a model."""
    wholes = _wholes(model)
    for _, own, module in products_of(model):
        weight: Any = None if own.weight_name is None else getattr(module, own.weight_name)
        if is_sharded(weight) and weight.ndim == 2:  # a bank fits its own at each product
            adapted: Any = module
            fit(own, adapted.product_shape(_part_shape(weight, wholes)))


def _part_shape(weight: Any, wholes: Mapping[int, Any]) -> tuple[int, ...]:
    """Return the shape that a DTensor parameter has on this rank in a forward."""
    spec: Any = wholes.get(id(weight), weight._spec)
    shape = list(weight.shape)
    if spec is None:
        return tuple(shape)
    for number, placement in enumerate(spec.placements):
        if placement.is_shard():
            size, ranks = shape[placement.dim], spec.mesh.size(number)
            piece = -(-size // ranks)
            before = piece * spec.mesh.get_local_rank(number)
            shape[placement.dim] = max(0, min(piece, size - before))
    return tuple(shape)


def _wholes(model: nn.Module) -> dict[int, Any]:
    """Return how parameters are spread that FSDP2 puts together, by the id of the shard.

    None stands for a parameter that is whole in a forward.
    """
    return {id(p.sharded_param): whole_spec(p) for p in sharded_parameters(model)}


def spread_in_forward(weight: Any, model: nn.Module) -> Any:
    """Return how a DTensor parameter of a model is spread in a forward (a `DTensorSpec`).

    None where it is whole there: FSDP2 puts it together.
    """
    return _wholes(model).get(id(weight), weight._spec)


def part_shape(weight: Any, spec: Any) -> tuple[int, ...]:
    """Return the shape that a parameter has on this rank, if it is spread so in a forward."""
    return _part_shape(weight, {id(weight): spec})
