"""Which ranks hold a product: the process groups whose maxima make its amaxes one.

They are found where the training says them: in the device mesh of a parameter that is a DTensor
(FSDP2, tensor parallel, both), and in the wrapper around the module (DDP, FSDP1). What torch does
not know, such as shards made by hand, `convert(..., group=)` tells. Nothing stands for the world:
beside another job, or under a pipeline, it would be wrong.

Several groups are taken one after the other: the maximum over each dimension of a mesh in turn is
the maximum over the mesh. All ranks find the same groups in the same order, if they wrapped alike.
"""

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unclamp.nn.alive import Alive
from unclamp.nn.holders import shards

Groups = tuple[Any, ...]
"""Process groups (`torch.distributed.ProcessGroup`) of more than one rank; empty: alone."""

_given: "weakref.WeakKeyDictionary[nn.Module, Groups]" = weakref.WeakKeyDictionary()
_wrappers: Alive[nn.Module] = Alive()
_hooks: list[Any] = []
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
)


def groups_of(module: nn.Module, root: nn.Module | None) -> Groups:
    """Return the groups whose maxima, one after the other, are those over all that hold a module.

    Args:
        module: The module with the product's parameters.
        root: The model that it is part of, for what FSDP2 put together; None: unknown.
    """
    return Finder(root).groups_of(module)


def max_over(groups: Groups, x: Tensor) -> Tensor:
    """Return the maximum of a tensor over groups, float32, in memory of its own.

    Every rank of the groups has to come by. `x` is to be finite: what a NaN comes to depends on
    the rank that it lies on (gloo keeps it on rank 0, and drops it elsewhere).
    """
    agreed = x.detach().to(torch.float32, copy=True)
    for group in groups:
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    return agreed


def is_distributed() -> bool:
    """Whether this process is one of several that know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def give(module: nn.Module, groups: Groups | None) -> None:
    """Say which groups hold a module, whatever could be found; None: find them again."""
    if groups is None:
        _given.pop(module, None)
    else:
        _given[module] = of_several(groups)


def is_told(module: nn.Module) -> bool:
    """Whether the user said which groups hold a module."""
    return module in _given


def of_several(groups: Groups) -> Groups:
    """Return the groups of more than one rank, each once, in their order."""
    return tuple(g for g in dict.fromkeys(groups) if dist.get_world_size(g) > 1)


class Finder:
    """Looks for the groups of several modules of a model at one time.

    Attributes:
        root: The model; None where it is unknown.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self.root = root
        self._shards: dict[int, Tensor] | None = None
        self._around: list[tuple[nn.Module, set[int], set[int]]] | None = None

    def groups_of(self, module: nn.Module) -> Groups:
        """Return what `groups_of` does."""
        if module in _given:
            return _given[module]
        if not is_distributed():
            return ()
        parameters = list(module.parameters())
        found = [*self._of_wrappers(module, parameters), *self._of_meshes(parameters)]
        return of_several(tuple(found))

    def is_known(self, module: nn.Module) -> bool:
        """Whether anything says who holds a module, be it this rank alone."""
        if module in _given:
            return True
        parameters = list(module.parameters())
        if any(True for _ in self._meshes(parameters)):
            return True
        return any(True for _ in self._of_wrappers(module, parameters))

    def wrapped_by(self, module: nn.Module) -> Groups:
        """Return the groups of DDP and FSDP1 around a module: their ranks all cast its weight."""
        return of_several(tuple(self._of_wrappers(module, list(module.parameters()))))

    def _of_meshes(self, parameters: list[nn.Parameter]) -> Iterator[Any]:
        for mesh in self._meshes(parameters):
            yield from mesh.get_all_groups()

    def _meshes(self, parameters: list[nn.Parameter]) -> Iterator[Any]:
        for parameter in parameters:
            # Put together by FSDP2, a parameter knows at most the mesh of tensor parallelism.
            own = self._shard_of(parameter)
            # Under DDP the parts of a DTensor are plain tensors between forwards.
            spec = getattr(parameter, "_st_info", None)
            mesh = getattr(own, "device_mesh", None) or getattr(spec, "mesh", None)
            if mesh is not None:
                yield mesh

    def _shard_of(self, parameter: nn.Parameter) -> Tensor:
        if self._shards is None:
            self._shards = {} if self.root is None else shards(self.root)
        return self._shards.get(id(parameter), parameter)

    def _of_wrappers(self, module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Any]:
        if self._around is None:
            self._around = [(w, *_reach(w)) for w in _wrappers]
        for wrapper, modules, own in self._around:
            # A composable wrapper has the parameters, and not the module.
            has_some = any(id(p) in own for p in parameters)
            if has_some if parameters and own else id(module) in modules:
                yield wrapper.process_group
                between_nodes = getattr(wrapper, "_inter_node_pg", None)
                if between_nodes is not None:
                    yield between_nodes


def _reach(wrapper: nn.Module) -> tuple[set[int], set[int]]:
    """Return the modules that a wrapper is around, and the parameters it takes care of, by id.

    No parameters for FSDP1, which may keep them in a flat one.
    """
    ignored = getattr(wrapper, "parameters_to_ignore", None)
    modules = {id(module) for module in wrapper.modules()}
    modules -= {id(module) for module in getattr(wrapper, "_ignored_modules", ())}
    if ignored is None:
        return modules, set()
    own = getattr(wrapper, "module", wrapper)
    return modules, {id(p) for name, p in own.named_parameters() if name not in ignored}


# ---- wrappers ----------------------------------------------------------------------------------


def follow_wrappers() -> None:
    """Know of every DDP and FSDP1 module from now on: a wrapped model has no way back to its own.

    Those that are there are searched for once; later ones come by when they register what they
    wrap.
    """
    if _hooks:
        return
    _hooks.append(nn.modules.module.register_module_module_registration_hook(_note_wrapper))
    kinds = _wrapper_classes()
    if dist.is_available() and dist.is_initialized() and kinds:
        for thing in gc.get_objects():
            if issubclass(type(thing), kinds):  # not isinstance, which may run a proxy's code
                _wrappers.add(thing)


def count_wrappers() -> int:
    """Return how many wrappers live; where it changes, groups may have."""
    return len(_wrappers)


def _note_wrapper(module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
    if isinstance(module, _wrapper_classes()):
        _wrappers.add(module)


def _wrapper_classes() -> tuple[type, ...]:
    """Return the classes of wrappers that are imported: none is loaded only to be looked for."""
    loaded = [(sys.modules.get(module), name) for module, name in _WRAPPERS]
    return tuple(c for m, name in loaded if (c := getattr(m, name, None)) is not None)
