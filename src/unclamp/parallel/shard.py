"""A rank's shard of a weight: what it sends, and what arrives from all.

torch asks a shard for what to gather through two methods, `fsdp_pre_all_gather` and
`fsdp_post_all_gather`. The shards here are plain tensors but for these: every operation on one
gives a plain tensor, so that state_dicts, optimizers and clipping see nothing.
"""

import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclamp.names import Gemm
from unclamp.nn import Converted
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.operands import Operands
from unclamp.numerics import CastPlan, Quantized, Stat
from unclamp.numerics.operators import quantize_operand
from unclamp.parallel.agreed import Peers, plan_of
from unclamp.written import counted


def unfit(operands: Operands, record: Any) -> str | None:
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
        wanted = not self.operands.counts_only and unfit(self.operands, self.record) is None
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
