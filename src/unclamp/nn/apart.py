"""What ranks are told that do not fit together, or that stand alone: in sentences."""

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from unclamp.errors import UnclampWarning
from unclamp.names import shown
from unclamp.written import counted

MOST_DIFFERENCES = 3
MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class Description:
    """What one rank is about to share.

    Attributes:
        rank: Its number in the world.
        updates: Updates that its ledger has made.
        sites: Each site, and how it is scaled.
        contents: A digest of histories and scales.
    """

    rank: int
    updates: int
    sites: dict[str, str]
    contents: list[int]


def difference(everyone: Sequence[Description]) -> str:
    """Say which ranks differ from most of the others, and in what; of two neither is the odd one.

    Where as many are of one kind as of another, nobody can say which of them are right.
    """
    votes = Counter(_alike(d) for d in everyone)
    usual = next(d for d in everyone if votes[_alike(d)] == max(votes.values()))
    is_clear = list(votes.values()).count(max(votes.values())) == 1
    others = [d for d in everyone if _alike(d) != _alike(usual)]
    lines = [
        f"{'' if is_clear else f'ranks {usual.rank} and {d.rank} differ: '}rank {d.rank} "
        f"{_differs(d, usual)}"
        for d in others
    ]
    shown_lines = lines[:MOST_DIFFERENCES]
    if len(lines) > len(shown_lines):
        shown_lines.append(f"and {counted(len(lines) - len(shown_lines), 'more rank')}")
    return (
        "expected ranks that share scales to have the same layers, scalings and scaling state: "
        f"{'; '.join(shown_lines)}. Call unclamp.convert, unclamp.switch and load_state_dict on "
        "every rank, with the same recipe and checkpoint"
    )


def _alike(d: Description) -> tuple[object, ...]:
    return (d.updates, tuple(d.sites.items()), tuple(d.contents))


def _differs(own: Description, usual: Description) -> str:
    """Say in what one rank differs from another."""
    found = []
    names = dict.fromkeys([*usual.sites, *own.sites])
    for name in names:
        here, there = own.sites.get(name), usual.sites.get(name)
        if here != there:
            mine = "has none" if here is None else f"has {here}"
            theirs = "none" if there is None else there
            found.append(f"at {name} {mine}, and rank {usual.rank} {theirs}")
    more = len(found) - MOST_DIFFERENCES
    if more > 0:
        found[MOST_DIFFERENCES:] = [f"differs at {counted(more, 'more site')}"]
    if not found and list(own.sites) != list(usual.sites):
        found.append(f"has its layers in another order than rank {usual.rank}")
    if own.updates != usual.updates:
        found.append(
            f"has made {counted(own.updates, 'update')}, and rank {usual.rank} {usual.updates}"
        )
    elif not found and own.contents != usual.contents:
        found.append(f"has other amax histories and scales than rank {usual.rank}")
    return ", ".join(found)


def tell_alone(layers: Sequence[str], model: nn.Module | None) -> None:
    """Warn of layers that nothing says who holds, in a training of several processes.

    A stage of a pipeline is whole by itself.
    """
    if model is not None and _is_stage(model):
        return
    names = ", ".join(shown(fqn) for fqn in layers[:MOST_NAMES])
    warnings.warn(
        f"{dist.get_world_size()} processes train together, and nothing says which of them hold "
        f"{counted(len(layers), 'layer')} ({names}{', ...' if len(layers) > MOST_NAMES else ''}): "
        "no DTensor, DDP or FSDP. Each process has scales of its own. Tell "
        "unclamp.convert(model, recipe, group=...), where an empty group, (), stands for this "
        "process alone.",
        UnclampWarning,
        stacklevel=2,
    )


def _is_stage(model: nn.Module) -> bool:
    """Whether a model is part of a stage of torch's pipelines, or holds those of this process."""
    stages = sys.modules.get("torch.distributed.pipelining.stage")
    kind = getattr(stages, "_PipelineStageBase", None)
    if kind is None:
        return False
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
    own = {id(part) for part in model.modules()}
    return any(
        id(stage.submod) in own or any(part is model for part in stage.submod.modules())
        for stage in found
    )
