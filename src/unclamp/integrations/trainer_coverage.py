"""What share of a step FP8 covers, of the first batch that a Trainer gets; never in its way."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unclamp.covered import CoverageReport
from unclamp.errors import first_line
from unclamp.integrations.recorded import say
from unclamp.nn.coverage import covered


def batch_coverage(trainer: Any, batch: Any) -> CoverageReport | None:
    """Return the coverage of a batch, on shapes alone; None where it cannot be found, and say so.

    The model is called with those of the batch's values that its forward knows by name, which of
    the trainers of TRL are not all: then outputs are differentiated in place of their loss.
    """
    model = trainer.model
    try:
        named = known_to(model, batch)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("its parameters lie on several ranks")
        return covered(model, (), named, shapes_only=True)
    except Exception as error:
        say(
            f"which share of the FLOPs is in FP8 is not known ({first_line(error)}); "
            "the training goes on, and attach(..., coverage=False) does not ask"
        )
        return None


def known_to(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return what of a batch a model's forward takes by name."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the batch is no mapping of inputs but {type(batch).__name__}")
    base = getattr(model, "get_base_model", lambda: model)()  # PEFT's forward takes anything
    taken = inspect.signature(base.forward).parameters
    named = {name: value for name, value in batch.items() if name in taken}
    if not any(isinstance(value, Tensor) for value in named.values()):
        raise TypeError(f"the model takes none of {', '.join(map(str, batch))} by name")
    return named
