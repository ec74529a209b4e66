"""FSDP2 gathers the codes of a weight in place of the weight: one byte an element on the wire.

Each rank casts the rows that it holds, by the scale of the whole weight (`parallel.agreed`), and
sends the codes. Both GEMMs multiply what arrives, which is to the bit what a cast of the whole
weight would have made of it; a gather in backward brings the same codes again, and no unsharded
weight in high precision exists at any time.

What torch keeps of a gather (the buffers, the unsharded parameter) has no public way to be made
anew; where its own names change, `gather_codes` says so. `parallel.shard` is one weight.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from unclamp.errors import ConvertError, UnsupportedError
from unclamp.names import shown
from unclamp.nn import Converted, find_ledgers
from unclamp.nn.conv1d import Fp8Conv1D
from unclamp.nn.holders import parameter_groups
from unclamp.nn.ledger import Ledger
from unclamp.nn.named import named_modules
from unclamp.nn.products import products_of
from unclamp.parallel.agreed import Peers
from unclamp.parallel.shard import GatheredWeight, unfit
from unclamp.shown import Shown
from unclamp.written import counted

WANTED = ("all_gather_outputs", "sharded_param", "mp_policy", "_module_info", "_init_extensions")
"""What torch's record of a parameter has to have."""


@dataclass(frozen=True, kw_only=True, repr=False)
class GatherReport(Shown):
    """What `gather_codes` did, by the names of the layers.

    Attributes:
        gathered: The layers whose weights are gathered as codes.
        left: The converted layers whose weights are gathered as they are, and why.
    """

    gathered: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"gathers the codes of {counted(len(self.gathered), 'weight')}"]
        lines += [f"  {shown(fqn)}" for fqn in self.gathered]
        lines += [f"  left {shown(fqn)}: {why}" for fqn, why in self.left.items()]
        return "\n".join(lines)


def gather_codes(model: nn.Module) -> GatherReport:
    """Have FSDP2 gather the FP8 codes of converted layers' weights, one byte an element.

    Call it once on the model that is trained, on every rank, after `convert` and `fully_shard`,
    which may come in either order. `revert` ends it. During the recipe's warm-up, and where a
    switch has made a layer unfit, weights are gathered as they are.

    Left alone, and named in the report with the reason, are weights that the two GEMMs multiply
    differently (scales by row, a GEMM in high precision, smoothing), and those that FSDP2 does not
    cut along their rows, or not where their blocks end.

    Numerics: losses and gradients are, bit for bit, those of the model gathered as it is. Each
    rank counts the casts of its own rows, so that the ranks' counts add up to the weight's.

    Raises:
        ConvertError: The model has no converted layer, or `fully_shard` was not applied to it.
        UnsupportedError: This torch keeps its shards in another way.
    """
    layers = {fqn: m for fqn, m in named_modules(model) if isinstance(m, Converted)}
    ledgers = find_ledgers(model)
    if not ledgers:
        raise ConvertError("expected a converted model: call unclamp.convert before gather_codes")
    records = list(_records(model))
    if not records:
        raise ConvertError(
            "expected a model that FSDP2 shards: call fully_shard before gather_codes"
        )
    _check(records[0])
    left = {fqn: why for fqn, m in layers.items() if (why := _reason(m, records)) is not None}
    gathered = tuple(fqn for fqn in layers if fqn not in left)
    several = (fqn for fqn, _, m in products_of(model) if not isinstance(m, Converted))
    left |= dict.fromkeys(several, "its module has several products")
    for ledger in ledgers:
        own = [layers[fqn] for fqn in gathered if layers[fqn].sites.ledger is ledger]
        if own:
            Gathering(ledger, own, records).follow(model)
    return GatherReport(gathered=gathered, left=left)


