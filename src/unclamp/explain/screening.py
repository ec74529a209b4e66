"""For every site at once: the first-order effect of what its clamp removed on the loss.

One extra pass over the steps. With x as it came, c(x) as clamped, and g the gradient of the loss
with respect to the operand, un-clamping changes the loss by about <g, x - c(x)>. Inputs and
weights have that. What a gradient's clamp removes cannot change the loss of its own step, and acts
through the optimizer later: such sites are ranked by clamp error.

On several ranks each has the gradients of its own loss, and the effect is the mean. Weights in
parts (FSDP2) have no effects here, and are ranked by clamp error too.

First order is good for a ranking and not for an attribution: the outliers are large. The effects
are kept with the answers of replays.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unclamp.explain.kept import Screened
from unclamp.explain.replay import Replay
from unclamp.explain.shards import is_sharded
from unclamp.names import Role, SiteName
from unclamp.nn import Converted
from unclamp.nn.operands import AXES
from unclamp.numerics.blocks import orient, spread
from unclamp.policy import unclamped
from unclamp.scaling import Scaling


class Screening:
    """Adds up the effects of clamped inputs and weights while steps run; see `watching`.

    Attributes:
        effects: By site, the change of the losses that un-clamping would make, first order; the
            sum over the steps watched. Negative is a fall.
    """

    def __init__(self, model: nn.Module) -> None:
        self.effects: dict[SiteName, float] = {}
        self._layers = [m for m in model.modules() if isinstance(m, Converted)]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the steps in this context."""
        handles: list[Any] = []
        for layer in self._layers:
            # Removed amounts wait here from the forward to the gradient, newest last.
            weights: list[Tensor] = []
            is_parted = is_sharded(layer.weight)
            hook = self._input_hook(weights, is_parted=is_parted)
            handles.append(layer.register_forward_pre_hook(hook))
            if layer.weight.requires_grad and not is_parted:
                handles.append(layer.weight.register_hook(self._weight_hook(layer, weights)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, site: SiteName, gradient: Tensor, lost: Tensor) -> None:
        effect = float((gradient.detach().float() * lost).sum())
        self.effects[site] = self.effects.get(site, 0.0) + effect

    def _input_hook(self, weights: list[Tensor], *, is_parted: bool) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            assert isinstance(layer, Converted)
            if not torch.is_grad_enabled() or not inputs:
                return None
            # The hook of a weight that is put together for each forward would not be called.
            lost = None if is_parted else clamped_off(layer, "weight", layer.weight)
            if lost is not None:
                weights.append(lost)
            lost = clamped_off(layer, "input", inputs[0])
            if lost is None:
                return None
            # A view of its own: the gradient of this use of the tensor, and of no other.
            own = inputs[0].view_as(inputs[0])
            if not own.requires_grad:
                own = own.detach().requires_grad_()
            site = SiteName(layer.sites.fqn, "input")
            own.register_hook(lambda gradient, lost=lost: self._add(site, gradient, lost))
            return (own, *inputs[1:])

        return hook

    def _weight_hook(self, layer: Converted, weights: list[Tensor]) -> Any:
        def hook(gradient: Tensor) -> None:
            # Micro-batches share the weight and its clamp.
            if weights:
                self._add(SiteName(layer.sites.fqn, "weight"), gradient, weights[-1])
                weights.clear()

        return hook


def screened(replay: Replay, *, last: int) -> Screened:
    """Return the effects of what the steps up to `last` clamp, in one pass over them."""
    screening = Screening(replay.training.model)
    trace = replay.run(free_gradients(replay), last=last, watching=screening.watching)
    ranks = replay.ranks
    effects = {k: x / ranks.count for k, x in ranks.summed(screening.effects).items()}
    return Screened(effects=effects, seconds=trace.seconds)


def free_gradients(replay: Replay) -> dict[SiteName, Scaling]:
    """Return the change with which to watch: no gradient is clamped.

    Where a loss jumps its gradients do, and a clamped one would understate every effect.
    """
    free = {k: unclamped(replay.original(k)) for k in replay.sites if k.role == "grad_output"}
    return {key: scaling for key, scaling in free.items() if scaling is not None}


@torch.no_grad()
def clamped_off(layer: Converted, role: Role, x: Tensor) -> Tensor | None:
    """Return x - clamp(x) as the site's scale stands; None where it cannot clamp, or did not."""
    operand = layer.sites.operand(role)
    scale = layer.sites.scales[role, AXES[role, "output"]]
    if not operand.scaling.clamps or scale is None or layer.sites.smooth:
        return None
    if scale.ndim == 2:
        flat = orient(x.detach(), 1)
        scale = spread(scale, flat.shape, operand.scaling.granularity.block).reshape(x.shape)
    limit = torch.where(scale > 0, operand.format.max / scale, torch.inf)
    x = x.detach().float()
    lost = x - x.clamp(-limit, limit)
    return lost if bool(lost.any()) else None
