"""Layers whose weights torch's own modules would read past them, and how they are led to call them.

In evaluation `nn.TransformerEncoderLayer` computes itself in one call, from the weights of its
layers, which are never called: FP8 would be left out unsaid. It keeps off that *fast path* where
any module in it has a forward hook, which torch's own text gives as a reason ("forward pre-/hooks
are attached to the module"). So a converted layer in it gets a hook that does nothing.
"""

from typing import Any

from torch import nn

from unclamp.nn.products import products_in


def keep_off(model: nn.Module) -> None:
    """Have the encoder layers of a model call their converted layers, in evaluation too.

    Those that are only observed stay as they are: their model is to be the plain one, bit for bit.
    """
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoderLayer):
            continue
        for module in encoder.modules():
            if any(not own.ledger.observes for own in products_in(module).values()):
                allow(module)  # converted once more: one is enough
                module.register_forward_pre_hook(_do_nothing)


def allow(module: nn.Module) -> None:
    """Take the hook away from a module, if it has it; a copied module has it under its own key."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _do_nothing]:
        del hooks[key]


def _do_nothing(_module: nn.Module, _args: Any) -> None:
    """Be a hook."""