def _records(model: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's records of the parameters it has in shards."""
    modules: list[Any] = [m for m in model.modules() if hasattr(type(m), "_get_fsdp_state")]
    for state in dict.fromkeys(module._get_fsdp_state() for module in modules):
        for group in parameter_groups(state):
            yield from group.fsdp_params


def _check(record: Any) -> None:
    missing = [name for name in WANTED if not hasattr(record, name)]
    if missing:
        raise UnsupportedError(
            f"torch {torch.__version__} keeps the shards of FSDP2 in another way than expected "
            f"(no {', '.join(missing)}): gather weights as they are"
        )


def _record_of(module: nn.Module, records: list[Any]) -> Any:
    def is_of(record: Any) -> bool:
        info = record._module_info
        return (info.module, info.param_name) == (module, "weight")

    return next((record for record in records if is_of(record)), None)


def _reason(layer: Converted, records: list[Any]) -> str | None:
    """Return why a layer's weight is gathered as it is; None where its codes are."""
    operands, record = layer.sites, _record_of(layer, records)
    if operands.on_end is not None:
        return "its codes are gathered already"
    if operands.ledger.observes:
        return "it is only observed"
    if record is None:
        shared = any(layer in record._module_info.shared_modules for record in records)
        return "another module has its weight too" if shared else "FSDP2 does not shard its weight"
    if record._module_info.shared_modules:
        return "another module has its weight too"
    if isinstance(layer, Fp8Conv1D):
        return "its weight lies turned"
    if record.is_dtensor:
        return "tensor parallelism cuts its weight as well"
    if getattr(record, "shard_mesh", None) is None or record.fsdp_placement.dim != 0:
        return "its weight is not cut along its rows"
    after = record.post_forward_mesh_info
    if after is not None and after != record.mesh_info:
        return "after the forward its weight is resharded over fewer ranks"
    return unfit(operands, record)


class Gathering:
    """The gathered weights of one ledger, and what keeps them right while the model changes."""

    def __init__(self, ledger: Ledger, layers: list[Converted], records: list[Any]) -> None:
        self.weights: list[GatheredWeight] = []
        self._handles: list[Any] = []
        for layer in layers:
            weight = GatheredWeight(layer, _record_of(layer, records))
            self.weights.append(weight)
            layer.sites.on_end = self._ender(weight)
        groups: dict[Any, list[GatheredWeight]] = {}
        for weight in self.weights:
            groups.setdefault(weight.record.shard_mesh.get_group(), []).append(weight)
        self.peers = [Peers(group, ledger, own) for group, own in groups.items()]
        for peers in self.peers:
            for number, weight in enumerate(peers.weights):
                assert isinstance(weight, GatheredWeight)
                weight.peers, weight.number = peers, number

    def follow(self, model: nn.Module) -> None:
        """Begin, and look at each forward whether weights were put elsewhere, or plans changed."""
        self.refresh()
        look: Callable[..., None] = lambda module, *_: self._look(module)  # noqa: E731
        again: Callable[..., None] = lambda *_: self.loaded()  # noqa: E731
        # After FSDP2's own, each in front: this one comes first.
        self._handles.append(model.register_forward_pre_hook(look, prepend=True))
        self._handles.append(register_optimizer_step_post_hook(_hook_of(self)))
        for weight in self.weights:
            module = weight.record._module_info.module
            self._handles.append(module.register_load_state_dict_post_hook(again))

    def stepped(self, optimizer: Optimizer) -> None:
        """Take the weights for others, if the optimizer holds one: fused steps have no version."""
        own = {id(weight.record.sharded_param) for weight in self.weights}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            for peers in self.peers:
                peers.stepped()

    def _look(self, model: nn.Module) -> None:
        if any(weight.is_of_another_mode for weight in self.weights):
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        self.refresh()

    def refresh(self) -> None:
        """Have every weight gathered as its plan now says."""
        for weight in self.weights:
            weight.refresh()

    def loaded(self) -> None:
        """Take nothing for known: weights and scales are others."""
        for peers in self.peers:
            peers.forget()
        self.refresh()

    def _ender(self, weight: GatheredWeight) -> Callable[[], None]:
        def end() -> None:
            weight.end()
            self.weights.remove(weight)
            if self.weights:
                return
            for handle in self._handles:
                handle.remove()
            for peers in self.peers:
                peers.weights.clear()  # no circle is to keep the ledger alive

        return end


def _hook_of(gathering: Gathering) -> Any:
    """Return what torch is to call after each optimizer's step; it keeps no model alive."""
    there = weakref.ref(gathering)

    def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        own = there()
        if own is not None:
            own.stepped(optimizer)

    return torch.compiler.disable(after_step)  # traced into a compiled step it would be lost
