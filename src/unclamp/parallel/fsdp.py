"""FSDP2 gathers the codes of a weight in place of the weight: one byte an element on the wire.

Each rank casts the rows that it holds, by the scale of the whole weight (`parallel.agreed`), and
sends the codes. Both GEMMs multiply what arrives, which is to the bit what a cast of the whole
weight would have made of it; a gather in backward brings the same codes again, and no unsharded
weight in high precision exists at any time.

torch asks a shard for what to gather through two methods, `fsdp_pre_all_gather` and
`fsdp_post_all_gather`. The shards here are plain tensors but for these: every operation on one
gives a plain tensor, so that state_dicts, optimizers and clipping see nothing. What torch keeps of
a gather (the buffers, the unsharded parameter) has no public way to be made anew; where its own
names change, `gather_codes` says so.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from unclamp.errors import ConvertError, UnsupportedError
from unclamp.names import Gemm, shown
from unclamp.nn import Converted, find_ledgers
from unclamp.nn.conv1d import Fp8Conv1D
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.ledger import Ledger
from unclamp.nn.operands import Operands
from unclamp.numerics import CastPlan, Quantized, Stat
from unclamp.numerics.operators import quantize_operand
from unclamp.parallel.agreed import Peers, plan_of
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
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, Converted)}
    ledgers = find_ledgers(model)
    if not layers:
        raise ConvertError("expected a converted model: call unclamp.convert before gather_codes")
    records = list(_records(model))
    if not records:
        raise ConvertError(
            "expected a model that FSDP2 shards: call fully_shard before gather_codes"
        )
    _check(records[0])
    left = {fqn: why for fqn, m in layers.items() if (why := _reason(m, records)) is not None}
    gathered = tuple(fqn for fqn in layers if fqn not in left)
    for ledger in ledgers:
        own = [layers[fqn] for fqn in gathered if layers[fqn].sites.ledger is ledger]
        if own:
            Gathering(ledger, own, records).follow(model)
    return GatherReport(gathered=gathered, left=left)


def _records(model: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's records of the parameters it has in shards."""
    modules: list[Any] = [m for m in model.modules() if hasattr(type(m), "_get_fsdp_state")]
    for state in dict.fromkeys(module._get_fsdp_state() for module in modules):
        one = getattr(state, "_fsdp_param_group", None)
        groups = getattr(state, "_fsdp_param_groups", [] if one is None else [one])
        for group in groups:
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
    return _unfit(operands, record)


def _unfit(operands: Operands, record: Any) -> str | None:
    """Return why codes of a weight, as its plan stands now, would not serve both its GEMMs."""
    if operands.plans["weight"] is None:
        return "its weight is not cast"
    both: tuple[Gemm, Gemm] = ("output", "grad_input")
    high = [gemm for gemm in both if operands.modes[gemm] == "high_precision"]
    if high:
        return f"its GEMM {' and '.join(high)} is in high precision"
    if operands.smooth:
        return "it is smoothed"
    if not operands.square["weight"]:
        return "its two GEMMs multiply different casts of its weight"
    block, ranks = operands.operand("weight").scaling.granularity.block[0], record.shard_mesh.size()
    if block is not None and record._orig_size[0] % (ranks * block):
        return f"its shards on {counted(ranks, 'rank')} do not end where its blocks do"
    return None


