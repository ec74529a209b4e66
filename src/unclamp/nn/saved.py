"""How scaling state looks in a state_dict, also that of a model which lies on several ranks.

**Sharded weights.** Where a layer's weight is a DTensor, its scaling state is one too, with a copy
on each rank of the same mesh. So whatever handles a sharded state_dict entry by entry can handle
it (torch's distributed checkpoints, accelerate's loop over `entry.device_mesh`), and another
number of ranks can load it.

**Blocks of a weight that tensor parallelism splits.** Each rank knows the histories of its own
blocks. They are saved as parts of the grid of all blocks, which any other number of ranks can
load, where each rank has whole blocks and a block serves both products. Elsewhere (rows, or blocks
that lie on two ranks) the single process has other blocks than any rank: zeros are saved, in the
shape of the single process's, which means "nothing measured".

**torch's `set_model_state_dict`** learns from `named_parameters` and `named_buffers` what a model
can load. What it learnt of it renames (DDP's "module.", the prefix of a compiled model) and sends
to the other ranks; the rest is lost. Scaling state is neither, because optimizers, wrappers and
changes of dtype must not see it. So to that one caller, whom only its frame tells from others,
`named_buffers` shows a tensor to fill for each. Those that it filled are loaded. Those of which
the checkpoint does not speak are still NaN, which means that nothing is said of them. Weights of
which it does not speak come as the model's own, and were not written since it asked.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.nn.layout import Site

STATE_PREFIX = "unclamp_"
"""Starts the name of every key of scaling state in a state_dict."""
UPDATES = "updates"
_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"
_LOADING = "_load_model_state_dict"


def weights_only(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict without scaling state: what a model that is not converted can load.

    transformers' `save_pretrained` and PEFT's files hold nothing else anyway.
    """
    return {key: value for key, value in state_dict.items() if not is_state_key(key)}


def is_state_key(key: str) -> bool:
    """Whether a key of a state_dict is one of scaling state."""
    return key.rpartition(".")[2].startswith(STATE_PREFIX)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a layer lies on ranks.

    Attributes:
        mesh: The DeviceMesh of its parameters; None: it is whole.
        spec: The `DTensorSpec` of what this rank has of its weight in a forward, where that has
            blocks with histories and is a part; else None.
        shape: The whole weight's, as the product has it.
        is_turned: Whether the product sees the weight turned.
    """

    mesh: Any = None
    spec: Any = None
    shape: tuple[int, ...] = ()
    is_turned: bool = False

    def saved(self, value: Tensor, site: Site) -> Tensor:
        """Return what a state_dict holds for a site's scales or histories.

        Shapes: `value` `[scales, ...]`, or without that axis where the site has one scale. A
        weight's blocks that serve both products come as their grid, `[rows, columns, ...]`.
        """
        grids = site.grids
        behind = value.shape[1:]
        if len(grids) == 1:
            value = value.reshape(*grids[1], *behind)
        if self.spec is None or not grids:
            return on_mesh(value, self.mesh)
        placements = self._placements(site) if len(grids) == 1 else None
        if placements is not None:
            return on_mesh(value, self.spec.mesh, placements)
        whole = replace(site, shape=self.shape)
        shape = whole.grids[1] if len(grids) == 1 else (whole.scales,)
        return on_mesh(value.new_zeros(*shape, *behind), self.mesh)

    def _placements(self, site: Site) -> list[Any] | None:
        """Return how a grid of blocks is spread; None where ranks do not have whole ones."""
        from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415  # slow to import

        placements, pieces = [], list(self.shape)
        for number, placement in enumerate(self.spec.placements):
            if not placement.is_shard():
                placements.append(Replicate())
                continue
            axis = 1 - placement.dim % 2 if self.is_turned else placement.dim % 2
            size, rest = divmod(
                pieces[axis], self.spec.mesh.size(number) * site.remembers.block[axis]
            )
            if rest:
                return None
            pieces[axis] = size * site.remembers.block[axis]
            placements.append(Shard(axis))
        return placements


def mesh_of(module: nn.Module) -> Any:
    """Return the DeviceMesh over which a module's parameters are sharded; None: over none."""
    meshes = (getattr(p, "device_mesh", None) for p in module.parameters())
    return next((mesh for mesh in meshes if mesh is not None), None)


def on_mesh(value: Tensor, mesh: Any, placements: list[Any] | None = None) -> Tensor:
    """Return what this rank has as a DTensor, by default a copy; without a mesh as it is."""
    if mesh is None:
        return value
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415  # slow to import

    placements = placements or [Replicate()] * mesh.ndim
    return DTensor.from_local(value, mesh, placements, run_check=False)


def off_mesh(value: Any) -> Tensor | None:
    """Return this rank's part of a value of a state_dict; None where it is none, or not filled."""
    if value is None:
        return None
    value = value.to_local() if hasattr(value, "to_local") else value
    return None if value.isnan().any() else value


def as_plain(value: Tensor) -> Tensor:
    """Return a value of a state_dict that every rank has as a plain tensor; a part as it is."""
    placements: Any = getattr(value, "placements", None)
    if placements is None or not all(p.is_replicate() for p in placements):
        return value
    return value.to_local()  # pyright: ignore


def is_part(value: Tensor) -> bool:
    """Whether a value of a state_dict is this rank's part of it."""
    return hasattr(as_plain(value), "device_mesh")


def like(value: Any, own: Tensor | None) -> Any:
    """Return a whole value as this rank's part of it, where its own one is a part."""
    if own is None or not is_part(own) or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  # slow to import

    there: Any = own
    if tuple(value.shape) != tuple(there.shape):
        return value
    return distribute_tensor(
        value.to(there.device), there.device_mesh, there.placements, src_data_rank=None
    )


def asked_to_load(frame: FrameType | None) -> Mapping[str, Any] | None:
    """Return what torch's distributed checkpoints load if, in this frame, they ask what a model
    can load; else None.
    """  # noqa: D205
    while frame is not None and frame.f_globals.get("__name__") == _CHECKPOINTS:
        if frame.f_code.co_name == _LOADING:
            return frame.f_locals["state_dict"]  # empty where another rank sends it
        frame = frame.f_back
    return None


def wants_to_fill(given: Mapping[str, Any]) -> bool:
    """Whether what they load may hold scaling state.

    That of a plain model does not: what they were shown they would miss.
    """
    return not given or any(is_state_key(key) for key in given)


def version_of(weight: Tensor) -> int | None:
    """Return how often a weight, or this rank's part, was written; None where torch cannot say."""
    local: Tensor = getattr(weight, "_local_tensor", weight)
    return None if local.is_inference() else local._version


def to_fill(state: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield for each tensor one of its kind to fill, where the layer's weight lies.

    A DTensor lies where its mesh does. A plain one is put on meta with a weight that is there, as
    torch takes the device of all from those that are elsewhere.
    """
    for name, value in state.items():
        empty = torch.full_like(value, math.nan)
        yield name, empty if hasattr(value, "device_mesh") else empty.to(device)
