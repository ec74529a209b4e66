"""What the products of a step are called, of what kind they are, and in which state, by the calls.

What ran is found in `nn.watched`; here each call gets the name of its product, whether FP8 sees it,
and if not the reason.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from unclamp.covered import CoveredProduct, State
from unclamp.nn.candidates import candidates
from unclamp.nn.experts import unknown_banks
from unclamp.nn.kinds import kind_of
from unclamp.nn.named import named_modules
from unclamp.nn.operands import Operands
from unclamp.nn.patches import are_patches
from unclamp.nn.products import products_in
from unclamp.nn.watched import Call

TWO_ACTIVATIONS = "a product of two activations"
UNKNOWN_ATTENTION = (
    f"{TWO_ACTIVATIONS}; unclamp.attention(self, q, k, v, ...) in its module makes it known"
)
ROUTER = "a router"
"""How the reason of a layer begins that chooses experts."""
UNKNOWN_BANK = (
    "a bank of matrices, [E, K, N], that its forward does not multiply by in any function known "
    "here; use unclamp.grouped_mm (docs/experts.md)"
)
NO_LAYER = "not a linear layer"
"""How the reason of a module begins of which nothing is known but that it has matrices."""


def described_products(
    calls: Sequence[Call], model: nn.Module, known: Mapping[str, str], *, is_plain: bool
) -> Iterator[CoveredProduct]:
    """Return the products that the calls are of, each once; `known` is why some are left out."""
    skipped = {**candidates(model, ())[1], **known}
    modules = dict(named_modules(model))
    merged: dict[tuple[str, State, str], CoveredProduct] = {}
    for call in calls:
        fqn, owner = _name(call)
        state, why = _state(call, owner, modules, skipped, is_plain=is_plain)
        key = (fqn, state, why)
        flops = [call.flops, *(call.flops * made for made in call.grads)]
        if key in merged:
            flops = [f + b for f, b in zip(flops, _flops(merged[key]), strict=True)]
        first = merged.get(key)
        merged[key] = CoveredProduct(
            fqn=fqn,
            module=_class_name(call.module),
            kind="router" if why.startswith(ROUTER) else _kind(call, modules.get(owner)),
            sizes=call.sizes if first is None else first.sizes,
            calls=1 if first is None else first.calls + 1,
            output=flops[0],
            grad_input=flops[1],
            grad_weight=flops[2],
            state=state,
            why=why,
        )
    return iter(merged.values())


def _flops(product: CoveredProduct) -> tuple[int, int, int]:
    return product.output, product.grad_input, product.grad_weight


def _name(call: Call) -> tuple[str, str]:
    """Return a product's name, and the name of the module that owns its weight."""
    if call.weight is None:
        return _joined(call.fqn, call.label or "matmul"), call.fqn
    inside = [n for n in call.weight.names if n.rpartition(".")[0] == call.fqn]
    name = (inside or call.weight.names)[0]
    owner, _, parameter = name.rpartition(".")
    if parameter == "weight":
        return owner, owner
    return _joined(owner, parameter.removesuffix("_weight")), owner


def _joined(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name


def _state(
    call: Call,
    owner: str,
    modules: dict[str, nn.Module],
    skipped: dict[str, str],
    *,
    is_plain: bool,
) -> tuple[State, str]:
    """Return a product's state, and why it is left out if it is."""
    own = _operands(call)
    if own is not None and not own.is_plain:
        if own.ledger.observes or getattr(own, "only_observed", False):
            return ("would be observed" if is_plain else "observed"), ""
        return ("would be converted" if is_plain else "converted"), ""
    module = modules.get(owner)
    if own is not None or (module is not None and _is_plain(module, call)):
        return "left out", "the recipe leaves it in high precision"
    if call.weight is None:
        said = [skipped.get(fqn, NO_LAYER) for fqn in (_joined(owner, call.label), owner)]
        unknown = UNKNOWN_ATTENTION if call.label in ("qk", "pv") else TWO_ACTIVATIONS
        return "left out", next((w for w in said if not w.startswith(NO_LAYER)), unknown)
    if module is not None and call.fqn == owner:
        names = {name.rpartition(".")[2] for name in call.weight.names}
        for name, shape in unknown_banks(module).items():
            if name in names:
                return "left out", f"{UNKNOWN_BANK}: {name} {shape}"
    if module is not None and products_in(module):
        return "left out", "its weight is read outside of the layer"
    if _is_router(module):
        return "left out", f"{ROUTER}, which chooses experts: left in high precision on purpose"
    if owner in skipped:
        return "left out", skipped[owner]
    if module is not None and kind_of(module) is not None:
        return "left out", "the conversion left it out"
    return "left out", f"{NO_LAYER} ({_class_name(module)})"


def _operands(call: Call) -> Operands | None:
    """Return the operands of the converted product that a call is; None if it is none."""
    if len(call.inside) < 2 and not call.label:
        return next(iter(call.inside), None)
    parameter = call.weight.names[0].rpartition(".")[2] if call.weight is not None else ""
    name = call.label or parameter.removesuffix("_weight")
    parts = [(own, [p for p in own.fqn.split(".") if not p.isdigit()]) for own in call.inside]
    return next((own for own, names in parts if names and names[-1] == name), None)


def _is_plain(module: nn.Module, call: Call) -> bool:
    """Whether a converted module casts nothing for the products of a weight."""
    names = () if call.weight is None else call.weight.names
    own = [
        each
        for each in products_in(module).values()
        if any(name.rpartition(".")[2] == each.weight_name for name in names)
    ]
    return bool(own) and all(each.is_plain for each in own)


def _kind(call: Call, owner: nn.Module | None) -> str:
    """Say what a product is, for sentences."""
    if call.label in ("qk", "pv"):
        return "attention"
    if call.weight is None:
        return call.label or "matmul"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "patches" if are_patches(owner) else "convolution"
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    parameter = getattr(owner, call.weight.names[0].rpartition(".")[2], None)
    if isinstance(parameter, Tensor) and parameter.ndim == 3:
        return "experts"
    return "linear"


def _is_router(module: nn.Module | None) -> bool:
    return "router" in _class_name(module).lower()


def _class_name(module: nn.Module | None) -> str:
    if module is None:
        return ""
    plain = getattr(type(module), "__plain__", type(module))
    return plain.__name__.removeprefix("Fp8")
