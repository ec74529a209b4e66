"""Which products of a model `convert` takes, and why it leaves the others alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unclamp.errors import ConvertError
from unclamp.names import joined, shown
from unclamp.nn.adapted import Adapted
from unclamp.nn.adapters import SUM, adapted_parameters, find_adapters
from unclamp.nn.beside import find_left
from unclamp.nn.experts import unknown_banks
from unclamp.nn.kinds import is_relative, kind_of
from unclamp.nn.named import named_modules
from unclamp.nn.products import Matrix, products_in
from unclamp.nn.routers import find_routers
from unclamp.numerics.gpu import architecture
from unclamp.numerics.gpu.formats import native_format
from unclamp.rule import LayerPlan, Rule, matches

CONVERTED, SKIPPED = "already converted", "matches skip"
"""How reasons begin that stand before any other."""
QUANTISED = "its weights are quantised"
OTHER_DATA = "which holds other data than it shows"
CONVERTIBLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Candidate(NamedTuple):
    """A product to convert: its module, its name within that, its second operand."""

    module: nn.Module
    name: str
    matrix: Matrix


def candidates(
    model: nn.Module,
    skip: Sequence[str],
    rules: Sequence[Rule] = (),
    *,
    observes: bool = False,
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the products to convert, by name, and why other weight matrices are left alone.

    Where a model `observes`, some are observed that are never converted.
    """
    converted: dict[str, Candidate] = {}
    skipped: dict[str, str] = {}
    sums = adapted_parameters(model)
    for fqn, module in named_modules(model):
        reason = _reason_to_skip(fqn, module, skip, observes=observes)
        if reason:
            skipped[fqn] = reason
        for name, matrix in _matrices(module).items() if reason is None else ():
            product = joined(fqn, name)
            glob = next((glob for glob in skip if matches(product, glob)), None)
            if glob is not None:
                skipped[product] = skipped_by(glob)
            elif name and matrix.parameter in sums.get(module, ()):
                skipped[product] = SUM
            else:
                converted[product] = Candidate(module, name, matrix)
    for fqn in _read_elsewhere(model, {c.module for c in converted.values()}):
        if (own := converted.pop(fqn, None)) is not None:
            name = type(own.module).__name__
            skipped[fqn] = (
                f"its weight is read by nn.MultiheadAttention, which never calls it ({name})"
            )
    outputs = {fqn: c.matrix.shape[0] for fqn, c in converted.items() if not c.name}
    left = {**find_adapters(model, rules), **find_routers(model, outputs, rules)}
    if not observes:
        left = find_left(dict(named_modules(model)), outputs, list(rules)) | left
    left = {fqn: why for fqn, why in left.items() if not _is_decided(skipped.get(fqn, ""))}
    return {k: c for k, c in converted.items() if k not in left}, skipped | left


def _is_decided(why: str) -> bool:
    """Whether a layer is left alone by the user's word, or converted already."""
    return why.startswith((CONVERTED, SKIPPED))


def _read_elsewhere(model: nn.Module, converted: set[nn.Module]) -> list[str]:
    """Return layers whose weight their parent reads: one that is converted calls them."""
    return [
        joined(fqn, "out_proj")
        for fqn, module in named_modules(model)
        if isinstance(module, nn.MultiheadAttention)
        and not isinstance(module, Adapted)
        and module not in converted
    ]


def _matrices(module: nn.Module) -> dict[str, Matrix]:
    """Return the second operands of a module's products, by name within it, converted or not."""
    if isinstance(module, Adapted):
        return module.matrices(module)
    kind = kind_of(module)
    return {} if kind is None else kind.adaptor.matrices(module)


def _names(module: nn.Module, *, of_weights: bool) -> list[str]:
    """Return the names of a module's products within it."""
    parameters = {name: own.weight_name for name, own in products_in(module).items()}
    parameters |= {name: matrix.parameter for name, matrix in _matrices(module).items()}
    return [name for name, own in parameters.items() if own is not None or not of_weights]


def skipped_by(glob: str) -> str:
    """Return why a product is left alone that a skip glob matches."""
    return f"{SKIPPED} {glob!r}"


