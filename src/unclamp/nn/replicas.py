"""Which operands of a product a lower rank casts too: then totals over ranks count theirs alone.

Under data parallelism every rank casts the whole weight, and tokens and gradients of its own. Under
tensor parallelism a weight `[N, K]` that is spread over N (column-wise) has the same input on all
ranks of the mesh, and one that is spread over K (row-wise) the same gradient of the output. Shards
that torch does not know of, told by `convert(..., group=)`, are taken for different tensors.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from unclamp.names import ROLES, Role
from unclamp.nn.groups import Finder, follow_wrappers, is_distributed
from unclamp.nn.holders import sharded_parameters, whole_spec
from unclamp.nn.ledger import Ledger

_ALIKE: dict[int, Role] = {0: "input", 1: "grad_output"}
"""What is the same on all ranks, by the dimension of the weight that is spread over them."""


def repeated_sites(ledger: Ledger, root: nn.Module | None) -> frozenset[int]:
    """Return those of a ledger's sites whose tensor a lower rank casts as well.

    Args:
        ledger: The ledger.
        root: The model, for what is wrapped around its parts.
    """
    if not is_distributed():
        return frozenset()
    follow_wrappers()
    replicas = Replicas(root)
    return frozenset(
        product.number * len(ROLES) + place
        for product in ledger.clock.products(ledger)
        if (module := product.owner()) is not None
        for place, role in enumerate(ROLES)
        if role in replicas.repeated(module, product.weight())
    )


class Replicas:
    """What is repeated of the products of a model, as it is wrapped at one time."""

    def __init__(self, root: nn.Module | None) -> None:
        self._finder = Finder(root)
        self._managed = {} if root is None else _managed(root)

    def repeated(self, module: nn.Module, own: Tensor | None) -> frozenset[Role]:
        """Return the operands of a product that a lower rank casts as well; `own`: its weight."""
        weight = own if own is not None else next(module.parameters(), None)
        if weight is None:
            return frozenset()
        found = set[Role]()
        managed = self._managed.get(id(weight))
        spec = getattr(weight, "_spec", None) or getattr(weight, "_st_info", None)
        copies = self._finder.wrapped_by(module)
        if managed is not None:
            spec = whole_spec(managed)
            copies = (*copies, *_groups_with_copies(managed))
        if any(dist.get_rank(group) > 0 for group in copies):
            found.add("weight")
        if spec is None:
            return frozenset(found)
        for number, placement in enumerate(spec.placements):
            if spec.mesh.get_local_rank(number) == 0:
                continue
            if placement.is_shard():
                found.add(_ALIKE[placement.dim % 2])
            elif placement.is_replicate():
                found.add("weight")
        return frozenset(found)


def _groups_with_copies(managed: Any) -> list[Any]:
    """Return the groups of FSDP2 whose ranks all cast a whole parameter.

    Where codes are gathered in its place, each rank casts its own shard.
    """
    info = managed.mesh_info
    shard = getattr(managed.sharded_param, "_local_tensor", None)
    is_ours = type(shard).__module__.startswith("unclamp.")
    if is_ours and hasattr(shard, "fsdp_pre_all_gather"):
        between = getattr(info, "replicate_process_group", None)
        return [] if between is None else [between]
    return info.mesh.get_all_groups()


def _managed(root: nn.Module) -> dict[int, Any]:
    """Return FSDP2's parameters, by the ids of shard and whole."""
    found = {}
    for parameter in sharded_parameters(root):
        for name in ("sharded_param", "_unsharded_param"):
            if (tensor := getattr(parameter, name, None)) is not None:
                found[id(tensor)] = parameter
    return found
