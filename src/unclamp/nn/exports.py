"""What of a converted model goes into files that are for others: its weights.

transformers' `save_pretrained` takes a state_dict, and leaves out the keys that a model names in
`_keys_to_ignore_on_save`: each layer puts its own there, under the names of that very state_dict,
since modules are put elsewhere (wrapped, merged) after they were converted. PEFT takes from the
state_dict what lies in its adapters, so what is converted there saves no scaling state: its next
tensor seeds it.
"""

from collections.abc import Iterator

from torch import nn

from unclamp.nn.named import COPIES
from unclamp.nn.operands import Operands
from unclamp.nn.products import products_of
from unclamp.nn.saved import is_state_key

IGNORED = "_keys_to_ignore_on_save"
"""What transformers calls a model's own set of keys that `save_pretrained` leaves out."""


def leave_out(model: nn.Module) -> None:
    """Have files for others hold no scaling state of this model."""
    for own in _in_adapters(model):
        own.is_saved = False
    for module, keys in _ignored(model):
        for _, own, _ in products_of(module):
            if all(known is not keys for known in own.ignored):
                own.ignored = (*own.ignored, keys)


def leave_in(model: nn.Module) -> None:
    """Take back what `leave_out` did to a model that is about to be reverted."""
    for _, keys in _ignored(model):
        keys -= {key for key in keys if is_state_key(key)}


def _ignored(model: nn.Module) -> Iterator[tuple[nn.Module, set[str]]]:
    """Yield modules with a set of keys of their own, and the set."""
    for module in model.modules():
        keys = vars(module).get(IGNORED)
        if isinstance(keys, set):
            yield module, keys


def _in_adapters(model: nn.Module) -> Iterator[Operands]:
    """Yield the products of PEFT's adapters, which say which of their modules are theirs."""
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())
        for name in (*(names if isinstance(names, tuple | list) else ()), COPIES):
            own = module._modules.get(name) if isinstance(name, str) else None
            if own is not None:
                yield from (operands for _, operands, _ in products_of(own))
