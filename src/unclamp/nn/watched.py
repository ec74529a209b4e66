"""The matrix products of a step, found by the operators that run, forward and backward.

A dispatch mode sees every operator below autograd. The product that a backward's operator belongs
to is found by the number of autograd's node, which was made just before the forward's operator
ran. Modules are followed by hooks; the model is a copy, made for this.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unclamp.names import joined
from unclamp.nn.accounts import Account
from unclamp.nn.flops import (
    Gemm,
    attention,
    gradients_of,
    is_product,
    name_of,
    products_of,
)
from unclamp.nn.marks import Mark, Marks, storage_of
from unclamp.nn.named import named_modules
from unclamp.nn.operands import Operands

KNOWN_NAMESPACES = ("aten", "prim", "prims", "unclamp", "transformers", "profiler", "c10d",
                    "_c10d_functional", "higher_order", "debugprims", "rngprims")  # fmt: skip


@dataclass(eq=False, kw_only=True)
class Call:
    """One forward of a product, and the gradients that came back.

    Attributes:
        fqn: Name of the module that computed it, "" for the model itself.
        module: That module; None where none was entered.
        label: `qk`, `pv`, or "".
        weight: The mark of the operand that is a weight; None without one.
        inside: The operands of the converted product that it is; empty if it is none.
        sizes: M, N and K.
        flops: Of one GEMM.
        wants: Whether the input and the weight want a gradient, of attention's products.
        grads: How often the gradient of the input and that of the weight were computed.
    """

    fqn: str
    module: nn.Module | None
    label: str
    weight: Mark | None
    inside: tuple[Operands, ...]
    sizes: tuple[int, int, int]
    flops: int
    storages: tuple[int | None, int | None]
    is_second: bool = True
    wants: tuple[bool, bool] = (True, True)
    grads: list[int] = field(default_factory=lambda: [0, 0])

    def came_back(self, operands: Sequence[Tensor]) -> None:
        """Note a GEMM of its backward, of two operands, one of which is the forward's other."""
        found = {storage_of(x) for x in operands}
        a, b = (storage is not None and storage in found for storage in self.storages)
        if a and b and self.storages[0] != self.storages[1]:
            return  # the forward, computed again
        # With the weight at hand the gradient is that of the input.
        has_weight, has_input = (b, a) if self.is_second else (a, b)
        wanted = 0 if has_weight else 1 if has_input else int(self.grads[0] > 0)
        if self.grads[wanted] and not self.grads[1 - wanted]:
            wanted = 1 - wanted
        if not self.grads[wanted]:
            self.grads[wanted] = 1


