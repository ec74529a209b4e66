"""Inside of torchtitan's Trainer: conversion before it parallelizes, a run log, checkpoints.

Two doors, which do the same:

- `with_unclamp(config, recipe)` for whoever has a config function in Python. `parallelize_fn` is
  where a model is converted: it gets each model, or each stage of a pipeline, on meta, before
  tensor parallelism, checkpointing, compilation and FSDP2, each of which takes the forward that it
  finds for the last one.
- `--override.imports` with `unclamp.integrations.torchtitan.fp8` and `...record`, without a line of
  code. An override of `Linear.Config` would see each layer by itself: without its name, so without
  rules and skips, and with a ledger, so a collective, of its own. So `fp8` overrides the model's
  config, and converts what that builds.

What a training's steps are is heard from the Trainer itself (`titan_steps`). torchtitan hands it to
the checkpoint manager only, so that is what a config of ours stands in for.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from unclamp.errors import ConvertError, UnsupportedError, naming_arguments
from unclamp.integrations.recorded import Recorded, Recording, not_installed
from unclamp.recipe import Recipe
from unclamp.runlog import Every

try:
    from torchtitan.components.checkpointer.base import BaseCheckpointManager
    from torchtitan.config.override import override
    from torchtitan.protocols.model import BaseModel
    from torchtitan.trainer import Trainer

    from unclamp.integrations.titan_steps import Steps
except ModuleNotFoundError as error:
    raise not_installed(error, "titan") from error

__all__ = ["fp8", "record", "with_unclamp"]

RUN = "unclamp"
"""The run's folder within torchtitan's dump folder."""


@naming_arguments
def with_unclamp(
    config: Trainer.Config,
    recipe: Recipe | None = None,
    *,
    skip: Sequence[str] = (),
    run: str | None = RUN,
    recording: Recording | None = None,
) -> Trainer.Config:
    """Return a torchtitan config whose model trains in FP8, and whose steps are recorded.

    For a config function that `--config` names; what the command line says comes on top of it.

    Args:
        config: With its `model_spec`. It is changed in place, and returned.
        recipe: Converts the model; None leaves it as it is, and records loss and scalars.
        skip: Globs of modules to leave alone, as `unclamp.convert` takes them.
        run: The run's folder, within `config.dump_folder` if it is relative; None: no run.
        recording: What is recorded, and how.

    Raises:
        ConvertError: The config has no `model_spec`.
        RecipeError: `recipe` is none.
    """
    if recipe is not None:
        if config.model_spec is None:
            raise ConvertError("with_unclamp needs a config with its model_spec")
        own = config.model_spec.parallelize_fn

        @functools.wraps(own)
        def parallelize(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            _convert(model, recipe, skip)
            return own(model, *args, **kwargs)

        config.model_spec = dataclasses.replace(config.model_spec, parallelize_fn=parallelize)
    if recording is None:
        recording = Recording(plain=recipe is None)
    config.checkpoint = _heard(config.checkpoint, run, recording)
    return config


@override(target=BaseModel.Config, description="unclamp: the model's products in FP8")
def fp8(
    config: BaseModel.Config,
    *,
    recipe: str | Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> BaseModel.Config:
    """Have a model converted when it is built; for `--override.imports`.

    torchtitan 0.3 builds the config that it read before overrides came, so this one is changed
    where it is, and not replaced.

    Args:
        config: The model's.
        recipe: Path of a TOML file, or a table as in one; None: the default recipe.
        skip: Globs of modules to leave alone.

    Raises:
        RecipeError: There is no such recipe.
        UnsupportedError: The config's class cannot be changed.
    """
    if isinstance(recipe, str):
        made = Recipe.load(recipe)
    else:
        made = Recipe.from_dict(recipe or {})
    plain: Any = type(config)

    @dataclass(kw_only=True, slots=True)
    class Config(plain):
        def build(self, **kwargs: Any) -> nn.Module:
            model = plain.build(self, **kwargs)
            _convert(model, made, skip)
            return model

    Config.__qualname__ = Config.__name__ = plain.__qualname__
    try:
        config.__class__ = Config
    except TypeError as error:
        raise UnsupportedError(
            f"{plain.__qualname__} cannot be changed where it is ({error}): use with_unclamp in a "
            "config function of your own"
        ) from error
    return config


@override(target=BaseCheckpointManager.Config, description="unclamp: every step recorded")
def record(
    config: BaseCheckpointManager.Config,
    *,
    run: str | None = RUN,
    casts: int = 1,
    inspect: int | None = 100,
    overwrite: bool = False,
    plain: bool = False,
) -> BaseCheckpointManager.Config:
    """Have every step recorded, and the scaling state in checkpoints; for `--override.imports`.

    Args:
        config: The checkpoint manager's, which is enabled or not.
        run: The run's folder, within the dump folder if it is relative.
        casts: Casts of every so manieth step are written.
        inspect: Casts of every so manieth step get a closer look; None: none.
        overwrite: Replace a run that is in the folder.
        plain: The model is meant to have no layer in FP8.
    """
    closer = None if inspect is None else Every(inspect)
    asked = Recording(casts=Every(casts), inspect=closer, overwrite=overwrite, plain=plain)
    return _heard(config, run, asked)


def _convert(model: nn.Module, recipe: Recipe, skip: Sequence[str]) -> None:
    """Convert a model, and say so; its state_dict stays a plain model's, which `to_hf` expects."""
    Recorded(model, None, recipe=recipe, skip=skip, state="apart")


def _heard(
    config: BaseCheckpointManager.Config, run: str | None, recording: Recording
) -> BaseCheckpointManager.Config:
    """Return a checkpoint config that has the Trainer heard when its manager is built."""
    plain: Any = type(config)
    if getattr(plain, "__heard__", False):
        raise ConvertError("the training is recorded already: call with_unclamp, or name record")

    @dataclass(kw_only=True, slots=True)
    class Config(plain):
        __heard__ = True

        def build(self, **kwargs: Any) -> BaseCheckpointManager:
            folder = None if run is None else os.path.join(kwargs["base_folder"], run)
            steps = Steps(kwargs["states"]["train_state"], kwargs["model_parts"], folder, recording)
            steps.add_state(kwargs["states"])
            manager = plain.build(self, **kwargs)
            steps.hear(manager)
            return manager

    Config.__qualname__ = Config.__name__ = plain.__qualname__
    return Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
