"""Which ranks hold a product: the process groups whose maxima make its amaxes one.

They are found where the training says them: in the device mesh of a parameter that is a DTensor
(FSDP2, tensor parallel, both), and in the wrapper around the module (DDP, FSDP1). What torch does
not know, such as shards made by hand, `convert(..., group=)` tells. Nothing stands for the world:
beside another job, or under a pipeline, it would be wrong.

Several groups are taken one after the other: the maximum over each dimension of a mesh in turn is
the maximum over the mesh. All ranks find the same groups in the same order, if they wrapped alike.
"""

import gc
import itertools
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unclamp.errors import ConvertError, UnclampWarning
from unclamp.nn.alive import Alive
from unclamp.nn.holders import sharded_parameters, whole_spec
from unclamp.rule import matches

Groups = tuple[Any, ...]
"""Process groups (`torch.distributed.ProcessGroup`) of more than one rank; empty: alone."""
Given = Any
"""A process group, or a sequence of several: of none where the process is alone."""

_given: "weakref.WeakKeyDictionary[nn.Module, Groups]" = weakref.WeakKeyDictionary()
_wrappers: Alive[nn.Module] = Alive()
_hooks: list[Any] = []
_changes = [0]
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
    if module in _given:
        return _given[module]
    return Finder(root).look(module).groups if is_distributed() else ()


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


def check_given(group: Given | Mapping[str, Given] | None, modules: Iterable[str]) -> None:
    """Raise a ConvertError unless these are process groups of this process.

    Groups that it is not in are let pass where nothing here has their names: other ranks have it.
    """
    names = list(modules)
    for glob, given in _by_glob(group).items():
        for one in _several(given):
            if dist.is_available() and isinstance(one, dist.ProcessGroup):
                continue
            if _is_of_others(given) and not any(matches(fqn, glob) for fqn in names):
                continue
            raise ConvertError(
                "expected process groups of torch.distributed that this process is in, for group, "
                f"or a mapping of globs to them; got {one!r} for {glob!r}"
            )


def give(modules: Mapping[str, nn.Module], group: Given | Mapping[str, Given] | None) -> None:
    """Say which groups hold modules, by their names, whatever could be found.

    Of several globs that match the first decides; what none matches is looked for.
    """
    globs = _by_glob(group)
    unmatched = [
        glob
        for glob, given in globs.items()
        if not _is_of_others(given) and not any(matches(fqn, glob) for fqn in modules)
    ]
    if unmatched:
        warnings.warn(
            f"group names {', '.join(map(repr, unmatched))}, which match no converted layer of "
            "this process",
            UnclampWarning,
            stacklevel=4,
        )
    for fqn, module in modules.items():
        glob = next((glob for glob in globs if matches(fqn, glob)), None)
        if glob is not None:
            _given[module] = of_several(_several(globs[glob]))
    _changes[0] += bool(globs)


def is_told(module: nn.Module) -> bool:
    """Whether the user said which groups hold a module."""
    return module in _given


def forget(module: nn.Module) -> None:
    """Look for a module's groups again, whatever was given."""
    _given.pop(module, None)
    _changes[0] += 1


def _by_glob(group: Given | Mapping[str, Given] | None) -> Mapping[str, Given]:
    if isinstance(group, Mapping):
        return group
    return {} if group is None else {"*": group}


def _is_of_others(given: Given) -> bool:
    """Whether this process is in none of the groups: `new_group` returns a stand-in then."""
    return dist.is_available() and given == dist.GroupMember.NON_GROUP_MEMBER


def _several(given: Given) -> Groups:
    return tuple(given) if isinstance(given, Sequence) else (given,)


