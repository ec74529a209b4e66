"""A model that a framework trains: converted once, its scaling state in the framework's checkpoint.

For frameworks that keep a part of a checkpoint for each callback (Lightning), or for whatever has
a state_dict (Fabric). The order in which they restore things is theirs.
"""

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from unclamp.errors import UnclampWarning
from unclamp.integrations.recorded import say, warn_of_missing
from unclamp.nn.attach import find_ledgers
from unclamp.nn.convert import ConvertReport, State, convert
from unclamp.nn.saved import is_state_key
from unclamp.nn.scaling_state import ScalingState
from unclamp.recipe import Recipe

PART = "scaling"
"""Key of the scaling state in our part of a checkpoint."""


class Scaled:
    """The model, once it is there, and what a checkpoint has brought before.

    Args:
        recipe: What to convert by; None leaves the model as it is.
        skip: As `unclamp.convert` takes it.
        state: As `unclamp.convert` takes it, for a model that this converts.

    Attributes:
        report: What the conversion did; None before it.
    """

    def __init__(self, recipe: Recipe | None, *, skip: Sequence[str], state: State | None) -> None:
        self.report: ConvertReport | None = None
        self._recipe, self._skip = recipe, skip
        self._state: State | None = state
        self._model: weakref.ref[nn.Module] | None = None
        self._pending: Mapping[str, Tensor] | None = None

    @property
    def model(self) -> nn.Module | None:
        """The model, if it was taken and lives."""
        return None if self._model is None else self._model()

    def take(self, model: nn.Module) -> None:
        """Convert a model, the first time that it is given; and load what waits for it."""
        if self.model is not model:
            self._model = weakref.ref(model)
            if self._recipe is not None:
                self.report = convert(model, self._recipe, skip=self._skip, state=self._state)
                say(str(self.report).splitlines()[0])
        if self._pending is not None and find_ledgers(model):
            pending, self._pending = self._pending, None
            missing = ScalingState(model).load_state_dict(pending)
            warn_of_missing(missing, "the checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Return our part of a checkpoint; empty where no model is converted."""
        model = self.model
        if model is None or not find_ledgers(model):
            return {}
        return {PART: ScalingState(model).state_dict()}

    def load_state_dict(self, part: Mapping[str, Any]) -> None:
        """Load our part of a checkpoint: now, or as soon as the model is converted."""
        self._pending = part.get(PART)
        if (model := self.model) is not None:
            self.take(model)

    def mind(self, *, has_part: bool, keys: Iterable[str]) -> None:
        """Warn of a checkpoint that has no scaling state of a model that would have some.

        Args:
            has_part: Whether it has ours.
            keys: Its model's.
        """
        is_scaled = self._recipe is not None or ((m := self.model) is not None and find_ledgers(m))
        if is_scaled and not has_part and not any(map(is_state_key, keys)):
            warnings.warn(
                "the checkpoint has no scaling state, so the histories of scales start anew: the "
                "first tensor determines each scale, and losses differ a little from those of a "
                "training that was not interrupted.",
                UnclampWarning,
                stacklevel=3,
            )