class CodeShard(Tensor):
    """A rank's rows of a weight, which sends their codes; everything made of it is plain."""

    weight: "GatheredWeight"
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def of(plain: Tensor, weight: "GatheredWeight") -> "CodeShard":
        """Return a shard in the same memory."""
        made = Tensor._make_subclass(CodeShard, plain)
        made.weight = weight
        return made

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return what to send, and what stays here."""
        return self.weight.sent(_plain(self))

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype,
        *, out: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Return the unsharded weight of what arrived, or have it hold that."""
        quantized = self.weight.arrived(outputs, metadata)
        if out is None:
            return GatheredCodes(quantized, param_dtype), ()
        assert isinstance(out, GatheredCodes)
        out.quantized = quantized
        return None

    def to(self, *args: Any, **kwargs: Any) -> "CodeShard":  # pyright: ignore
        """Return the shard elsewhere, which still sends codes: FSDP2 offloads to the CPU."""
        return CodeShard.of(_plain(self).to(*args, **kwargs), self.weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _plain(self).clone()


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


class GatheredWeight:
    """One weight whose codes are gathered.

    Attributes:
        operands: Its product's.
        record: FSDP2's record of it.
        peers: The weights that its scale is agreed on with, where it has one.
        number: Its place among them.
    """

    def __init__(self, layer: Converted, record: Any) -> None:
        self.operands, self.record = layer.sites, record
        self._layer = weakref.ref(layer)
        self.peers: Peers | None = None
        self.number = 0
        self._evaluated: bool | None = None

    @property
    def shard(self) -> Tensor:
        """This rank's rows."""
        return _plain(self.record.sharded_param._local_tensor)

    @property
    def version(self) -> tuple[int, int]:
        """Which parameter it is, and how often it was written."""
        parameter = self.record.sharded_param
        return id(parameter), parameter._version

    @property
    def dtype(self) -> torch.dtype:
        """What FSDP2's mixed precision makes of it."""
        return self.record.mp_policy.param_dtype or self.record.sharded_param.dtype

    @property
    def evaluates(self) -> bool:
        """Whether its layer is in `eval()`, so that nothing of it is to clamp."""
        layer = self._layer()
        return layer is not None and not layer.training

    @property
    def is_of_another_mode(self) -> bool:
        """Whether codes are here still that were gathered to evaluate, and it trains, or so."""
        is_here = self.record.sharded_state.name == "UNSHARDED"
        return is_here and self._evaluated is not None and self._evaluated != self.evaluates

    # ---- a gather --------------------------------------------------------------------------

    @torch.no_grad()
    def sent(self, shard: Tensor) -> tuple[tuple[Tensor, ...], Quantized]:
        """Return codes, with blocks also their scales, and the cast of this rank's rows."""
        operands, x = self.operands, shard.to(self.dtype)
        evaluates = self._evaluated = self.evaluates
        plan = plan_of(operands, evaluates=evaluates)
        if plan.granularity.is_whole:
            assert self.peers is not None
            scale, recast = self.peers.scale_of(self.number, evaluates=evaluates)
            q = quantize_operand(x, scale, _by_the_given(plan), 1)
            q.stats[Stat.RECAST] = recast
        else:
            q = quantize_operand(x, self._own_blocks(operands.scales["weight", 1]), plan, 1)
        q = operands.inspected(x, q)._replace(plan=plan)
        codes = q.codes.view(torch.uint8)
        short = -(-self.record._orig_size[0] // self.record.shard_mesh.size()) - len(codes)
        codes = F.pad(codes, (0, 0, 0, short)) if short else codes
        return (codes,) if plan.granularity.is_whole else (codes, q.scale_inv), q

    def _own_blocks(self, scales: Tensor | None) -> Tensor | None:
        return None if scales is None else scales.chunk(self.record.shard_mesh.size())[self._rank]

    @property
    def _rank(self) -> int:
        return self.record.shard_mesh.get_local_rank()

    def arrived(self, outputs: tuple[Tensor, ...], mine: Quantized) -> Quantized:
        """Return the cast of the whole weight, with the statistics of this rank's rows."""
        codes = outputs[0].narrow(0, 0, self.record._orig_size[0]).view(mine.codes.dtype)
        for tensor in (mine.scale_inv, mine.stats, mine.amax):
            if tensor.is_cuda:  # made on the stream of FSDP2's copies, used on this one
                tensor.record_stream(torch.cuda.current_stream())
        whole = mine._replace(codes=codes, values=None, turned=None)
        if len(outputs) == 1:
            return whole
        amax = torch.full_like(outputs[1], -1)  # of others' blocks nothing was seen
        amax.chunk(self.record.shard_mesh.size())[self._rank].copy_(mine.amax)
        return whole._replace(scale_inv=outputs[1], amax=amax)

    # ---- on and off ------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Send codes if the plan is fit for it as it stands, else the weight; return whether."""
        record, local = self.record, self.record.sharded_param._local_tensor
        wanted = not self.operands.counts_only and _unfit(self.operands, self.record) is None
        if wanted == isinstance(local, CodeShard):
            return wanted
        if record.sharded_state.name != "SHARDED":
            return isinstance(local, CodeShard)
        record.sharded_param._local_tensor = CodeShard.of(local, self) if wanted else _plain(local)
        self._start_anew()
        return wanted

    def end(self) -> None:
        """Have the weight gathered as it is from now on."""
        local = self.record.sharded_param._local_tensor
        if isinstance(local, CodeShard):
            self.record.sharded_param._local_tensor = _plain(local)
            self._start_anew()

    def _start_anew(self) -> None:
        """Have FSDP2 forget the buffers of earlier gathers, which have another size."""
        record = self.record
        record._init_extensions()
        if record.all_gather_outputs:
            record.all_gather_outputs = []
        if hasattr(record, "_unsharded_param"):
            del record._unsharded_param


@cache  # one object for equal plans
def _by_the_given(plan: CastPlan) -> CastPlan:
    """Return the plan of a cast by a scale for which a guard was asked already."""
    return replace(plan, guard=False) if plan.guard else plan


class Gathering:
    """The gathered weights of one ledger, and what keeps them right while the model changes."""

    def __init__(self, ledger: Ledger, layers: list[Converted], records: list[Any]) -> None:
        self._ledger = ledger
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
        for weight in self.weights:
            module = weight.record._module_info.module
            self._handles.append(module.register_load_state_dict_post_hook(again))
        if self._ledger.share is None:
            self._ledger.share = self.agreed

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

    def agreed(self, newest: Tensor) -> Tensor:
        """Return a step's newest amaxes with the weights' agreed upon, for the ledger's update.

        The amaxes of the weights as the step has left them travel along where the next gather
        wants them, so that it needs no collective of its own.
        """
        newest = newest.clone()
        for peers in self.peers:
            rows = self._ledger.layout.numbers_of(
                [weight.operands.indices["weight"] for weight in peers.weights]
            )
            ahead = peers.measured_here() if peers.wants_ahead() else newest[:0]
            agreed = peers.agree(torch.cat([newest[rows], ahead]))
            newest[rows] = agreed[: len(rows)]
            if len(ahead):
                peers.learn(agreed[len(rows) :])
        return newest

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
            if self._ledger.share == self.agreed:
                self._ledger.share = None

        return end
