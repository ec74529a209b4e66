"""Tensors of which each rank has a part (DTensor, as FSDP2 makes them), in a state.

A state keeps a rank's own part as it is, nothing is gathered, and says that it is one. How the
whole is laid out over ranks is not kept: the training that the state is put into knows it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from unclamp.errors import ReplayError

_SHARD, _SHAPE = "unclamp shard", "shape"


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a part of one; loads nothing to find out."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "to_local")


def kept(tensor: Tensor, keep: Callable[[Tensor], Tensor]) -> Any:
    """Return what a state keeps of a tensor: of one in parts this rank's, marked as such."""
    if not is_sharded(tensor):
        return keep(tensor)
    local: Any = tensor.detach()
    return {_SHARD: keep(local.to_local()), _SHAPE: list(tensor.shape)}


def joined(tree: Any, like: Any, what: str) -> Any:
    """Return a kept tree with its parts as DTensors again, laid out as those of a tree like it.

    Raises:
        ReplayError: The other tree has no tensor of that shape in the same place.
    """
    if is_part(tree):
        return _laid_out(tree, like, what)
    if isinstance(tree, dict):
        known = like if isinstance(like, Mapping) else {}
        return {key: joined(value, known.get(key), what) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        known = like if isinstance(like, list | tuple) and len(like) == len(tree) else ()
        pairs = zip(tree, known or [None] * len(tree), strict=True)
        return type(tree)(joined(value, other, what) for value, other in pairs)
    return tree


def joined_optimizer(state: dict[str, Any], groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an optimizer's kept state, its parts laid out as those of its parameters.

    Raises:
        ReplayError: As `joined`.
    """
    parameters = [p for group in groups for p in group["params"]]
    per_parameter = {
        number: {
            name: joined(value, parameters[number], "the optimizer's state") if is_part(value)
            else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
        if number < len(parameters)
    }  # fmt: skip
    return {**state, "state": per_parameter}


def is_part(tree: object) -> bool:
    """Whether something kept is a rank's part of a tensor."""
    return isinstance(tree, dict) and _SHARD in tree


def has_parts(tree: object) -> bool:
    """Whether a kept tree has a rank's part of a tensor anywhere."""
    if isinstance(tree, dict):
        return is_part(tree) or any(map(has_parts, tree.values()))
    return isinstance(tree, list | tuple) and any(map(has_parts, tree))


def _laid_out(part: dict[str, Any], like: Any, what: str) -> Tensor:
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  (takes a second to load)

    if not is_sharded(like) or list(like.shape) != part[_SHAPE]:
        raise ReplayError(
            f"expected the build function to shard {what} as the run did (fully_shard, or a "
            f"device mesh): the snapshot has a rank's part of a tensor of shape {part[_SHAPE]}, "
            "and here it is whole or another"
        )
    local = like.to_local()
    own = part[_SHARD]
    if own.shape != local.shape:
        raise ReplayError(
            f"expected a part of shape {list(local.shape)} of {what} on this rank, and the "
            f"snapshot has one of {list(own.shape)}: shard it over the same ranks as the run did"
        )
    return DTensor.from_local(
        own.to(local.device, local.dtype),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def like_parameter(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a whole tensor, the same on all ranks, as a parameter's is: this rank's part of it."""
    whole = whole.to(parameter.device)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    laid_out: Any = parameter
    return distribute_tensor(whole, laid_out.device_mesh, laid_out.placements, src_data_rank=None)


def check_takeable(model: nn.Module) -> None:
    """Raise a ReplayError for a model whose ranks' states cannot be taken one by one."""
    name = "FullyShardedDataParallel"
    if any(type(module).__name__ == name for module in model.modules()):
        raise ReplayError(
            f"snapshots of several ranks are taken of DDP and FSDP2 trainings; this model has a "
            f"{name} (FSDP1), whose state is not each rank's own: use torch's fully_shard"
        )
