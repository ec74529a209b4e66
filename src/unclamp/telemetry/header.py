"""What a run log's header says of a training: recipe, machine, commit, cadences."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from unclamp.errors import RecipeError
from unclamp.nn.ledger import Ledger
from unclamp.runlog import Cadence, Every, Header
from unclamp.scaling import Scaling, scaling_to_dict
from unclamp.telemetry.rank import Place
from unclamp.version import __version__


def make_header(
    model: nn.Module,
    ledgers: list[Ledger],
    place: Place,
    *,
    metadata: Mapping[str, Any] | None,
    casts: Every,
    inspect: Every | None,
) -> Header:
    """Return the header of a run; `casts` and `inspect` are its cadence."""
    return Header(
        unclamp_version=__version__,
        world_size=place.world_size,
        run_id=place.run_id,
        recipe=_recipe_data(ledgers),
        environment=_environment(model),
        git_commit=_git_commit(),
        metadata=dict(metadata or {}),
        cadence=Cadence(casts=casts, inspect=inspect),
        observed=any(ledger.observes for ledger in ledgers),
    )


def scaling_data(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data; a reduce function by its name."""
    if not callable(scaling.reduce):
        return scaling_to_dict(scaling)
    name = getattr(scaling.reduce, "__name__", repr(scaling.reduce))
    return {**scaling_to_dict(replace(scaling, reduce="max")), "reduce": name}


def _recipe_data(ledgers: list[Ledger]) -> dict[str, Any] | None:
    """Return the recipe as plain data; None without one, or where a function is part of it."""
    recipe = ledgers[0].recipe if ledgers else None
    try:
        return None if recipe is None else recipe.to_dict()
    except RecipeError:
        return None


def _environment(model: nn.Module) -> dict[str, Any]:
    device = next((p.device.type for p in model.parameters()), "cpu")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """Return the commit of the folder the training runs in, None outside of one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
