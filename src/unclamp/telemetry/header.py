"""What a run log's header says of a training: recipe, machine, commit, cadences."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from unclamp.errors import RecipeError, RunLogError
from unclamp.nn.ledger import Ledger
from unclamp.nn.unmatched import any_in_fp8, kept_note, notes_on
from unclamp.rule import Rule
from unclamp.runlog import Cadence, Every, Header
from unclamp.scaling import Scaling, scaling_to_dict
from unclamp.telemetry.rank import Place
from unclamp.version import __version__

NO_FP8 = (
    "No layer of this model is in FP8 as the recording begins: there is no cast to count, and that "
    "nothing is clamped says nothing of FP8."
)


def make_header(
    model: nn.Module,
    ledgers: list[Ledger],
    place: Place,
    *,
    metadata: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
    plain: bool,
    casts: Every,
    inspect: Every | None,
) -> Header:
    """Return the header of a run; `casts` and `inspect` are its cadence.

    Raises:
        RunLogError: The model should be `plain`, and has layers in FP8.
    """
    if plain and any_in_fp8(ledgers):
        raise RunLogError(
            "plain=True says that no layer of the model is in FP8, but it has converted layers: "
            "leave it out, or call unclamp.revert(model) before"
        )
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
        plain=plain,
        notes=[*notes, *([] if plain else _notes(ledgers))],
    )


def scaling_data(scaling: Scaling) -> dict[str, Any]:
    """Return a scaling as plain data; a reduce function by its name."""
    if not callable(scaling.reduce):
        return scaling_to_dict(scaling)
    name = getattr(scaling.reduce, "__name__", repr(scaling.reduce))
    return {**scaling_to_dict(replace(scaling, reduce="max")), "reduce": name}


def switch_data(
    ledger: Ledger, switched: Mapping[int, tuple[Scaling, Scaling]]
) -> list[dict[str, Any]]:
    """Return which sites of a ledger were switched, from what to what, as plain data."""
    return [
        {
            "fqn": ledger.sites[index].fqn,
            "role": ledger.sites[index].role,
            "before": scaling_data(before),
            "after": scaling_data(after),
        }
        for index, (before, after) in switched.items()
    ]


def _notes(ledgers: list[Ledger]) -> list[str]:
    """Return what a reader must know of the conversion.

    Of parts that were converted apart, a rule may match in one alone.
    """
    notes = []
    if not any_in_fp8(ledgers):
        notes.append(NO_FP8)
    for ledger in ledgers:
        if ledger.recipe is None:
            continue
        others = [other for other in ledgers if other is not ledger]
        matched = {rule.match for other in others for rule in _rules(other)
                   if rule.match not in other.unmatched}  # fmt: skip
        left = {glob: why for glob, why in ledger.unmatched.items() if glob not in matched}
        notes += notes_on(left, ledger.recipe)
        notes += [kept_note(ledger.kept)] if ledger.kept else []
    return list(dict.fromkeys(notes))


def _rules(ledger: Ledger) -> tuple[Rule, ...]:
    return () if ledger.recipe is None else ledger.recipe.rules


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
