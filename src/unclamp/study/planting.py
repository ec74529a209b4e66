"""Scenario `outlier` in whatever model: what is planted into it, where, and with which prompts."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from unclamp.study import outlier, starved
from unclamp.study.outlier import Pairs


@dataclass(frozen=True, kw_only=True)
class Planting:
    """What scenario `outlier` is in one model.

    Args:
        layer: The layer, or the expert's product, whose input has the planted outlier.
        what: What the planted batches have, for the event in a run's log.
        plant: Plants into a freshly made model with a seed, in place.
        pairs: Prompts and answers of the n-th planted step, counted from 0.
    """

    layer: str
    what: str
    plant: Callable[..., None]
    pairs: Callable[[int], Pairs]


def planting_of(model: nn.Module) -> Planting:
    """Return what is planted into a model: a starved expert, or two channels.

    Raises:
        StudyError: The model has no layers to plant in.
    """
    expert = starved.expert_of(model)
    if expert is not None:
        return Planting(
            layer=expert,
            what=starved.WHAT,
            plant=starved.plant_expert,
            pairs=starved.pairs_of_visit,
        )
    return Planting(
        layer=outlier.down_projection(model),
        what=outlier.WHAT,
        plant=outlier.plant_weights,
        pairs=lambda visit: outlier.PAIRS,
    )


def plant(model: nn.Module, *, seed: int) -> None:
    """Plant into a freshly made model, in place.

    Raises:
        StudyError: Nothing can be planted into it.
    """
    planting_of(model).plant(model, seed=seed)
