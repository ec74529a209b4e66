"""The door for optimizer steps that no hook sees."""

from torch import nn

from unclamp.errors import ConvertError
from unclamp.nn.attach import find_ledgers


def step(model: nn.Module) -> None:
    """Tell that an optimizer step of a converted model was just made.

    Only needed where unclamp does not see it by itself: an optimizer over float32 copies or a flat
    buffer, updates inside of gradient hooks, updates by hand, or a frozen model behind a prompt or
    probe that trains. Call it after each such step, and not after one that was skipped. Beside an
    optimizer that is followed it changes nothing: products that such an optimizer holds are left to
    it, and a second call in a step finds nothing to do. It waits for no device.

    Args:
        model: The model, or the part of it whose parameters the step has changed.

    Raises:
        ConvertError: `model` is no module.

    Example:
        >>> import torch, unclamp
        >>> model = torch.nn.Linear(8, 8)
        >>> report = unclamp.convert(model, unclamp.Recipe())
        >>> model(torch.ones(4, 8)).sum().backward()
        >>> with torch.no_grad():
        ...     for parameter in model.parameters():
        ...         _ = parameter.sub_(0.1 * parameter.grad)
        >>> unclamp.step(model)
        >>> float(model.state_dict()["unclamp_input_scale"])
        448.0
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(f"expected a module for unclamp.step, got {model!r}")
    for ledger in find_ledgers(model):
        ledger.clock.told(ledger, model.modules())