class Watch(TorchDispatchMode):
    """Sees the products of what runs in it.

    Attributes:
        calls: Each product's forward, in order.
        unknown: Operators of libraries of which it knows none.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, account: Account) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.unknown: dict[str, None] = {}
        self._account = account
        self._names = {module: str(fqn) for fqn, module in named_modules(model)}
        self._stack: list[nn.Module] = []
        self._called: set[nn.Module] = set()
        self._of_node: dict[int, list[Call]] = {}
        self._marks = Marks()
        self._attention: list[Call] = []
        self._again: dict[tuple[str, tuple[int, int, int]], list[Call]] = {}
        names: dict[int, list[str]] = {}
        for name, tensor in _named_tensors(model):
            address = storage_of(tensor)
            if address is not None:
                names.setdefault(address, []).append(name)
                self._marks.put(tensor, Mark("weight", tuple(names[address])))

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether compilers may leave it out: it is no part of the computation."""
        return True

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follow which module is being called."""
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self._stack.append(module)
        self._called.add(module)

    def idle(self) -> list[str]:
        """Return the modules with weight matrices that were not called, nor read by others."""
        read = {name.rpartition(".")[0] for c in self.calls if c.weight for name in c.weight.names}
        return [
            fqn
            for module, fqn in self._names.items()
            if module not in self._called
            and fqn not in read
            and not isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.ParameterList)
            and any(p.ndim >= 2 for p in module.parameters(recurse=False))
        ]

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if module in self._stack:  # what an exception left behind goes too
            del self._stack[len(self._stack) - 1 - self._stack[::-1].index(module) :]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and note which products it is."""
        out = _run(func, args, kwargs or {})
        namespace = getattr(func, "namespace", "aten")
        if namespace not in KNOWN_NAMESPACES and not is_product(func):
            self.unknown.setdefault(name_of(func))
        node = torch._C._current_autograd_node()
        if node is not None and not torch.is_grad_enabled() and not self._stack:
            self._backward(func, args, self._of_node.get(node._sequence_nr()), node)
            return out
        gemms = products_of(func, args, out)
        if not gemms:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self._marks.follow(name_of(func), inputs, outputs)
        elif self._attention:
            self._part_of_attention(gemms)
        else:
            for gemm in gemms:
                call = self._forward(gemm)
                if call.weight is None and isinstance(out, Tensor) and not gemm.label:
                    self._marks.put(out, Mark("scores", source=call))
        return out

    # ---- forward ---------------------------------------------------------------------------

    def _forward(self, gemm: Gemm) -> Call:
        """Note a product, and which of autograd's nodes is its own."""
        call = self._call(gemm)
        self._belongs(call)
        return call

    def _call(self, gemm: Gemm) -> Call:
        module = self._stack[-1] if self._stack else None
        fqn = "" if module is None else self._names[module]
        a, b = (self._marks.of(x) for x in (gemm.a, gemm.b))
        weights = [m for m in (b, a) if m is not None and m.kind == "weight"]
        weight = weights[0] if weights and not gemm.label else None
        label = gemm.label
        if not label and weight is None:
            chances = next((m for m in (a, b) if m is not None and m.kind == "chances"), None)
            if chances is not None:
                chances.source.label, label = "qk", "pv"
        call = Call(
            fqn=fqn,
            module=module,
            label=label,
            weight=weight,
            inside=self._account.inside,
            sizes=gemm.sizes,
            flops=gemm.flops,
            storages=(storage_of(gemm.a), storage_of(gemm.b)),
            is_second=weight is None or weight is b,
        )
        return self._noted(call)

    def _noted(self, call: Call) -> Call:
        """Return the call; the first one, where a backward computes a forward again."""
        key = (call.fqn, call.sizes)
        if torch._C._current_graph_task_id() == -1:
            self.calls.append(call)
            self._again.setdefault(key, []).append(call)
            return call
        before = self._again.get(key)
        if not before:
            self.calls.append(call)
            return call
        # Backward goes from the last call of a module to the first.
        waiting = [c for c in before if not sum(c.grads)] or before
        same = [c for c in waiting if c.storages == call.storages]
        again = (same or waiting)[-1]
        again.storages = call.storages
        return again

    def _belongs(self, call: Call) -> None:
        # Autograd makes a node just before its operator runs; inside of a function that someone
        # wrote, the function's own is the last one.
        number = torch.autograd._get_sequence_nr() - 1  # pyright: ignore
        self._of_node.setdefault(number, []).append(call)

    # ---- attention -------------------------------------------------------------------------

    def attend(self, run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run `F.scaled_dot_product_attention`, whose products are two whichever way it goes."""
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args,
                         strict=False)) | kwargs  # fmt: skip
        q, k, v = (named[name] for name in ("query", "key", "value"))
        before = self._attention
        calls = []
        for gemm in attention(q, k, v, is_causal=bool(named.get("is_causal", False))):
            calls.append(self._call(gemm))
        qk, pv = calls
        qk.wants = (q.requires_grad, k.requires_grad)
        pv.wants = (q.requires_grad or k.requires_grad, v.requires_grad)
        self._attention = calls
        try:
            return run(*args, **kwargs)
        finally:
            self._attention = before

    def _part_of_attention(self, gemms: list[Gemm]) -> None:
        """Note which node belongs to which of attention's two products."""
        if len(gemms) == 2:  # one operator that computes both
            for call in self._attention:
                self._belongs(call)
            return
        call, *rest = self._attention
        call.storages = (storage_of(gemms[0].a), storage_of(gemms[0].b))
        self._belongs(call)
        self._attention = rest

    # ---- backward --------------------------------------------------------------------------

    def _backward(
        self, func: Any, args: Sequence[Any], calls: list[Call] | None, node: Any
    ) -> None:
        is_both = gradients_of(func, args)
        gemms = [] if is_both else products_of(func, args, None)
        if not (is_both or gemms):
            return
        if not calls:
            for gemm in gemms:
                self._call(gemm).label = f"in {node.name()}"
            return
        if is_both:
            for call in calls:
                for which, is_made in enumerate(is_both):
                    call.grads[which] = int(is_made and call.wants[which])
            return
        for gemm in gemms:
            call = _nearest(calls, gemm)
            call.came_back((gemm.a, gemm.b))


class Functions(TorchFunctionMode):
    """Hands attention to the watch before torch chooses an operator for it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        if func is F.scaled_dot_product_attention:
            return self._watch.attend(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters, then all buffers, by each of their names without wrappers."""
    modules = named_modules(model, remove_duplicate=False)
    for fqn, module in modules:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield str(joined(fqn, name)), parameter
    for fqn, module in modules:
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield str(joined(fqn, name)), buffer


def _nearest(calls: list[Call], gemm: Gemm) -> Call:
    """Return which of a node's products a GEMM of its backward belongs to."""
    if len(calls) == 1:
        return calls[0]
    found = {storage_of(gemm.a), storage_of(gemm.b)}
    same = [c for c in calls if found & {s for s in c.storages if s is not None}]
    open_ = [c for c in same or calls if sum(c.grads) < 2 and c.flops == gemm.flops]
    return (open_ or same or calls)[0]


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator. Of shapes alone torch has a grouped product in bfloat16 only."""
    is_fake = name_of(func) == "_grouped_mm" and isinstance(args[0], torch._subclasses.FakeTensor)
    if not is_fake or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    dtype = args[0].dtype
    a, b = (x.to(torch.bfloat16) for x in args[:2])
    return func(a, b, *args[2:], **kwargs).to(dtype)
