"""Which layers of a model `convert` takes, and why it leaves the others alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unclamp.errors import ConvertError
from unclamp.names import shown
from unclamp.nn.converted import Converted
from unclamp.nn.kinds import is_relative, kind_of
from unclamp.rule import matches

CONVERTIBLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def candidates(
    model: nn.Module, skip: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to convert, by name, and why others with a weight matrix are left alone."""
    converted: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    read_elsewhere = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for fqn, module in model.named_modules():
        reason = _reason_to_skip(fqn, module, skip)
        if reason is None and module in read_elsewhere:
            reason = (
                f"its weight is read by nn.MultiheadAttention, which never calls it "
                f"({type(module).__name__})"
            )
        if reason is None:
            converted[fqn] = module
        elif reason:
            skipped[fqn] = reason
    return converted, skipped


def _reason_to_skip(fqn: str, module: nn.Module, skip: Sequence[str]) -> str | None:
    """Why a module is left alone: None if it is converted, "" if there is nothing to say."""
    weight = getattr(module, "weight", None)
    if isinstance(module, Converted):
        return "already converted; unclamp.switch changes its scaling"
    kind = kind_of(module)
    if kind is None and not is_relative(module):
        has_matrix = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        return f"not a linear layer ({type(module).__name__})" if has_matrix else ""
    glob = next((glob for glob in skip if matches(fqn, glob)), None)
    if glob is not None:
        return f"matches skip {glob!r}"
    if kind is None:
        return (
            f"a subclass of nn.Linear with a forward of its own ({type(module).__name__}), which "
            "may compute differently"
        )
    if weight is None or weight.dtype not in CONVERTIBLE_DTYPES:
        return f"its weight is {getattr(weight, 'dtype', None)}, not float32, bfloat16 or float16"
    if not _is_memory(weight):
        return f"its weight is a {type(weight).__name__}, which holds other data than it shows"
    if parametrize.is_parametrized(module):
        return "it is parametrized, which takes its class for its own: convert it first"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, which would bypass the casts"
    return None


def _is_memory(weight: Tensor) -> bool:
    """Whether a weight is what it seems: a tensor, a shard of one (DTensor), or its like without
    data (FakeTensor).
    """  # noqa: D205
    return type(weight) in (Tensor, nn.Parameter) or type(weight).__module__.startswith(
        ("torch.distributed", "torch._subclasses")
    )


def product_names(model: nn.Module) -> list[str]:
    """Return the names of the layers that are matrix products, converted or not."""
    return [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, Converted) or is_relative(module) or kind_of(module) is not None
    ]


def device_of(module: nn.Module) -> torch.device:
    """Return where a layer lies: its weight."""
    assert isinstance(module.weight, Tensor)
    return module.weight.device


def check_devices(devices: Mapping[str, torch.device]) -> None:
    """Raise where layers lie on several devices: a ledger has one. Meta stands for any."""
    first: dict[torch.device, str] = {}
    for fqn, device in devices.items():
        if device.type != "meta":
            first.setdefault(device, fqn)
    if len(first) > 1:
        found = ", ".join(f"{shown(fqn)} on {device}" for device, fqn in first.items())
        raise ConvertError(
            f"expected the layers of one model on one device, got {found}; convert the parts that "
            "lie on one device each by itself"
        )
