"""What two ranks see differently: maxima, parts of tensors, sums of gradients, buffers."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from unclamp.traps.trap import Documented, Fact, Trap


def nan_by_rank():
    """Reduce the maximum of 1 and NaN, with NaN on either rank."""
    facts = {}
    for bad in (0, 1):
        amax = torch.tensor(float("nan") if dist.get_rank() == bad else 1.0)
        dist.all_reduce(amax, dist.ReduceOp.MAX)
        facts[f"maximum with NaN on rank {bad}"] = amax.item()
    return facts


def maximum_of_a_part():
    """Take the amax of a weight that two ranks hold a half of."""
    whole = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    mesh = init_device_mesh("cpu", (2,))
    amax = distribute_tensor(whole, mesh, [Shard(0)]).abs().max()
    full = amax.full_tensor()  # pyright: ignore
    return {"amax.item()": amax.item(), "amax.full_tensor()": full.item()}


def reduced_in_bfloat16():
    """Average gradients of 1 and 2**-8 under FSDP2's mixed precision."""
    facts, mesh = {}, init_device_mesh("cpu", (2,))
    x = torch.tensor([[1.0 if dist.get_rank() == 0 else 2**-8]])
    for reduce_dtype in (None, torch.float32):
        layer = torch.nn.Linear(1, 2, bias=False)
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        layer(x).sum().backward()
        average = layer.weight.grad.full_tensor()  # pyright: ignore
        facts[f"average with reduce_dtype={reduce_dtype}"] = average[0].item()
    return facts


class Counted(torch.nn.Linear):
    """A layer that keeps its largest amax in a buffer."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("amax", torch.zeros(()))

    def forward(self, input):
        """Remember the amax."""
        amax = torch.maximum(self.amax, input.abs().max())  # pyright: ignore
        self.amax.copy_(amax)  # pyright: ignore
        return super().forward(input)


def broadcast_buffers():
    """Train two steps; the second rank sees 9 at the first."""
    facts = {}
    for broadcast in (True, False):
        model = DistributedDataParallel(Counted(), broadcast_buffers=broadcast)
        for amaxes in ([1.0, 9.0], [1.0, 1.0]):
            model(torch.full((1, 2), amaxes[dist.get_rank()])).sum().backward()
        amax = model.module.amax.item()
        facts[f"amax with broadcast_buffers={broadcast}"] = amax
    return facts


def _both(facts: dict[str, tuple[Fact, Fact]]) -> dict[str, Fact]:
    return {f"rank {rank}: {name}": two[rank] for rank in (0, 1) for name, two in facts.items()}


TRAPS = (
    Trap(
        name="all-reduce-max",
        belief="A maximum over ranks keeps a NaN, or drops it.",
        truth="gloo does either, by rank: a NaN on rank 0 is kept, one on rank 1 is dropped.",
        experiment=nan_by_rank,
        ranks=2,
        documented=(
            Documented(
                expected=_both(
                    {
                        "maximum with NaN on rank 0": ("nan", "nan"),
                        "maximum with NaN on rank 1": (1.0, 1.0),
                    }
                )
            ),
        ),
        cost="Whether a bad batch stops the run depends on the rank that it fell to.",
        remedy="Only amaxes of finite elements are reduced; Inf and NaN are counted and summed.",
        see="docs/distributed.md",
        telling="rank 0: maximum with NaN on rank 1",
    ),
    Trap(
        name="local-maximum",
        belief="The maximum of a DTensor is the maximum of the tensor.",
        truth="It is a pending maximum: `.item()` reads what this rank holds, 2 here and 100 "
        "there, and only `full_tensor()` reduces.",
        experiment=maximum_of_a_part,
        ranks=2,
        documented=(
            Documented(
                expected=_both({"amax.item()": (2.0, 100.0), "amax.full_tensor()": (100.0, 100.0)})
            ),
        ),
        cost="Each rank scales its part of one weight in its own way, and clamps what another "
        "would not.",
        remedy="Ranks that hold parts of a tensor agree on its amax, in one collective a step.",
        see="docs/distributed.md",
    ),
    Trap(
        name="fsdp-reduce-dtype",
        belief="FSDP2's `param_dtype=bfloat16` concerns parameters.",
        truth="Unless `reduce_dtype` is given, gradients are summed over ranks in bfloat16 too: "
        "of 1 and 2**-8 the second is lost.",
        experiment=reduced_in_bfloat16,
        ranks=2,
        documented=(
            Documented(
                expected=_both(
                    {
                        "average with reduce_dtype=None": (0.5, 0.5),
                        "average with reduce_dtype=torch.float32": (0.501953125, 0.501953125),
                    }
                )
            ),
        ),
        cost="The more ranks, the more of each gradient is rounded away; it looks like FP8 noise.",
        remedy="Nothing: it is yours to set. A conversion leaves policies alone; set "
        "`reduce_dtype=torch.float32`.",
        see="docs/distributed.md",
        telling="rank 0: average with reduce_dtype=None",
    ),
    Trap(
        name="ddp-broadcasts-buffers",
        belief="A history of amaxes in a buffer is safe under DDP.",
        truth="Before each forward DDP overwrites buffers with those of rank 0: what other ranks "
        "saw is forgotten.",
        experiment=broadcast_buffers,
        ranks=2,
        documented=(
            Documented(
                expected=_both(
                    {
                        "amax with broadcast_buffers=True": (1.0, 1.0),
                        "amax with broadcast_buffers=False": (1.0, 9.0),
                    }
                )
            ),
        ),
        cost="Delayed scaling knows the outliers of one rank only, and clamps the others'.",
        remedy="Histories are no buffers, so DDP leaves them alone; they are reduced over the "
        "ranks of a product at each update.",
        see="docs/distributed.md",
        telling="rank 1: amax with broadcast_buffers=True",
    ),
)
