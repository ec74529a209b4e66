"""What modules are called: without the parts that wrappers put between them.

DDP, FSDP1, `torch.compile`, activation checkpointing, averages and PEFT put a module around
another, and a part into every name below it: `q_proj.base_layer`, `module.layers.0`. A run of a
wrapped model has the names of the plain one, whichever was first, the wrapper or the conversion.
The keys of a state_dict are torch's own, and stay.

A part is a wrapper's by the class of what is around: an attribute of a user's own may be called
`module` too.
"""

import copy
from collections.abc import Collection
from types import FrameType

from torch import nn

from unclamp.names import without_wrappers

PRIVATE = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "_original_module",
)
"""Attributes of wrappers of torch and Lightning Fabric, which nobody else has."""
WITH_MODULE = frozenset(
    {
        ("torch", "DistributedDataParallel"),
        ("torch", "DataParallel"),
        ("torch", "AveragedModel"),
        ("deepspeed", "DeepSpeedEngine"),
        ("megatron", "_BaseDataParallel"),
        ("megatron", "DistributedDataParallelBase"),
        ("megatron", "DistributedDataParallel"),
        ("megatron", "FullyShardedDataParallel"),
        ("megatron", "Float16Module"),
        ("apex", "DistributedDataParallel"),
    }
)
"""Wrappers that call what they wrap `module`: library and class."""
ADAPTED = "base_layer"
"""What PEFT's layers call the layer that they adapt."""
TOKENS = "token_adapter"
"""What PEFT calls the layer that trains some rows of another."""
ORIGINAL, COPIES = "original_module", "modules_to_save"
"""What PEFT calls a module that an adapter trains a copy of, and the copies."""


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, nn.Module]]:
    """Return a model's modules by their names without wrappers, in torch's order.

    A wrapper comes before what it wraps, and may have its name.
    """
    found = list(model.named_modules(remove_duplicate=remove_duplicate))
    modules = dict(found)
    put_in, copies = set[str](), set[str]()
    for path in modules:
        above, _, last = path.rpartition(".")
        parent = modules.get(above)
        if not path or parent is None:
            continue
        if is_put_in(parent, last):
            put_in.add(path)
        elif last == COPIES and ORIGINAL in parent._modules:
            copies.add(path)
            copies |= {f"{path}.{name}" for name in parent._modules[COPIES]._modules}
    names = without_wrappers([(path, id(m)) for path, m in found], put_in, copies)
    return [(name, module) for name, (_, module) in zip(names, found, strict=True)]


def is_put_in(parent: nn.Module, name: str) -> bool:
    """Whether a module is a wrapper of its child of this name."""
    if name in PRIVATE:
        return True
    if name not in ("module", ADAPTED, ORIGINAL, TOKENS, "base_model", "model"):
        return False
    if any(parameter.ndim >= 2 for parameter in parent.parameters(recurse=False)):
        return False  # it may be a product itself, which needs the name
    if name == ORIGINAL:
        return COPIES in parent._modules or is_of(parent, ("peft",))
    if name == ADAPTED:
        return isinstance(getattr(parent, "adapter_layer_names", None), tuple | list)
    if name == "module":
        return any(
            (base.__module__.partition(".")[0], base.__name__) in WITH_MODULE
            for base in type(parent).__mro__
        )
    return is_of(parent, ("peft",))


def is_copied_by(library: str, frame: FrameType | None) -> bool:
    """Whether a frame is inside of a deep copy that a library makes.

    PEFT copies whole modules for an adapter to train, and takes all that their state_dict holds
    into the adapter's file. Nothing of a copy says so before PEFT has put it in its place.
    """
    while frame is not None and frame.f_globals.get("__name__") == copy.__name__:
        frame = frame.f_back
    name = "" if frame is None else str(frame.f_globals.get("__name__"))
    return name.partition(".")[0] == library


def is_of(module: nn.Module, libraries: Collection[str]) -> bool:
    """Whether a module's class, or one that it derives from, is of one of these libraries."""
    return any(base.__module__.partition(".")[0] in libraries for base in type(module).__mro__)
