"""The first scale of a product that several ranks hold: taken from the tensors of all of them.

Before the first update there is no history, and a cast takes its scale from its own tensor. With
each rank its own part of a batch that would be other scales than those of one process, so between
the first forward that trains and the first update the casts of delayed and guarded scaling take the
maximum over the ranks: one number an operand, in the order of the first forward and backward, which
is the same on all ranks.

**Several microbatches.** One process casts each of them by its own amax. In a pipeline ranks meet
in each: a schedule has the same microbatches in the same order on all ranks that hold a stage, and
that their numbers are alike is known since the ranks' first meeting. What was agreed on in a
microbatch serves its second run too: the other half of a backward in two runs, a forward that is
computed again. Elsewhere later microbatches may be more on one rank than on another, as may be
further steps of a schedule before the update: nobody meets in them, and they cast by what was
agreed on first, or by their own amax if that is larger.

Where the order may differ, nobody waits for anybody, and the first scale is each rank's own: under
`find_unused_parameters`, among routed experts, in a compiled graph, in evaluations, and in a DDP in
`eval()`. A recipe with a warm-up of one step or more needs none of this.
"""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unclamp.names import Role
from unclamp.nn.checkpointed import is_in_first_of_reentrant
from unclamp.nn.gathered import GatheredCodes
from unclamp.nn.groups import Groups, max_over
from unclamp.numerics import scale_from_amax

if TYPE_CHECKING:
    from unclamp.nn.operands import Operands

_ROUTED = re.compile(r"expert", re.IGNORECASE)
NO_TASK = -1


def is_routed(fqn: str) -> bool:
    """Whether a layer looks like an expert, which a rank without tokens for it leaves out."""
    return _ROUTED.search(fqn) is not None


def trains(*, commits: bool, training: bool) -> bool:
    """Whether a forward is one of training, which all ranks make; its backward recomputes it too.

    The first forward of reentrant checkpointing has no gradients, like an evaluation; only the
    stack tells.
    """
    if commits or is_in_backward():
        return True
    return training and is_in_first_of_reentrant()


def is_in_backward() -> bool:
    """Whether a backward runs."""
    return torch._C._current_graph_task_id() != NO_TASK


def is_in_ddp() -> bool:
    """Whether a forward of a DDP runs that trains, through which all its ranks go."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and active.training


def first_scale(operands: "Operands", role: Role, x: Tensor, groups: Groups) -> Tensor | None:
    """Return the scale that ranks agree on for a cast without a history; None where it has its own.

    Every rank of the groups has to come by with a tensor of its own, the first time, and the first
    time in each microbatch of a pipeline.
    """
    if not groups:
        return None
    index, plan, shared = operands.indices[role], operands.plans[role], operands.ledger.shared
    if isinstance(x, GatheredCodes):  # whose ranks have agreed before they sent it
        return None
    if plan is None or index not in (shared.unseeded or ()):
        return None
    x = x.detach()
    amax = torch.where(x.isfinite(), x, 0).abs().amax() if x.numel() else x.new_full((), -1)
    key = (index, shared.microbatch_to_meet(groups))
    if key in shared.agreed:
        amax = torch.maximum(shared.agreed[key], amax)
    else:
        amax = shared.agreed[key] = max_over(groups, amax.reshape(1))[0].clamp(min=0)
        shared.agreed.setdefault((index, None), amax)
    power_of_two = plan.power_of_two or plan.granularity.power_of_two
    return scale_from_amax(amax, plan.largest, power_of_two=power_of_two)
