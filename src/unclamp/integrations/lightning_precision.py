"""Conversion where Lightning's users look for FP8: a precision plugin, of Lightning or of Fabric.

Lightning's `precision=` names one plugin, which decides about autocast and half precision too. So
this is one of Lightning's own plugins that converts the module besides.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unclamp.errors import UnsupportedError, did_you_mean
from unclamp.integrations.scaled import PART, Scaled
from unclamp.nn.convert import State
from unclamp.recipe import Recipe

PLUGINS = {
    "32-true": "Precision",
    "bf16-mixed": "MixedPrecision",
    "16-mixed": "MixedPrecision",
    "bf16-true": "HalfPrecision",
    "16-true": "HalfPrecision",
}
"""Which of Lightning's plugins is made for its name of a precision."""
LIGHTNING = (("lightning", "lightning.pytorch"), ("pytorch_lightning", "pytorch_lightning"))
FABRIC = (("lightning", "lightning.fabric"), ("lightning_fabric", "lightning_fabric"))


def Fp8Precision(
    recipe: Recipe,
    precision: str = "bf16-mixed",
    *,
    fabric: bool = False,
    skip: Sequence[str] = (),
    state: State = "apart",
    device: str | None = None,
    scaler: Any = None,
) -> Any:
    """Return a precision plugin that converts the module: `Trainer(plugins=[Fp8Precision(...)])`.

    The strategy calls it before it wraps the module and makes optimizers. In Lightning, scaling
    state is in the plugin's part of a checkpoint. `UnclampCallback(None, run)` records beside it.

    Args:
        recipe: What to convert by.
        precision: Of all that is not in FP8, in Lightning's words: "32-true", "bf16-mixed",
            "16-mixed", "bf16-true" or "16-true".
        fabric: Make it for Fabric. Then put `FabricRecorder(None, ...)`, or
            `unclamp.ScalingState(model)`, into the dict that is saved.
        skip: Globs of modules to leave alone.
        state: As `unclamp.convert` takes it.
        device: Of autocast; "cuda" where there is one, else "cpu".
        scaler: A `GradScaler`, for "16-mixed".

    Raises:
        UnsupportedError: There is no such precision; or Lightning is not installed.
    """
    if precision not in PLUGINS:
        raise UnsupportedError(
            f"expected one of {', '.join(PLUGINS)} for precision, got {precision!r}"
            f"{did_you_mean(precision, PLUGINS)}"
        )
    known: dict[str, Any] = {}
    if PLUGINS[precision] != "Precision":
        known = {"precision": precision}
    if PLUGINS[precision] == "MixedPrecision":
        available = "cuda" if torch.cuda.is_available() else "cpu"
        known |= {"device": device or available, "scaler": scaler}
    plugin = _class(_package(FABRIC if fabric else LIGHTNING), PLUGINS[precision])(**known)
    plugin.scaled = Scaled(recipe, skip=skip, state=state)
    return plugin


class _Converts:
    """What a plugin of ours does beside Lightning's."""

    scaled: Scaled

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the module, then do what the precision does with it."""
        self.scaled.take(module)
        return super().convert_module(module)  # pyright: ignore[reportAttributeAccessIssue]

    def state_dict(self) -> dict[str, Any]:
        """Return scaling state beside the precision's own."""
        known = super().state_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return {**known, **self.scaled.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` has returned."""
        self.scaled.load_state_dict(state_dict)
        own = {name: value for name, value in state_dict.items() if name != PART}
        if own:
            super().load_state_dict(own)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _class(package: str, name: str) -> Any:
    base = getattr(importlib.import_module(f"{package}.plugins.precision"), name)
    return type("Fp8Precision", (_Converts, base), {"__module__": __name__})


def _package(packages: Sequence[tuple[str, str]]) -> str:
    for _, package in packages:
        if package in sys.modules:
            return package
    for distribution, package in packages:
        if importlib.util.find_spec(distribution) is not None:
            return package
    raise UnsupportedError(
        'Fp8Precision needs Lightning, which is not installed: pip install "unclamp[lightning]"'
    )
