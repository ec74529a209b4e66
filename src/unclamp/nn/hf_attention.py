"""The attention of transformers' models, at the door that they all have: `AttentionInterface`.

A model's attention module looks up, by its config, the function that computes, and hands it itself
and its queries, keys and values. An adapted module shows its forward a copy of the config that
names the function of this file where it is looked up, and the user's own where it is compared
(`_Shown`); nobody else sees it, so that masks are made as ever and a saved config is the user's
own. The function then asks the module's products, and the one that the user's config names where
the plain attention is to compute.

`eager` and `sdpa` are known. Flash and flex attention are kernels of their own that also make the
mask: they are left alone.
"""

import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.errors import UnclampWarning
from unclamp.nn.adapted import Adapted
from unclamp.nn.attend import AttentionProducts, attend
from unclamp.nn.attention import WithAttention
from unclamp.nn.scores import Attended, Scoring

NAME = "unclamp"
"""What the function is registered as; no model's own config says it."""
KNOWN = ("eager", "sdpa")
UNKNOWN = frozenset({"logsumexp", "maybe_autocast"})
"""Calls of an eager attention that computes otherwise: probabilities that do not sum to one."""
OWN = frozenset({"sinks"})
"""Arguments by which an eager attention is told what others are not."""


class _Shown(str):
    """The user's name of an attention, under which the interface finds the function of this file.

    Forwards compare the name too: DeepSeek's sparse attention makes its mask, and GPT-2 its scores
    in float32, where it is "eager". A dict asks for the hash first, and finds `NAME`.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(NAME)

    def __eq__(self, other: object) -> bool:
        return other == NAME or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other


def _forward_of(of: type) -> Any:
    """Return the forward of a class, without decorators and without an adaptor of ours."""
    plain = next((c for c in of.__mro__ if not issubclass(c, Adapted)), of)
    return inspect.unwrap(plain.forward)


def asks_interface(module: nn.Module) -> bool:
    """Whether a module's forward looks its attention up in transformers' interface."""
    if sys.modules.get("transformers.modeling_utils") is None:
        return False
    code = getattr(_forward_of(type(module)), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


def implementation_of(module: nn.Module) -> str:
    """Return the name of the attention that a module's config asks for."""
    config = module.__dict__.get("config")
    return getattr(config, "_attn_implementation", None) or "eager"


def _named(code: CodeType) -> int:
    """Return how many arguments a function names."""
    return code.co_argcount + code.co_kwonlyargcount


def _eager_of(of: type) -> Callable[..., Any] | None:
    """Return the eager attention of a class's file, which its forward names."""
    forward = _forward_of(of)
    names = [n for n in forward.__code__.co_names if n.endswith("eager_attention_forward")]
    return forward.__globals__.get(names[0]) if len(names) == 1 else None


class Fp8InterfaceAttention(WithAttention):
    """An attention module of transformers whose operands are counted, or go through FP8."""

    config: Any

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Return why the attention of a module is left alone; None if it is not."""
        if implementation_of(module) not in KNOWN:
            return (
                f"its attention is {implementation_of(module)}, whose kernel keeps scores and "
                "masks to itself; eager and sdpa are counted"
            )
        eager = _eager_of(type(module))
        code = None if eager is None else inspect.unwrap(eager).__code__
        if code is None or UNKNOWN & {*code.co_names} or OWN & {*code.co_varnames[: _named(code)]}:
            return "its eager attention computes differently from others"
        return None

    @classmethod
    def heads(cls, module: nn.Module) -> int:
        """Return the heads of its keys, as it or its config says."""
        names = ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads", "n_head")
        for holder in (module, getattr(module, "config", None)):
            for name in names:
                found = getattr(holder, name, None)
                if isinstance(found, int):
                    return found
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain forward does, with its attention by products."""
        products = AttentionProducts.of(self)
        is_traced = torch.compiler.is_compiling() and not products.is_computed
        config = self.__dict__.get("config")
        name = implementation_of(self)
        if config is None or is_traced or name not in KNOWN:
            if products.is_computed and name not in KNOWN:
                _say_not_computed(name)
            return super().forward(*args, **kwargs)
        _register()
        shown = copy.copy(config)
        shown._attn_implementation_internal = _Shown(name)
        self.__dict__["config"] = shown
        self.__dict__["unclamp_config"] = config
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["config"] = self.__dict__.pop("unclamp_config")


@functools.cache
def _say_not_computed(name: str) -> None:
    """Tell once in a process that the model was given another attention since `convert`."""
    warnings.warn(
        f"attention computed by {name!r} keeps its scores to itself: its products are not in FP8, "
        "though the recipe names them; set_attn_implementation('sdpa') of the model has them so",
        UnclampWarning,
        stacklevel=2,
    )


def _register() -> None:
    interface: Any = sys.modules["transformers.modeling_utils"].AttentionInterface  # pyright: ignore
    if NAME not in interface._global_mapping:
        interface.register(NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return output `[B, L, H, E]` and probabilities, as functions of the interface do.

    Shapes: `query` `[B, H, L, D]`, `key` and `value` `[B, J, S, ...]`, H a multiple of J.
    """
    config = module.__dict__.get("unclamp_config")
    name = getattr(config, "_attn_implementation", None) or "eager"

    def plain() -> tuple[Tensor, Tensor | None]:
        if name == "eager":
            function = _eager_of(type(module))
            assert function is not None
        else:
            functions: Any = sys.modules["transformers.modeling_utils"]
            function = functions.ALL_ATTENTION_FUNCTIONS[name]
        return function(module, query, key, value, attention_mask, **kwargs)

    def asked() -> Attended:
        return _asked(module, name, query, key, value, attention_mask, kwargs)

    if kwargs.get("cache") is not None:  # pages, of which the kernel makes sequences
        return plain()
    products = AttentionProducts.of(module)
    output, weights = attend(
        products, asked, plain, tensors=(query, key, value), training=module.training, turns=True
    )
    if not products.is_computed:
        return output, weights
    weights = weights.to(query.dtype) if name == "eager" and weights is not None else None
    return output.contiguous(), weights


def _asked(
    module: nn.Module,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Attended:
    """Return what the interface's arguments ask for; see transformers' `sdpa_attention_forward`."""
    scale = kwargs.get("scaling")
    queries, bias = query.shape[2], kwargs.get("position_bias")
    is_causal = False
    if name == "sdpa":
        told = kwargs.get("is_causal")
        told = getattr(module, "is_causal", True) if told is None else told
        is_causal = bool(queries > 1 and mask is None and told)
    if mask is not None and mask.ndim == 4:  # as some caches are longer than what is seen
        mask = mask[..., : key.shape[2]]
    masks = tuple(each for each in (bias, mask) if each is not None)
    sinks = kwargs.get("s_aux")
    sinks = getattr(module, "sinks", None) if sinks is None else sinks
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (t.expand(batch, *t.shape[1:]) for t in (query, key, value))
    return Attended(
        q=query,
        k=key,
        v=value,
        scoring=Scoring(
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            is_causal=is_causal,
            masks=masks,
            softcap=kwargs.get("softcap"),
            sinks=sinks,
        ),
        # Eager attention drops nothing in evaluation, whatever it is told.
        dropout=kwargs.get("dropout", 0.0) if name == "sdpa" or module.training else 0.0,
    )