def _reason_to_skip(
    fqn: str, module: nn.Module, skip: Sequence[str], *, observes: bool
) -> str | None:
    """Why a module is left alone: None if it is converted, "" if there is nothing to say."""
    if isinstance(module, Adapted):
        return f"{CONVERTED}; unclamp.switch changes its scaling"
    kind = kind_of(module)
    if kind is None and not is_relative(module):
        has_matrix = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        return _quantised(module) or _no_layer(module) if has_matrix else ""
    glob = next((glob for glob in skip if matches(fqn, glob)), None)
    if glob is not None:
        return skipped_by(glob)
    if kind is None:
        return _quantised(module) or (
            f"a subclass of nn.Linear with a forward of its own ({type(module).__name__}), which "
            "may compute differently"
        )
    if kind.adaptor.only_observes and not observes:
        return kind.adaptor.only_observes
    if (why := kind.adaptor.why_not(module)) is not None:
        return why
    names = (matrix.parameter for matrix in kind.adaptor.matrices(module).values())
    for name in dict.fromkeys(name for name in names if name is not None):
        weight = getattr(module, name, None)
        if (why := _quantised(module, name)) is not None:
            return why
        if weight is None or weight.dtype not in CONVERTIBLE_DTYPES:
            is_of = getattr(weight, "dtype", None)
            return f"its {name} is {is_of}, not float32, bfloat16 or float16"
        if not _is_memory(weight):
            return f"its {name} is a {type(weight).__name__}, {OTHER_DATA}"
    if parametrize.is_parametrized(module):
        return "it is parametrized, which takes its class for its own: convert it first"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, which would bypass the casts"
    return None


def _quantised(module: nn.Module, name: str = "") -> str | None:
    """Say that a module's weights are codes, of eight bits or fewer, or packed; None: no."""
    kinds = [
        parameter.dtype
        for own, parameter in module.named_parameters(recurse=False)
        if own == (name or own) and parameter.ndim >= 2
    ]
    kinds = [d for d in kinds if d != torch.bool and not d.is_complex]
    codes = [d for d in kinds if d.itemsize == 1 or not d.is_floating_point]
    if not codes:
        return None
    return f"{QUANTISED} ({type(module).__name__}, {str(codes[0]).removeprefix('torch.')})"


def are_quantised(skipped: Mapping[str, str]) -> dict[str, str]:
    """Return the layers that are left alone because their weights are quantised, and why."""
    return {
        fqn: why
        for fqn, why in skipped.items()
        if why.startswith(QUANTISED) or why.endswith(OTHER_DATA)
    }


def _no_layer(module: nn.Module) -> str:
    said = f"not a linear layer ({type(module).__name__})"
    banks = ", ".join(f"{name} {shape}" for name, shape in unknown_banks(module).items())
    if not banks:
        return said
    return (
        f"{said}; if {banks} is a bank of matrices, [E, K, N], its forward does not multiply by it "
        "in any function known here: use unclamp.grouped_mm (docs/experts.md)"
    )


def _is_memory(weight: Tensor) -> bool:
    """Whether a weight is what it seems: a tensor, a shard of one (DTensor), or its like without
    data (FakeTensor).
    """  # noqa: D205
    return type(weight) in (Tensor, nn.Parameter) or type(weight).__module__.startswith(
        ("torch.distributed", "torch._subclasses")
    )


def product_names(model: nn.Module, *, of_weights: bool = False) -> list[str]:
    """Return the names of the model's matrix products, converted or not.

    Args:
        model: Whose.
        of_weights: Leave those out whose operands are both computed.
    """
    return [
        joined(fqn, name)
        for fqn, module in named_modules(model)
        for name in ([""] if is_relative(module) else _names(module, of_weights=of_weights))
    ]


def device_of(module: nn.Module, weight_name: str | None) -> torch.device:
    """Return where a product lies: where its weight does, or else its module."""
    weight = None if weight_name is None else getattr(module, weight_name)
    weight = next(module.parameters(), None) if weight is None else weight
    return torch.device("meta") if weight is None else weight.device


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


def native_plan(plan: LayerPlan, device: torch.device) -> LayerPlan:
    """Return a plan in the formats that a device multiplies (`numerics.gpu.formats`)."""
    arch = architecture(device)
    operands = {
        role: replace(operand, format=native_format(operand.format, arch))
        for role, operand in plan.operands.items()
    }
    return plan if operands == plan.operands else replace(plan, operands=operands)