def of_several(groups: Groups) -> Groups:
    """Return the groups of more than one rank, each once, in their order."""
    return tuple(g for g in dict.fromkeys(groups) if dist.get_world_size(g) > 1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Who holds a module.

    Attributes:
        groups: Whose ranks have the same product.
        of_blocks: Of these, the groups whose ranks have the same rows and blocks of its weight:
            not those over which tensor parallelism has cut it.
        is_known: Whether anything says so, be it that the process is alone.
        is_gathered: Whether its weights are put together for a forward, and let go afterwards.
        within_ddp: The DDP around it, if any; of several all.
        may_be_missed: Whether ranks are allowed to leave it out of a forward.
    """

    groups: Groups
    of_blocks: Groups
    is_known: bool
    is_gathered: bool
    within_ddp: tuple[nn.Module, ...]
    may_be_missed: bool


def _is_over_experts(parameter: nn.Parameter, placement: Any) -> bool:
    """Whether a bank is split over its experts: each one's matrix is whole where it is."""
    return parameter.ndim == 3 and placement.dim % 3 == 0


class Finder:
    """Looks for the groups of several modules of a model at one time.

    Attributes:
        root: The model; None where it is unknown.
    """

    def __init__(self, root: nn.Module | None) -> None:
        every = [] if root is None else sharded_parameters(root)
        wholes = [p for p in every if hasattr(p, "_unsharded_param")]
        self._sharded = {id(p.sharded_param): p for p in every}
        self._sharded |= {id(p._unsharded_param): p for p in wholes}
        self._around = [_Around.of(wrapper) for wrapper in _wrappers]

    def look(self, module: nn.Module) -> Found:
        """Return who holds a module."""
        parameters = list(module.parameters())
        wrappers = [a.wrapper for a in self._around if a.holds(module, parameters)]
        sharded = [p for p in (self._sharded.get(id(p)) for p in parameters) if p is not None]
        around = list(itertools.chain(*map(_groups_of_wrapper, wrappers)))
        meshes = list(filter(None, map(self._mesh_of, parameters)))
        found = [*around, *itertools.chain(*(mesh.get_all_groups() for mesh in meshes))]
        cut = list(itertools.chain(*map(self._cutting, parameters)))
        given = _given.get(module)
        groups = of_several(tuple(found)) if given is None else given
        is_ddp = [hasattr(wrapper, "parameters_to_ignore") for wrapper in wrappers]
        return Found(
            groups=groups,
            of_blocks=tuple(group for group in groups if group not in cut),
            is_known=given is not None or bool(wrappers or meshes),
            is_gathered=bool(sharded) or not all(is_ddp),
            within_ddp=tuple(w for w, of in zip(wrappers, is_ddp, strict=True) if of),
            may_be_missed=any(getattr(w, "find_unused_parameters", False) for w in wrappers),
        )

    def wrapped_by(self, module: nn.Module) -> Groups:
        """Return the groups of DDP and FSDP1 around a module: their ranks all cast its weight."""
        parameters = list(module.parameters())
        around = [a.wrapper for a in self._around if a.holds(module, parameters)]
        return of_several(tuple(itertools.chain(*map(_groups_of_wrapper, around))))

    def _mesh_of(self, parameter: nn.Parameter) -> Any:
        """Return the mesh of all ranks that have a part of a parameter; None where it has none."""
        sharded = self._sharded.get(id(parameter))
        # Put together by FSDP2, a parameter itself knows at most the mesh of tensor parallelism.
        own = parameter if sharded is None else sharded.sharded_param
        return getattr(own, "device_mesh", None) or getattr(_localized(parameter), "mesh", None)

    def _cutting(self, parameter: nn.Parameter) -> list[Any]:
        """Return the groups over which a parameter is in parts when it is computed with."""
        sharded = self._sharded.get(id(parameter))
        if sharded is not None:
            spec = whole_spec(sharded)
        else:
            spec = getattr(parameter, "_spec", None) or _localized(parameter)
        if spec is None:
            return []
        return [
            group
            for group, placement in zip(spec.mesh.get_all_groups(), spec.placements, strict=True)
            if placement.is_shard() and not _is_over_experts(parameter, placement)
        ]


def _localized(parameter: nn.Parameter) -> Any:
    """Return what a part of a DTensor knows of it: under DDP, between forwards, it is plain."""
    return getattr(parameter, "_st_info", None)


def _groups_of_wrapper(wrapper: Any) -> list[Any]:
    between_nodes = getattr(wrapper, "_inter_node_pg", None)
    return [wrapper.process_group, *([] if between_nodes is None else [between_nodes])]


@dataclass(frozen=True, kw_only=True)
class _Around:
    """What a wrapper is around.

    Attributes:
        wrapper: A DDP or FSDP1.
        modules: The modules in it, by id.
        parameters: The parameters that it takes care of, by id; none for FSDP1, which may keep
            them in a flat one.
    """

    wrapper: nn.Module
    modules: set[int]
    parameters: set[int]

    @classmethod
    def of(cls, wrapper: nn.Module) -> "_Around":
        modules = {id(module) for module in wrapper.modules()}
        modules -= {id(module) for module in getattr(wrapper, "_ignored_modules", ())}
        ignored = getattr(wrapper, "parameters_to_ignore", None)
        if ignored is None:
            return cls(wrapper=wrapper, modules=modules, parameters=set())
        named = getattr(wrapper, "module", wrapper).named_parameters()
        own = {id(p) for name, p in named if name not in ignored}
        return cls(wrapper=wrapper, modules=modules, parameters=own)

    def holds(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether it takes care of a module: by parameters, for a composable one has no more."""
        own = list(parameters)
        if own and self.parameters:
            return any(id(p) in self.parameters for p in own)
        return id(module) in self.modules


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
        known: dict[int, bool] = {}  # of half a million things, a few thousand classes
        for thing in gc.get_objects():
            kind = type(thing)  # and not isinstance, which may run a proxy's code
            if (is_one := known.get(id(kind))) is None:
                is_one = known[id(kind)] = issubclass(kind, kinds)
            if is_one:
                _wrappers.add(thing)


def version() -> tuple[int, int]:
    """Return what changes with the wrappers and groups that are known."""
    return _changes[0], len(_wrappers)


def _note_wrapper(module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
    if isinstance(module, _wrapper_classes()):
        _changes[0] += 1
        _wrappers.add(module)


def _wrapper_classes() -> tuple[type, ...]:
    """Return the classes of wrappers that are imported: none is loaded only to be looked for."""
    loaded = [(sys.modules.get(module), name) for module, name in _WRAPPERS]
    return tuple(c for m, name in loaded if (c := getattr(m, name, None)) is not None)
